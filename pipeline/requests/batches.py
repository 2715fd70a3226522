"""Batches that waste little: items of like size together, and no more of them than the memory is meant to hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def in_batches(items: Sequence[Item], size: Callable[[Item], int], most: int, tokens: int) -> list[list[Item]]:
    """Items by falling size, in batches of at most `most` items and `tokens` tokens with padding.

    The largest batch comes first, so that one too large for the memory is known at once.
    """
    batches: list[list[Item]] = []
    widest = 0
    for item in sorted(items, key=size, reverse=True):
        if not batches or len(batches[-1]) >= most or (len(batches[-1]) + 1) * widest > tokens:
            batches.append([])
            widest = size(item)
        batches[-1].append(item)
    return batches

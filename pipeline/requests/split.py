"""Splitting requests into a proxy set, which finds the golden layer, and an edit set."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.requests.schema import EditRequest


def split_by_subject(
    requests: Sequence[EditRequest], proxy_fraction: float, seed: int = 0
) -> tuple[list[EditRequest], list[EditRequest]]:
    """Proxy and edit set with no subject in common, each in the requests' own order.

    Subjects are shuffled and dealt to the proxy set until it holds `proxy_fraction` of the requests. A
    request without a subject counts as a subject of its own.

    Raises:
        UserError: when there are too few subjects for two sets.

    Example:
        >>> proxy, edits = split_by_subject(load_requests("demo"), proxy_fraction=0.5)
        >>> len(proxy), len(edits)
        (80, 80)
    """
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault((request.subject or request.prompt).casefold(), []).append(index)
    if len(groups) < 2:
        raise UserError(
            f"requests: {len(requests)} with {len(groups)} different subjects cannot be split into a proxy set "
            "and an edit set; give more requests, or a golden profile with --profile"
        )
    subjects = sorted(groups)
    random.Random(seed).shuffle(subjects)
    proxy: set[int] = set()
    for subject in subjects[:-1]:
        if proxy and len(proxy) + len(groups[subject]) > proxy_fraction * len(requests):
            break
        proxy.update(groups[subject])
    return (
        [request for index, request in enumerate(requests) if index in proxy],
        [request for index, request in enumerate(requests) if index not in proxy],
    )

"""Texts as rows that a model reads once, and rows as batches that waste little.

Shapes: B rows, T tokens, N scored tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.model import TargetRow


class Span(NamedTuple):
    """A scored text's tokens in a row.

    Attributes:
        number: the text's number.
        start: place in the row of the token that predicts the first of them.
        targets: the tokens to be scored.
    """

    number: int
    start: int
    targets: list[int]


@dataclass
class Row:
    """Tokens that the model reads, and every text that is scored on them."""

    token_ids: list[int]
    spans: list[Span] = field(default_factory=list)


def pack(texts: Sequence[TargetRow], numbers: Sequence[int] | None = None) -> list[Row]:
    """Rows on which all texts can be scored: a text that begins another one needs no row of its own.

    A text's last token predicts nothing and is not read. So all answers of one token to a prompt share a row, and
    a causal model says the same on the shared part.

    Args:
        texts: the texts, by number.
        numbers: of the texts that are wanted; default: all.
    """
    rows: list[Row] = []
    wanted = range(len(texts)) if numbers is None else numbers
    # in this order, texts that go on from a text stand just before it
    for number in sorted(wanted, key=lambda n: texts[n].token_ids[:-1], reverse=True):
        read, start = texts[number].token_ids[:-1], texts[number].target_start
        if not rows or rows[-1].token_ids[: len(read)] != read:
            rows.append(Row(read))
        rows[-1].spans.append(Span(number, start - 1, texts[number].token_ids[start:]))
    return rows


@dataclass  # Lightning moves batches to the device by setting their fields
class RowBatch:
    """Rows padded on the right: a causal model never looks there, so no mask is needed.

    Attributes:
        input_ids_BT: token ids.
        row_N, position_N: where each scored token is predicted.
        target_N: the scored tokens.
        span_N: which of `numbers` each belongs to.
        numbers: the scored texts.
    """

    input_ids_BT: Tensor
    row_N: Tensor
    position_N: Tensor
    target_N: Tensor
    span_N: Tensor
    numbers: list[int]


def collate_rows(rows: Sequence[Row], pad_token_id: int) -> RowBatch:
    """Pad rows into one batch."""
    placed = [(row, span) for row, one in enumerate(rows) for span in one.spans]
    scored = [
        (row, span.start + offset, target, number)
        for number, (row, span) in enumerate(placed)
        for offset, target in enumerate(span.targets)
    ]
    row_N, position_N, target_N, span_N = torch.tensor(scored).T.contiguous()
    input_ids_BT = nn.utils.rnn.pad_sequence(
        [torch.tensor(row.token_ids) for row in rows], batch_first=True, padding_value=pad_token_id
    )
    return RowBatch(input_ids_BT, row_N, position_N, target_N, span_N, [span.number for _, span in placed])

"""Texts as tokens, and many of them as the one batch that all stages run.

Shapes: B rows, T tokens, N target tokens of the whole batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Row(NamedTuple):
    """One text of which some tokens are targets: to be predicted from those before them."""

    token_ids: list[int]  # prompt and target
    target_start: int  # place of the first target token, at least 1; the text's length where nothing is predicted
    subject: tuple[int, int] | None = None  # places of its first and last token, where the text's maker named one
    tag: Any = None  # whatever the caller wants to know the text by

    @property
    def targets(self) -> list[int]:
        """The target tokens."""
        return self.token_ids[self.target_start :]

    @property
    def span(self) -> slice:
        """The places of its subject; of all tokens where it has none."""
        first, last = self.subject or (0, self.length() - 1)
        return slice(first, last + 1)

    def length(self) -> int:
        """How many tokens it has."""
        return len(self.token_ids)


@dataclass  # Lightning moves batches to the device by setting their fields
class Batch:
    """Texts padded on the right: a causal model never looks there, so no mask is needed."""

    input_ids_BT: Tensor  # a row may serve several texts (see `pack`); mostly it is one text's
    row_N: Tensor  # which row each target token is predicted in
    position_N: Tensor  # the position that predicts it, one before its own
    target_N: Tensor  # the target tokens
    text_N: Tensor  # which of the texts each belongs to
    texts: list[Row]
    row_of: list[int]  # which row each text is read in
    # of a batch to train on (see `pipeline.editing.lessons`), with texts that are to go on as before
    weight_B: Tensor | None = None  # how much each row counts; None: all alike
    enter_BTD: Tensor | None = None  # what enters the lowest block that is trained; None: the blocks below it run
    base_MD: Tensor | None = None  # of the last rows' M targets, what the unedited model's head reads

    def to(self, device: Any, **_: Any) -> Batch:
        """On a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    def means(self, values_N: Tensor) -> Tensor:
        """Mean of a value over each text's target tokens, one a text."""
        return means_by(values_N, self.text_N, len(self.texts))

    def losses(self, logits_NV: Tensor) -> Tensor:
        """ℓ(x, y) of every text under these logits: mean over its target tokens of −log p, in nats."""
        return self.means(F.cross_entropy(logits_NV, self.target_N, reduction="none"))


def means_by(values_N: Tensor, owner_N: Tensor, owners: int) -> Tensor:
    """Mean of each owner's values; `owner_N` says whose a value is."""
    sums = values_N.new_zeros(owners).index_add(0, owner_N, values_N)
    return sums / torch.bincount(owner_N, minlength=owners)


def pack(texts: Sequence[Row]) -> list[list[Row]]:
    """Texts in groups that one row can serve: a text that begins another one of its group needs no row of its own.

    A text's last token predicts nothing and is not read. So all answers of one token to a prompt share a row, and a
    causal model says the same on the shared part. The longest of a group comes first.
    """
    groups: list[list[Row]] = []
    # in this order, texts that go on from a text stand just before it
    for text in sorted(texts, key=lambda one: one.token_ids[:-1], reverse=True):
        read = text.token_ids[:-1]
        if not groups or groups[-1][0].token_ids[: len(read)] != read:
            groups.append([])
        groups[-1].append(text)
    return groups


def collate(texts: Sequence[Row | Sequence[Row]], pad_token_id: int = 0) -> Batch:
    """Texts, or groups that share a row (see `pack`), as a batch, but for the last token: it predicts nothing."""
    groups = [[one] if isinstance(one, Row) else list(one) for one in texts]
    flat = [text for group in groups for text in group]
    row_of = [row for row, group in enumerate(groups) for _ in group]
    input_ids_BT = nn.utils.rnn.pad_sequence(
        [torch.tensor(group[0].token_ids) for group in groups], batch_first=True, padding_value=pad_token_id
    )
    places = [
        (row_of[number], place - 1, text.token_ids[place], number)
        for number, text in enumerate(flat)
        for place in range(text.target_start, len(text.token_ids))
    ]
    row_N, position_N, target_N, text_N = torch.tensor(places).reshape(-1, 4).T.contiguous()
    read = input_ids_BT.shape[1] - (1 if places else 0)
    return Batch(input_ids_BT[:, : max(1, read)].contiguous(), row_N, position_N, target_N, text_N, flat, row_of)

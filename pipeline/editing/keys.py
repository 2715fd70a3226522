"""Keys: what enters a block's down-projection at chosen tokens, read by running blocks up to that one only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from pipeline.editing.contexts import neighbours
from pipeline.model import LLM, build_trainer
from pipeline.model.blocks import by_row
from pipeline.model.targets import last_token, prompt_tokens
from pipeline.model.trainer import predict
from pipeline.model.upper import handing_on, passing_through, reading_enter
from pipeline.options import TrainerOptions
from pipeline.requests import EditRequest, ListDataModule

READ_TOGETHER = 32  # rows
MOST_NEIGHBOURS = 1000  # prompts


class KeyRow(NamedTuple):
    """A text by its number, and the tokens whose keys are wanted: from `first` up to `end`."""

    number: int
    token_ids: list[int]
    first: int
    end: int


def read_keys(
    llm: LLM, layer: int, rows: Sequence[KeyRow], trainer: TrainerOptions, reading: KeyReading | None = None
) -> list[Tensor]:
    """Keys (end − first, I) of every row at block `layer`, in the rows' order, float32, on the CPU.

    With a `reading` that read the same rows at a lower block, on from there.
    """
    reading = reading or KeyReading(llm)
    reading.layer = layer
    in_order = sorted(rows, key=lambda row: len(row.token_ids))
    data = ListDataModule((in_order, list, READ_TOGETHER))
    found = dict(predict(build_trainer(trainer, "Reading keys"), reading, data))
    return [found[row.number] for row in rows]


def neighbour_moments(
    llm: LLM,
    layer: int,
    batches: Sequence[Sequence[EditRequest]],
    each: int,
    trainer: TrainerOptions,
    seed: int,
    reading: KeyReading | None = None,
) -> Iterator[Tensor]:
    """E[k kᵀ] (I, I) of what is to stay near each batch: other names in its prompts, and all tokens after them.

    `reading` is as for `read_keys`.
    """
    texts = [neighbours(batch, each, MOST_NEIGHBOURS, seed) for batch in batches]
    flat = [placed for some in texts for placed in some]
    all_ids = prompt_tokens(llm, [text for text, _ in flat])
    rows = [
        KeyRow(number, ids, last_token(llm, text, end), len(ids))
        for number, ((text, end), ids) in enumerate(zip(flat, all_ids, strict=True))
    ]
    keys = iter(read_keys(llm, layer, rows, trainer, reading))
    for some in texts:
        key_NI = torch.cat(list(islice(keys, len(some))))
        yield key_NI.T @ key_NI / len(key_NI)


class KeyReading(LightningModule):
    """Runs rows through the blocks up to one, and keeps what enters its down-projection.

    Args:
        llm: the model.
        climbs: whether the same rows will be read at ever higher blocks: what enters a block is kept then, and the
            blocks below it run once.
    """

    def __init__(self, llm: LLM, climbs: bool = False) -> None:
        super().__init__()
        self.llm = llm
        self.model = llm.model
        self.layer = 0
        self.climbs = climbs
        self._entered: dict[tuple[int, int], tuple[int, Tensor]] = {}  # by batch: a block, and what enters it

    @torch.no_grad()
    def predict_step(self, rows: list[KeyRow]) -> list[tuple[int, Tensor]]:
        width = max(len(row.token_ids) for row in rows)
        padded = [row.token_ids + [self.llm.pad_token_id] * (width - len(row.token_ids)) for row in rows]
        batch = rows[0].number, len(rows)
        key_BTI = self._keys(torch.tensor(padded, device=self.device), batch)
        return [
            (row.number, key_TI[row.first : row.end].float().cpu().clone())
            for row, key_TI in zip(rows, by_row(key_BTI, len(rows)), strict=True)
        ]

    def _keys(self, input_ids_BT: Tensor, batch: tuple[int, int]) -> Tensor:
        """What enters the down-projection, as the family shapes it."""
        (down,) = self.llm.blocks[self.layer].down.values()
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])

        start, enter_BTD = self._entered.get(batch, (0, None))
        with ExitStack() as stack:
            stack.callback(down.register_forward_pre_hook(keep).remove)
            if start and enter_BTD is not None:
                stack.enter_context(handing_on(self.llm, start, enter_BTD))
            stack.enter_context(passing_through(self.llm, self.layer + 1))
            entering = stack.enter_context(reading_enter(self.llm, self.layer))
            self.model(input_ids=input_ids_BT, use_cache=False, logits_to_keep=1)
        if self.climbs:
            self._entered[batch] = self.layer, entering[0]
        return seen[0]

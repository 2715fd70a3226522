"""Reading texts with a frozen model: what enters a block, a projection, or the head."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from torch import Tensor, nn

from pipeline.model.activations import RowStage, head_reads, wide
from pipeline.model.blocks import by_row
from pipeline.model.llm import LLM
from pipeline.requests.rows import Batch, Row


class Entering(RowStage):
    """Reads what enters a block by running those below: (tokens, D) of each row's subject, or of the whole row."""

    title = "Running lower blocks"

    def __init__(self, llm: LLM, layer: int) -> None:
        super().__init__(llm)
        self.layer = layer

    def step(self, batch: Batch) -> list[Tensor]:
        enter_BTD = self.activations.enter(batch.input_ids_BT, self.layer)
        return [enter_TD[row.span].cpu().clone() for row, enter_TD in zip(batch.texts, enter_BTD, strict=True)]


class Keys(RowStage):
    """Reads what enters a block's down-projection, and the block, by running the blocks from another up to it.

    A row's `tag` is what enters block `since`, (tokens, D), as an earlier pass read it; where it is None, all
    blocks below run. Outputs are pairs on the CPU: (tokens, I) at the tokens of a row's subject, and (tokens, D) at
    all of its tokens, or None where blocks cannot run `alone`.
    """

    title = "Reading keys"

    def __init__(self, llm: LLM, layer: int, since: int = 0, alone: bool = True) -> None:
        super().__init__(llm)
        self.layer, self.since, self.alone, (self.down,) = layer, since, alone, llm.blocks[layer].down

    def collate(self, items: list[Row] | list[list[Row]]) -> Batch:
        batch = super().collate(items)
        enter = [row.tag for row in batch.texts if row.tag is not None]
        return replace(batch, enter_BTD=nn.utils.rnn.pad_sequence(enter, batch_first=True) if enter else None)

    def step(self, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
        block, rows = self.llm.blocks[self.layer].name, len(batch.texts)
        with ExitStack() as stack:
            stack.enter_context(self.activations.from_block(self.since, batch.enter_BTD))
            stack.enter_context(self.activations.up_to_block(self.layer + 1))
            seen = stack.enter_context(self.activations.entering(block, self.down))
            self.activations.run(batch.input_ids_BT)
        key_BTI, enter_BTD = by_row(seen[self.down], rows).cpu(), seen[block].cpu()
        return [
            (key_BTI[place, row.span].clone(), enter_BTD[place, : row.length()].clone() if self.alone else None)
            for place, row in enumerate(batch.texts)
        ]


class HeadReads(RowStage):
    """Reads what the head makes its words of, (N, D), at the places that predict each row's N targets."""

    title = "Reading what is to stay"

    def step(self, batch: Batch) -> list[Tensor]:
        with head_reads(self.model, batch.row_N, batch.position_N) as hidden:
            self.model(input_ids=batch.input_ids_BT, use_cache=False)
        parts = wide(hidden[0]).cpu().split([len(row.targets) for row in batch.texts])
        return [part_ND.clone() for part_ND in parts]


def going_on(token_ids: list[int], places: int = 1) -> Row:
    """A row of which what comes next is read, at its end and before: any token stands there as the last target."""
    return Row([*token_ids, token_ids[-1]], max(1, len(token_ids) + 1 - places))

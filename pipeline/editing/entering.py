"""Reading texts with a frozen model: what enters a block, a projection, or the head."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from torch import Tensor

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
    """Reads what enters the down-projections of some blocks, by running the blocks up to the last of them.

    Read are the tokens of a row's subject; of a row without one, all. A row's `tag`, (L, O), is added to what
    leaves these projections at its subject's last token. Outputs are lists of (tokens, I), one a projection, on
    the CPU.
    """

    title = "Reading keys"

    def __init__(self, llm: LLM, layers: Sequence[int]) -> None:
        super().__init__(llm)
        self.blocks = layers[-1] + 1
        self.downs = [name for layer in layers for name in llm.blocks[layer].down]

    def step(self, batch: Batch) -> list[list[Tensor]]:
        rows = len(batch.texts)

        def add(number: int, _: Tensor, output_BTO: Tensor) -> Tensor:
            changed_BTO = output_BTO.clone()
            for place, row in enumerate(batch.texts):
                if row.tag is not None:
                    changed_BTO[place, row.span.stop - 1] += row.tag[number].to(output_BTO)
            return changed_BTO

        with ExitStack() as stack:
            stack.enter_context(self.activations.up_to_block(self.blocks))
            seen = stack.enter_context(self.activations.entering(*self.downs))
            for number, down in enumerate(self.downs if any(row.tag is not None for row in batch.texts) else ()):
                stack.enter_context(self.activations.changing(down, rows, partial(add, number)))
            self.activations.run(batch.input_ids_BT)
        entered = [by_row(seen[down], rows) for down in self.downs]
        return [[one[place, row.span].cpu().clone() for one in entered] for place, row in enumerate(batch.texts)]


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

"""Many requests measured side by side, each under a change of its own: what each edit would do alone.

Blocks below the changed one run once: what enters it is kept, and climbs with it from block to block. Shapes: B
rows (or requests), T tokens, D hidden size, I inputs and O outputs of a projection, k a change's rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation.plan import Text, probe_rows
from pipeline.evaluation.reading import Reading, TextReadings, read_groups
from pipeline.evaluation.values import teacher_forced_values
from pipeline.model.llm import LLM
from pipeline.requests.rows import Batch, pack
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime

Changes = dict[str, tuple[Tensor, Tensor]]  # by projection, left (B, O, k) and right (B, k, I): W + left right


class SideBySideEvaluator(Reading):
    """Teacher-forced figures of each request under its own change of one block, as `evaluate` gives them alone.

    The model is frozen by the caller, and all requests are measured at once.
    """

    def __init__(self, llm: LLM, requests: Sequence[EditRequest], runtime: Runtime | None = None) -> None:
        super().__init__(llm)
        self.runtime, self.requests = runtime or Runtime(), len(requests)
        self.texts = probe_rows(llm, requests, with_rivals=False)
        by_request = groupby(self.texts, key=lambda row: row.tag.request)
        self.groups = [group for _, own in by_request for group in pack(list(own))]  # requests share no rows
        self.unchanged: TextReadings = {}
        self.layer, self.changes = 0, Changes()
        self.entered: dict[tuple[Text, int], tuple[int, Tensor]] = {}  # by batch: a block, and what enters it

    def measure(self, layer: int, changes: Changes) -> list[dict[str, float]]:
        """Every request's figures by metric, in the requests' order; blocks are changed from the lowest on."""
        self.unchanged = self.unchanged or read_groups(self, self.groups, self.runtime)
        self.layer, self.changes = layer, changes
        columns = teacher_forced_values(
            self.texts, read_groups(self, self.groups, self.runtime), base=self.unchanged
        )
        return [
            {name: column.values[number] for name, column in columns.items() if number in column.values}
            for number in range(self.requests)
        ]

    def step(self, batch: Batch) -> list[list[tuple[Any, ...]]]:
        owners = {row: text.tag.request for row, text in zip(batch.row_of, batch.texts, strict=True)}
        own_B = torch.tensor([owners[row] for row in range(len(owners))], device=self.device)
        enter_BTD = self._entering(batch) if self.layer else None
        with ExitStack() as stack:
            stack.enter_context(self.activations.from_block(self.layer, enter_BTD))
            for name, (left_BOk, right_BkI) in self.changes.items():
                add = partial(_added, left_BOk[own_B], right_BkI[own_B])
                stack.enter_context(self.activations.changing(name, len(own_B), add))
            return super().step(batch)

    def _entering(self, batch: Batch) -> Tensor:
        key = batch.texts[0].tag, len(batch.input_ids_BT)
        start, enter_BTD = self.entered.get(key, (0, None))
        if enter_BTD is None or start < self.layer:
            enter_BTD = self.activations.enter(batch.input_ids_BT, self.layer, start, enter_BTD)
        self.entered[key] = self.layer, enter_BTD
        return enter_BTD


def _added(left_BOk: Tensor, right_BkI: Tensor, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
    """What a projection makes of x, with each row's own change of it: left (right x)."""
    return y_BTO + ((x_BTI.to(right_BkI) @ right_BkI.mT) @ left_BOk.mT).to(y_BTO.dtype)

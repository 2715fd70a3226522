"""Many requests measured side by side, each under a change of its own: what each edit would do alone.

Blocks below the changed one run once: what enters it is kept, and climbs with it from block to block.
Shapes: B rows, or requests; T tokens; D hidden size; I inputs and O outputs of a projection; k a change's rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation.reading import Reading, TextReadings, read_groups, rows_of
from pipeline.evaluation.texts import Text, probe_rows
from pipeline.evaluation.values import teacher_forced_values
from pipeline.model.activations import Activations, Change
from pipeline.model.llm import LLM
from pipeline.requests.rows import Batch, pack
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime

Changes = Mapping[str, tuple[Tensor, Tensor]]  # by projection, left (B, O, k) and right (B, k, I): W + left right


class SideBySideEvaluator:
    """Teacher-forced figures of each request under its own change of one block, as `evaluate` gives them alone.

    Args:
        llm: the model, frozen.
        requests: what to measure on, as many as are to be measured at once.
        runtime: what it runs on.
    """

    def __init__(self, llm: LLM, requests: Sequence[EditRequest], runtime: Runtime | None = None) -> None:
        self.runtime = runtime or Runtime()
        self.requests = len(requests)
        self.texts = probe_rows(llm, requests, with_rivals=False)
        by_request = groupby(self.texts, key=lambda row: row.tag.request)
        self.groups = [group for _, own in by_request for group in pack(list(own))]  # requests share no rows
        self.reading = ChangedReading(llm)
        self.base: TextReadings = {}

    def measure(self, layer: int, changes: Changes) -> list[dict[str, float]]:
        """Every request's figures by metric, in the requests' order.

        Args:
            layer: the block that is changed; no lower one than in the call before.
            changes: of its projections, a row a request.
        """
        self.base = self.base or read_groups(self.reading, self.groups, self.runtime)
        self.reading.layer, self.reading.changes = layer, changes
        now = read_groups(self.reading, self.groups, self.runtime)
        columns = teacher_forced_values(self.texts, now, self.base)
        return [
            {name: column.values[number] for name, column in columns.items() if number in column.values}
            for number in range(self.requests)
        ]


class ChangedReading(Reading):
    """Reads rows each under its request's changes of a block; without any, with the base model."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(llm)
        self.activations = Activations(llm)
        self.layer = 0
        self.changes: Changes = {}
        self.entered: dict[tuple[Text, int], tuple[int, Tensor]] = {}  # by batch: a block, and what enters it

    def step(self, batch: Batch) -> list[list[tuple[Any, ...]]]:
        owners = {row: text.tag.request for row, text in zip(rows_of(batch), batch.texts, strict=True)}
        own_B = torch.tensor([owners[row] for row in range(len(owners))], device=self.device)
        with ExitStack() as stack:
            stack.enter_context(self.activations.from_block(self.layer, self._entering(batch)))
            for name, (left_BOk, right_BkI) in self.changes.items():
                change = _adding(left_BOk[own_B], right_BkI[own_B])
                stack.enter_context(self.activations.changing(name, len(own_B), change))
            return super().step(batch)

    def _entering(self, batch: Batch) -> Tensor | None:
        if not self.layer:
            return None
        key = batch.texts[0].tag, len(batch.input_ids_BT)
        start, enter_BTD = self.entered.get(key, (0, None))
        if enter_BTD is None or start < self.layer:
            enter_BTD = self.activations.enter(batch.input_ids_BT, self.layer, start, enter_BTD)
        self.entered[key] = self.layer, enter_BTD
        return enter_BTD


def _adding(left_BOk: Tensor, right_BkI: Tensor) -> Change:
    """Every row's own change of the weight, as what it adds to the projection's output."""

    def add(input_BTI: Tensor, output_BTO: Tensor) -> Tensor:
        added_BTO = (input_BTI.to(right_BkI) @ right_BkI.mT) @ left_BOk.mT
        return output_BTO + added_BTO.to(output_BTO.dtype)

    return add

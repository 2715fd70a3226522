"""Many requests measured at once, each under a change of its own: what each edit would do alone.

Blocks below the changed one run once: what enters it is kept, and climbs with it from block to block.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.evaluation.reading import Reader
from pipeline.evaluation.readings import Item, Readings
from pipeline.evaluation.rows import Row, RowBatch, collate_rows, pack
from pipeline.evaluation.texts import scored_answers
from pipeline.evaluation.values import teacher_forced_values
from pipeline.model import LLM, build_trainer
from pipeline.model.row_changes import RowChanges, changed_rows
from pipeline.model.trainer import predict
from pipeline.model.upper import climb, handing_on
from pipeline.options import EvaluationOptions, TrainerOptions
from pipeline.requests import EditRequest, ListDataModule, in_batches

RequestValues = dict[str, float]  # by metric, and kind of probe where a benchmark has several


@dataclass
class AloneBatch(RowBatch):
    """A batch of rows of which each is one request's.

    Attributes:
        place: tells the batch from others.
        request_B: whose change a row runs under.
    """

    place: tuple[int, int]
    request_B: Tensor


class AloneEvaluator:
    """Teacher-forced figures of each request under its own change of one block, as `evaluate` gives them alone.

    Args:
        llm: the model.
        requests: what to measure on, as many as are to be measured at once.
        options: `batch_size` and `batch_tokens` are what counts here.
        trainer: what it runs on.
    """

    def __init__(
        self, llm: LLM, requests: Sequence[EditRequest], options: EvaluationOptions, trainer: TrainerOptions
    ) -> None:
        self.trainer = trainer
        scored, targets = scored_answers(llm, requests, with_rivals=False)
        self.texts = {
            number: (text, row.token_ids[row.target_start :])
            for number, (text, row) in enumerate(zip(scored, targets, strict=True))
        }
        self.requests = len(requests)
        rows = []
        for request in range(len(requests)):  # rows of different requests cannot be shared
            rows += pack(targets, [number for number, text in enumerate(scored) if text.request == request])
        batches = in_batches(rows, lambda row: len(row.token_ids), options.batch_size, options.batch_tokens)
        self.data = ListDataModule((batches, lambda picked: self._collate(picked[0], llm.pad_token_id), 1))
        self.reader = AloneReader(llm)
        self.base: Readings | None = None

    def _collate(self, rows: Sequence[Row], pad_token_id: int) -> AloneBatch:
        batch = collate_rows(rows, pad_token_id)
        own = torch.tensor([self.texts[row.spans[0].number][0].request for row in rows])
        return AloneBatch(**vars(batch), place=(rows[0].spans[0].number, len(rows)), request_B=own)

    def measure(self, layer: int, changes: RowChanges) -> list[RequestValues]:
        """Every request's figures, in the requests' order.

        Args:
            layer: the block that is changed; no lower one than in the call before.
            changes: of its projections, a row a request.
        """
        self.base = self.base or self._read()
        self.reader.layer, self.reader.changes = layer, changes
        columns = teacher_forced_values(self.texts, self._read(), self.base)
        return [
            {name: column.values[request] for name, column in columns.items() if request in column.values}
            for request in range(self.requests)
        ]

    def _read(self) -> Readings:
        return Readings.of(predict(build_trainer(self.trainer, "Measuring"), self.reader, self.data))


class AloneReader(Reader):
    """Reads batches with each row under its request's changes of a block; without any, with the base model."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(llm, {}, None)
        self.layer = 0
        self.changes: RowChanges = {}
        self._entered: dict[tuple[int, int], tuple[int, Tensor]] = {}  # by batch: a block, and what enters it

    def _score(self, batch: RowBatch) -> list[Item]:
        assert isinstance(batch, AloneBatch)
        own = {name: change.rows(batch.request_B) for name, change in self.changes.items()}
        with self._from_layer(batch), changed_rows(self.llm, own):
            return super()._score(batch)

    def _from_layer(self, batch: AloneBatch) -> AbstractContextManager[None]:
        """Blocks below the changed one do not run but once."""
        if not self.layer:
            return nullcontext()
        start, enter_BTD = self._entered.get(batch.place, (0, None))
        if enter_BTD is None or start < self.layer:
            enter_BTD = climb(self.llm, batch.input_ids_BT, enter_BTD, start, self.layer)
        self._entered[batch.place] = self.layer, enter_BTD
        return handing_on(self.llm, self.layer, enter_BTD)

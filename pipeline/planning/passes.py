"""Stages that pass over a batch without an optimiser: attribution, one-pass editing, key statistics, evaluation.

Each function goes through the stage's own code on a batch at its fullest, and returns the bytes that it takes
beside the weights.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pipeline.attribution import GradientAttribution
from pipeline.attribution.lga import AttributionModule, collate_sides, kept_of_a_token, tokens_of
from pipeline.attribution.scoring import tokens_at_once
from pipeline.editing.moments import KeyMoments
from pipeline.editing.one_pass import CaptureModule
from pipeline.editing.ordinary_text import WINDOW
from pipeline.evaluation.answering import continuations
from pipeline.evaluation.reading import Reader
from pipeline.evaluation.readings import Readings
from pipeline.evaluation.rows import RowBatch, collate_rows, pack
from pipeline.evaluation.texts import WINDOW as READ_WINDOW
from pipeline.model import TargetRow, collate_targets
from pipeline.options import AttributionOptions, EditOptions
from pipeline.planning.case import Case, tracing


def attribution(case: Case, options: AttributionOptions, batch: int) -> int:
    """LGA of `batch` requests, each with its old and its new answer."""
    watching = GradientAttribution(case.shape.blocks, options.scope)
    module = AttributionModule(case.shape, watching)
    targets = collate_sides([(case.row, case.row)] * batch)
    with tracing(case) as alive, case.stepping(), watching.attached():
        watching.begin(targets)
        module.scores(targets)
    return alive.peak


def attributed_together(case: Case) -> int:
    """The most requests that attribution runs at once, whatever its batch size: see `tokens_at_once`."""
    return max(1, tokens_at_once(case.shape, kept_of_a_token(case.shape)) // tokens_of((case.row, case.row)))


def one_pass(case: Case, options: EditOptions, batch: int) -> int:
    """The pass over `batch` requests; the ridge solution is worked out on the host."""
    projections = case.shape.blocks[case.layer].projections(options.one_pass.scope)
    module = CaptureModule(case.shape, projections)
    targets = collate_targets([case.row] * batch)
    with tracing(case) as alive, case.stepping():
        module.predict_step(targets)
    return alive.peak


def key_statistics(case: Case, scope: str, batch: int) -> int:
    """`batch` windows of ordinary text up to the golden layer, and the second moments of its inputs."""
    names = list(case.shape.blocks[case.layer].projections(scope))
    windows = torch.zeros(batch, WINDOW, dtype=torch.int64)
    with torch.device("meta"):
        module = KeyMoments(case.shape, names, Path(os.devnull))
    with tracing(case) as alive, case.stepping(), torch.no_grad():
        for sums, inputs in zip(module.sums, module.inputs, strict=True):
            sums.total, sums.count = torch.zeros(inputs, inputs, dtype=torch.float64), torch.zeros(())
        module.predict_step(windows)
    return alive.peak


def evaluation(case: Case, batch: int) -> int:
    """The most of `batch` scored texts, of a window of ordinary text, and of `batch` answers."""
    texts = _scored(case.row, batch)
    window = _scored(TargetRow([0] * READ_WINDOW, 1), 1)
    prompts = torch.zeros(batch, case.length, dtype=torch.int64)
    with tracing(case) as alive, case.stepping(), torch.no_grad():
        for scored in (texts, window):
            for base in (None, _kept(case, scored)):
                Reader(case.shape, dict.fromkeys(scored.numbers, range(1)), base).predict_step(scored)
        continuations(case.shape, prompts, torch.ones_like(prompts), 2, lambda _row, _tokens: False)
    return alive.peak


def _scored(row: TargetRow, rows: int) -> RowBatch:
    """A batch of rows alike, each scored; a first token apart from the others', or they would be one."""
    texts = [TargetRow([number % 2, *row.token_ids[1:]], row.target_start) for number in range(rows)]
    return collate_rows([pack([text])[0] for text in texts], 0)


def _kept(case: Case, batch: RowBatch) -> Readings:
    hidden = case.shape.model.config.get_text_config(decoder=True).hidden_size
    return Readings(hidden={number: torch.empty(1, hidden) for number in batch.numbers})

"""The sweep as a selector: every request is edited alone at every block, and measured.

It stands on editing and evaluation, which know the golden profile and so stand on this package; that is why it is
imported only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.attribution.selector import Runtime, Values
from pipeline.model import LLM
from pipeline.options import AttributionOptions, EditOptions, EvaluationOptions
from pipeline.requests import EditRequest


def score_by_trial(
    llm: LLM, requests: Sequence[EditRequest], options: AttributionOptions, runtime: Runtime
) -> Values:
    """Mean of rewrite, rephrase and locality of each request edited alone at each block by `options.trial`."""
    from pipeline.editing.method import Runtime as EditRuntime
    from pipeline.study.results import RESULTS_FILE, Results
    from pipeline.study.sweep import Sweep

    with TemporaryDirectory() as own:
        results = Results((runtime.work or Path(own)) / RESULTS_FILE)
        editing = EditRuntime(runtime.trainer, seed=runtime.seed)
        sweep = Sweep(llm, EditOptions(), EvaluationOptions(), editing, results)
        return sweep.run(options.trial, requests, range(len(llm.blocks))).scores


def check_trial(requests: Sequence[EditRequest], options: AttributionOptions) -> None:
    """Raise UserError for requests that the trial edits' method cannot take."""
    from pipeline.study.sweep import check_trial

    check_trial(options.trial, EditOptions(), requests, flag="trial")

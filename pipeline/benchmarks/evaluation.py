"""`run.py benchmark evaluation`: what measuring costs, and that batches change its speed alone.

Runs that are compared alternate, and medians count, so that a machine's moods fall on all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from lightning.fabric.utilities import move_data_to_device

from pipeline.benchmarks.bench import Bench, Figures
from pipeline.evaluation import Evaluator, Measurement
from pipeline.evaluation.plan import Plan
from pipeline.evaluation.rows import RowBatch
from pipeline.model.targets import head_reads_only
from pipeline.options import EvaluationOptions

TOGETHER = slice(0, 100)  # records measured in batches and one text at a time
WHOLE = slice(0, 1000)  # records whose cost is put beside plain forward passes
TURNS = 3  # runs of each kind

BOUNDS: dict[str, Figures] = {
    "in batches against one text at a time": {
        "speed-up": 3.0,
        "teacher-forced figures that agree": 1.0,
        "generations that agree": 0.995,
    },
    "teacher-forced, 1000 requests": {"cost in forward passes": 1.3},
}
AT_MOST = ("cost in forward passes",)
ALL_PROBES = ("generation", "probes", "probability")
TEACHER_FORCED = ("rewrite", "rephrase", "locality", "portability")


class EvaluationBench(Bench):
    """The evaluator beside slower ways to the same figures."""

    bounds = BOUNDS
    at_most = AT_MOST
    needed = WHOLE.stop

    def measurements(self) -> Iterator[tuple[str, Callable[[], Figures]]]:
        """Name and function of each."""
        yield "in batches against one text at a time", self.one_at_a_time
        yield "teacher-forced, 1000 requests", self.forward_passes

    def one_at_a_time(self) -> Figures:
        """All probes of all requests, scored and answered, with and without batches."""
        batched, single = EvaluationOptions(keep_base=False), EvaluationOptions(keep_base=False, batch_size=1)
        evaluators = {
            name: Evaluator(self.llm, self.records[TOGETHER], chosen, self.trainer, kinds)
            for name, chosen, kinds in (
                ("batched", batched, ALL_PROBES),
                ("single", single, ALL_PROBES),
                ("batched teacher-forced", batched, ("probes",)),
                ("single teacher-forced", single, ("probes",)),
            )
        }
        seconds, measured = self.in_turns(
            {name: partial(one.measure, name.capitalize()) for name, one in evaluators.items()}, TURNS
        )
        return {
            "speed-up": seconds["single"] / seconds["batched"],
            "speed-up, teacher-forced alone": seconds["single teacher-forced"] / seconds["batched teacher-forced"],
            "seconds a request in batches": seconds["batched"] / len(self.records[TOGETHER]),
            "teacher-forced figures that agree": _agreeing_values(measured["batched"], measured["single"]),
            "generations that agree": _agreeing_answers(measured["batched"], measured["single"]),
        }

    def forward_passes(self) -> Figures:
        """Rewrite, rephrase and locality, from texts to figures, beside plain passes over the same batches."""
        options = EvaluationOptions(keep_base=False)
        plan = Plan(self.llm, self.records[WHOLE], options, ("probes",))
        (loader,) = plan.data().predict_dataloader()
        batches = list(loader)

        def evaluated() -> Measurement:
            return Evaluator(self.llm, self.records[WHOLE], options, self.trainer, ("probes",)).measure("Evaluated")

        seconds, _ = self.in_turns({"evaluated": evaluated, "passed": partial(self._plain_passes, batches)}, TURNS)
        return {
            "cost in forward passes": seconds["evaluated"] / seconds["passed"],
            "seconds a request": seconds["evaluated"] / len(self.records[WHOLE]),
        }

    @torch.no_grad()
    def _plain_passes(self, batches: Sequence[RowBatch]) -> None:
        """The model alone, its head at the scored positions only."""
        with self.llm.frozen():
            for batch in batches:
                moved = move_data_to_device(batch, self.device)
                with head_reads_only(self.llm.model, moved.row_N, moved.position_N):
                    self.llm.model(input_ids=moved.input_ids_BT, use_cache=False).logits[0, 0, 0].item()


def _agreeing_values(one: Measurement, other: Measurement) -> float:
    """Share of requests' teacher-forced values that are the same."""
    pairs = [
        (value, other.values[name].values[unit])
        for name in TEACHER_FORCED
        if name in one.values
        for unit, value in one.values[name].values.items()
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def _agreeing_answers(one: Measurement, other: Measurement) -> float:
    """Share of the model's own answers that are the same, letter by letter."""
    pairs = [
        (a, b)
        for kind, requests in one.said.items()
        for texts, others in zip(requests, other.said[kind], strict=True)
        for a, b in zip(texts, others, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)

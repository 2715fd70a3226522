"""`run.py benchmark evaluation`: what measuring costs, and that batches change its speed alone.

Runs that are compared alternate, and medians count, so that a machine's moods fall on all of them alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from lightning.fabric.utilities import move_data_to_device

from pipeline.benchmarks.bench import Bench, Figures
from pipeline.evaluation import reading
from pipeline.evaluation.evaluator import Evaluator, Measurement
from pipeline.evaluation.plan import Plan
from pipeline.model.activations import target_logits
from pipeline.options import EvaluationOptions
from pipeline.requests.rows import Batch, collate
from pipeline.running.stage import Items, in_batches

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
        sizes = {"batched": reading.BATCH_SIZE, "single": 1}
        seconds, measured = self.in_turns(
            {
                f"{name}{suffix}": partial(self._measured, TOGETHER, kinds, size)
                for name, size in sizes.items()
                for suffix, kinds in (("", ALL_PROBES), (" teacher-forced", ("probes",)))
            },
            TURNS,
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
        plan = Plan(self.llm, self.records[WHOLE], EvaluationOptions(), ("probes",))
        groups = Items(range(len(plan.groups())), plan.groups())
        batches = in_batches(groups, reading.size, reading.BATCH_SIZE, reading.BATCH_TOKENS)
        collated = [collate(batch.items, self.llm.pad_token_id) for batch in batches]
        evaluated = partial(self._measured, WHOLE, ("probes",), reading.BATCH_SIZE)
        passed = partial(self._plain_passes, collated)
        seconds, _ = self.in_turns({"evaluated": evaluated, "passed": passed}, TURNS)
        return {
            "cost in forward passes": seconds["evaluated"] / seconds["passed"],
            "seconds a request": seconds["evaluated"] / len(self.records[WHOLE]),
        }

    def _measured(self, records: slice, kinds: Sequence[str], batch_size: int) -> Measurement:
        """From texts to figures, with nothing kept from before."""
        with (
            TemporaryDirectory() as cache,
            patch.dict(os.environ, XDG_CACHE_HOME=cache),
            patch.object(reading, "BATCH_SIZE", batch_size),
        ):
            return Evaluator(self.llm, self.records[records], trainer=self.trainer, kinds=kinds).measure(
                "Measuring"
            )

    @torch.no_grad()
    def _plain_passes(self, batches: Sequence[Batch]) -> None:
        """The model alone, its head at the scored positions only."""
        with self.llm.frozen():
            for batch in batches:
                target_logits(self.llm.model, move_data_to_device(batch, self.device))[0, 0].item()


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

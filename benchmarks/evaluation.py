"""What measuring costs, and that batches change its speed alone: `python -m benchmarks.evaluation …`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from unittest.mock import patch

from benchmarks.bench import Bench, Figures, in_turns, plain_passes, run
from pipeline import LLM, EditRequest, TrainerOptions
from pipeline.evaluation import reading
from pipeline.evaluation.evaluator import Evaluator, Measurement

TOGETHER = 100  # records measured in batches and one text at a time
WHOLE = 1000  # records whose cost is put beside plain forward passes
TURNS = 3
ANSWERED = ("generation", "probes", "probability")
TEACHER_FORCED = ("rewrite", "rephrase", "locality", "portability")


def main(words: Sequence[str] | None = None) -> None:
    bench = Bench(__doc__, words, needed=WHOLE)
    llm, trainer = bench.llm, bench.trainer
    bench.measure(
        "in batches against one text at a time",
        lambda: one_at_a_time(llm, bench.records[:TOGETHER], trainer),
        least={"speed-up": 3.0, "teacher-forced figures that agree": 1.0, "generations that agree": 0.995},
    )
    bench.measure(
        f"teacher-forced, {WHOLE} requests",
        lambda: forward_passes(llm, bench.records[:WHOLE], trainer),
        most={"cost in forward passes": 1.3},
    )


def one_at_a_time(llm: LLM, requests: Sequence[EditRequest], trainer: TrainerOptions) -> Figures:
    """All probes of all requests, scored and answered, with and without batches."""
    sizes = {"batched": reading.BATCH_SIZE, "single": 1}
    ways = {
        name: partial(measured_anew, Evaluator(llm, requests, trainer=trainer, kinds=ANSWERED), size)
        for name, size in sizes.items()
    }
    seconds, measured = in_turns(ways, TURNS)
    batched, single = measured["batched"], measured["single"]
    return {
        "speed-up": seconds["single"] / seconds["batched"],
        "seconds a request in batches": seconds["batched"] / len(requests),
        "teacher-forced figures that agree": _agreeing(scored(batched), scored(single)),
        "generations that agree": _agreeing(answers(batched), answers(single)),
    }


def forward_passes(llm: LLM, requests: Sequence[EditRequest], trainer: TrainerOptions) -> Figures:
    """Rewrite, rephrase, locality and portability, from texts to figures, beside plain passes of the same texts."""
    texts = [text for request in requests for text in scored_texts(request)]

    def evaluated() -> Measurement:
        return measured_anew(Evaluator(llm, requests, trainer=trainer, kinds=("probes",)))

    seconds, _ = in_turns({"evaluated": evaluated, "passed": partial(plain_passes, llm, texts, trainer)}, TURNS)
    return {
        "cost in forward passes": seconds["evaluated"] / seconds["passed"],
        "seconds a request": seconds["evaluated"] / len(requests),
    }


def measured_anew(evaluator: Evaluator, batch_size: int = reading.BATCH_SIZE) -> Measurement:
    """What is measured where nothing is kept of what the base model said before."""
    with (
        TemporaryDirectory() as cache,
        patch.dict(os.environ, XDG_CACHE_HOME=cache),
        patch.object(reading, "BATCH_SIZE", batch_size),
    ):
        return evaluator.measure("Measuring")


def scored_texts(request: EditRequest) -> Iterator[tuple[str, str]]:
    """Prompts and answers of a request that are scored teacher-forced."""
    yield from ((prompt, request.new_answer) for prompt in (request.prompt, *request.rephrases))
    yield from ((probe.prompt, probe.answer) for probe in (*request.locality, *request.portability))


def scored(measured: Measurement) -> list[float]:
    """Every request's teacher-forced values."""
    found = (measured.values[name].values for name in TEACHER_FORCED if name in measured.values)
    return [value for values in found for _, value in sorted(values.items())]


def answers(measured: Measurement) -> list[str]:
    """Everything that the model said."""
    return [text for kind in sorted(measured.said) for texts in measured.said[kind] for text in texts]


def _agreeing(one: Sequence[object], other: Sequence[object]) -> float:
    """Share of values, or of answers letter by letter, that are the same."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


if __name__ == "__main__":
    run(main)

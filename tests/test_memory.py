"""Out of memory: batches are run in halves, to the same results; what cannot be halved ends in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edit_options, refusal
from pipeline.model.memory import is_out_of_memory, parted
from pipeline.study.results import Results
from torch import Tensor, nn

from pipeline.attribution import score_requests
from pipeline.editing import edit
from pipeline.editing.method import Runtime
from pipeline.evaluation import Evaluator
from pipeline.model import LLM, generate, memory
from pipeline.options import (
    AttributionOptions,
    EditOptions,
    EvaluationOptions,
    TrainerOptions,
)
from pipeline.requests import EditRequest
from pipeline.study.sweep import Sweep

ERRORS: dict[str, Callable[[], Exception]] = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "host": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory"
    ),
    "python": MemoryError,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests have a lot of objects, among which looking for rubbish takes longer than any pass here."""
    monkeypatch.setattr(memory.gc, "collect", lambda: 0)


@contextmanager
def room_for(llm: LLM, rows: int, error: str = "gpu") -> Iterator[list[int]]:
    """Inside the `with`, a pass over more rows than that runs out of memory; yields the sizes of all passes."""
    seen: list[int] = []

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(len(args[0]))
        if seen[-1] > rows:
            raise ERRORS[error]()

    handle = llm.model.get_input_embeddings().register_forward_pre_hook(enter)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture
def options(tmp_path: Path) -> EditOptions:
    options = edit_options(tmp_path, tokens=1024, epochs=3, batch_size=4)
    options.locate.batch_size, options.locate.threshold, options.locate.steps = 4, 0.2, 3
    options.locate.neighbours = 3
    return options


@pytest.mark.parametrize("error", list(ERRORS))
def test_what_is_out_of_memory(error: str) -> None:
    assert is_out_of_memory(ERRORS[error]())
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_parts_are_of_like_size() -> None:
    assert parted([1, 2, 3, 4, 5], 2) == [[1, 2, 3], [4, 5]]
    assert parted([[1, 2, 3]], 2) == [[[1, 2]], [[3]]], "a batch that was formed before"
    assert parted([1], 2) == [[1]]


@pytest.mark.parametrize("method", ["lga", "causal_tracing"])
@pytest.mark.parametrize("error", ["gpu", "host"])
def test_attribution(method: str, error: str, tiny: LLM, requests: list[EditRequest]) -> None:
    options = AttributionOptions(method=method, batch_size=4, samples=2)
    expected = score_requests(tiny, requests, options)
    with room_for(tiny, 4, error) as seen:  # of two requests, two rows each
        found = score_requests(tiny, requests, options)
    assert max(seen) == 8 and sum(size == 8 for size in seen) == 1, "the second batch is halved at once"
    np.testing.assert_allclose(found.values, expected.values, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["finetune", "lora", "memit", "one_pass"])
def test_edits(
    method: str, tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path
) -> None:
    options.method = method
    expected = edit(tiny_llm, requests, options=options)
    options.statistics.cache = str(tmp_path / "another")
    with room_for(tiny_llm, 3) as seen:
        found = edit(tiny_llm, requests, options=options)
    assert max(seen) > 3 and sum(size > 3 for size in seen) < len(seen) / 2
    for name, tensor in expected.tensors.items():
        change = tensor - tiny_llm.model.get_parameter(name).detach()
        assert (found.tensors[name] - tensor).norm() < 1e-3 * change.norm(), name


def test_evaluation(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    options = EvaluationOptions(keep_base=False, max_new_tokens=4, batch_size=8, fluency=3, fluency_tokens=8)
    expected = Evaluator(tiny_llm, requests, options).measure("Whole")
    with room_for(tiny_llm, 2) as seen:
        found = Evaluator(tiny_llm, requests, options).measure("In parts")
    assert max(seen) > 2
    assert found.said == expected.said
    for name, figure in expected.metrics.items():
        assert found.metrics[name].mean == pytest.approx(figure.mean, rel=1e-4), name


def test_generation(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    prompts = [request.prompt for request in requests]
    expected = generate(tiny_llm, prompts, 4, batch_size=7)
    with room_for(tiny_llm, 1):
        assert generate(tiny_llm, prompts, 4, batch_size=7) == expected


def test_trial_edits_that_climb(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path
) -> None:
    """Blocks below run once for halves as well, also where a batch is halved at a later block only."""

    def scores(name: str) -> Any:
        results = Results(tmp_path / f"{name}.sqlite")
        sweep = Sweep(tiny_llm, options, EvaluationOptions(), Runtime(TrainerOptions()), results)
        return sweep.run("memit", requests[:4], [0, 2]).scores

    options.locate.neighbours, options.locate.key_contexts = 2, 2
    expected = scores("whole")
    with room_for(tiny_llm, 3):
        np.testing.assert_allclose(scores("parts"), expected)


def test_no_room_for_one(tiny_llm: LLM, requests: list[EditRequest], options: EditOptions) -> None:
    with room_for(tiny_llm, 0):
        message = refusal(lambda: score_requests(tiny_llm, requests, AttributionOptions(batch_size=4)))
    assert "CUDA out of memory" in message and "--trainer.precision bf16-true" in message
    options.method, options.finetune.whiten, options.finetune.kl, options.finetune.reuse = "finetune", 0, 0, False
    with room_for(tiny_llm, 0):
        assert "--trainer.strategy fsdp" in refusal(lambda: edit(tiny_llm, requests, options=options))


def test_other_errors_pass(tiny_llm: LLM, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ERRORS, "gpu", lambda: RuntimeError("shapes differ"))
    with room_for(tiny_llm, 0), pytest.raises(RuntimeError, match="shapes differ"):
        score_requests(tiny_llm, requests)


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_micro_batches_give_the_same_edit(
    method: str, tiny_llm: LLM, requests: list[EditRequest], options: EditOptions
) -> None:
    options.method = method
    tiny_llm.model.double()
    trainer = TrainerOptions(precision="64-true")
    expected = edit(tiny_llm, requests, options=options, trainer=trainer)
    for micro_batch in (1, 3):
        trainer.micro_batch = micro_batch
        with room_for(tiny_llm, 100) as seen:
            found = edit(tiny_llm, requests, options=options, trainer=trainer)
        assert seen.count(micro_batch + 1) > 3 or micro_batch == 3
        for name, tensor in expected.tensors.items():
            change = tensor - tiny_llm.model.get_parameter(name).detach()
            assert (found.tensors[name] - tensor).norm() < 1e-7 * change.norm(), (name, micro_batch)
    assert "micro_batch: 0 is too small" in refusal(lambda: TrainerOptions(micro_batch=0))

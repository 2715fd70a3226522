"""Out of memory: batches are run in halves, to the same results; what cannot be halved ends in one line."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edit_options, refusal
from torch import Tensor, nn

from pipeline.attribution.find import score_requests
from pipeline.editing.editor import METHODS, edit
from pipeline.editing.finetune import FinetuneSettings
from pipeline.evaluation import reading
from pipeline.evaluation.evaluator import Evaluator, evaluate
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.options.editing import EditOptions
from pipeline.options.shared import EvaluationOptions, TrainerOptions
from pipeline.requests.schema import EditRequest
from pipeline.running.stage import is_out_of_memory
from pipeline.running.trainer import Runtime
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
    monkeypatch.setattr(gc, "collect", lambda: 0)


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


def options_of(folder: Path, method: str, **settings: Any) -> EditOptions:
    """Options of a small edit."""
    few = {"epochs": 3, "batch_size": 4}
    if method == "memit":
        few = {"batch_size": 4, "steps": 3, "neighbours": 3}
    return edit_options(folder, method, 1024, **few | settings)


@pytest.mark.parametrize("error", list(ERRORS))
def test_what_is_out_of_memory(error: str) -> None:
    assert is_out_of_memory(ERRORS[error]())
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize("method", ["lga", "causal_tracing"])
@pytest.mark.parametrize("error", ["gpu", "host"])
def test_attribution(method: str, error: str, tiny: LLM, requests: list[EditRequest]) -> None:
    options = AttributionOptions(
        method=method, expert={"batch_size": 4} | ({} if method == "lga" else {"samples": 2})
    )
    expected = score_requests(tiny, requests, options)
    with room_for(tiny, 4, error) as seen:  # of two requests, two rows each
        found = score_requests(tiny, requests, options)
    assert max(seen) == 8 and sum(size == 8 for size in seen) == 1, "the second batch is halved at once"
    np.testing.assert_allclose(found.values, expected.values, rtol=2e-3, atol=1e-5)


def test_edits(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(tmp_path, "memit")
    expected = edit(tiny_llm, requests, options=options)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with room_for(tiny_llm, 3) as seen:
        found = edit(tiny_llm, requests, options=options)
    assert max(seen) > 3 and sum(size > 3 for size in seen) < len(seen) / 2
    for name, tensor in expected.tensors.items():
        change = tensor - tiny_llm.model.get_parameter(name).detach()
        assert (found.tensors[name] - tensor).norm() < 1e-3 * change.norm(), name


def test_evaluation(
    tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH_SIZE", 8)
    options = EvaluationOptions(max_new_tokens=4, fluency=3)
    expected = Evaluator(tiny_llm, requests, options).measure("Whole")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
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


def test_trial_edits(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    options = options_of(tmp_path, "memit", neighbours=2)

    def figures(name: str) -> Any:
        return Sweep(tiny_llm, options, Runtime(), tmp_path / name).run("memit", requests[:4], [0, 2]).values

    expected = figures("whole")
    with room_for(tiny_llm, 3):
        found = figures("parts")
    assert found.keys() == expected.keys() and "perplexity" in found
    for name, values in found.items():  # shares are counted; perplexity is of float32 losses
        np.testing.assert_allclose(values, expected[name], rtol=1e-5 if name == "perplexity" else 1e-7)


def test_no_room_for_one(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    with room_for(tiny_llm, 0):
        message = refusal(lambda: score_requests(tiny_llm, requests, AttributionOptions()))
    assert "CUDA out of memory" in message and "trainer.precision bf16-true" in message
    options = options_of(tmp_path, "finetune", whiten=0.0, kl=0.0)
    options.layers = [0]  # below which nothing is read
    with room_for(tiny_llm, 0):
        message = refusal(lambda: edit(tiny_llm, requests, options=options))
    assert "CUDA out of memory" in message and "expert.batch_size" in message


def test_other_errors_pass(tiny_llm: LLM, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ERRORS, "gpu", lambda: RuntimeError("shapes differ"))
    with room_for(tiny_llm, 0), pytest.raises(RuntimeError, match="shapes differ"):
        score_requests(tiny_llm, requests)


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_micro_batches_give_the_same_edit(
    method: str, tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path
) -> None:
    options = options_of(tmp_path, method)
    tiny_llm.model.double()
    trainer = TrainerOptions(precision="64-true")
    expected = edit(tiny_llm, requests, options=options, trainer=trainer)
    for micro_batch in (1, 3):
        trainer.micro_batch = micro_batch
        with room_for(tiny_llm, 100) as seen:
            found = edit(tiny_llm, requests, options=options, trainer=trainer)
        assert seen.count((1 + FinetuneSettings().kept) * micro_batch) > 3 or micro_batch == 3
        for name, tensor in expected.tensors.items():
            change = tensor - tiny_llm.model.get_parameter(name).detach()
            assert (found.tensors[name] - tensor).norm() < 1e-7 * change.norm(), (name, micro_batch)
    assert "micro_batch: 0 is too small" in refusal(lambda: TrainerOptions(micro_batch=0))


@contextmanager
def others_aside() -> Iterator[None]:
    """Inside the `with`, whoever collects or lists objects sees none of those that other tests have left."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def tensors_alive() -> int:
    gc.collect()
    return sum(isinstance(each, Tensor) for each in gc.get_objects())


BRIEFLY: dict[str, dict[str, Any]] = {
    "finetune": {"epochs": 2},
    "lora": {"epochs": 2},
    "auto": {"steps": 2, "tuning": {"epochs": 2}},
    "causal_tracing": {"samples": 2},
}


@pytest.mark.parametrize("stage_name", ["lga", "gradient_norm_subject", "causal_tracing", *METHODS, "evaluate"])
def test_nothing_of_a_run_stays(
    stage_name: str, tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor whose graph holds hooks that hold the tensor is a ring that no collector finds."""
    monkeypatch.undo()
    turns = count()

    def run() -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{next(turns)}"))  # where nothing is found
        if stage_name in METHODS:
            few = BRIEFLY.get(stage_name, {"steps": 2})
            edit(tiny_llm, requests, None, edit_options(tmp_path, stage_name, 512, **few))
        elif stage_name == "evaluate":
            evaluate(tiny_llm, requests, None)
        else:
            few = {"batch_size": 2} | BRIEFLY.get(stage_name, {})
            score_requests(tiny_llm, requests, AttributionOptions(method=stage_name, expert=few))

    with others_aside():
        run()  # what is kept between runs is kept now
        before = tensors_alive()
        run()
        assert tensors_alive() <= before

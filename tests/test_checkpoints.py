"""Checkpoints of a training: small, whole, and gone on from; one that is damaged is named."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.editing import lessons
from pipeline.editing.editor import edit
from pipeline.editing.finetune import FineTune
from pipeline.editing.update import WeightUpdate
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.options.shared import TrainerOptions
from pipeline.requests.schema import EditRequest
from pipeline.running.interrupts import Interrupted, interrupts

STEPS = 3  # in an epoch, and as many epochs


@pytest.fixture
def options() -> EditOptions:
    expert = {"epochs": 3, "batch_size": 3, "learnt": 0.0, "whiten": 0.0, "sparing": 0.0}
    return EditOptions(method="finetune", layers=[1], expert=expert)


class Steps:
    """Counts training steps, and breaks off after so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.most = 0, 1000
        step = FineTune.training_step

        @wraps(step)
        def counted(module: FineTune, batch: Any) -> Tensor:
            if self.done == self.most:
                raise RuntimeError("a crash")
            self.done += 1
            return step(module, batch)

        monkeypatch.setattr(FineTune, "training_step", counted)

    def crash_after(self, steps: int, *args: Any, **settings: Any) -> None:
        self.done, self.most = 0, steps
        with pytest.raises(RuntimeError, match="a crash"):
            edit(*args, **settings)
        self.done, self.most = 0, 1000


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def same(one: WeightUpdate, other: WeightUpdate) -> bool:
    return all(torch.allclose(t, other.tensors[name], rtol=1e-5, atol=1e-6) for name, t in one.tensors.items())


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_what_it_holds(
    method: str, tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path, steps: Steps
) -> None:
    options.method = method
    steps.crash_after(8, tiny_llm, requests, options=options, work=tmp_path)
    held = torch.load(next(tmp_path.rglob("training.ckpt")), weights_only=True)
    assert held["state_dict"] and all("layers.1.mlp" in name for name in held["state_dict"])
    assert all("lora_" in name for name in held["state_dict"]) == (method == "lora")
    assert held["optimizer_states"][0]["state"][0]["exp_avg"].shape == next(iter(held["state_dict"].values())).shape
    assert held["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped"])
def test_a_damaged_one_counts_as_not_there(
    damage: str, tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path, steps: Steps
) -> None:
    steps.crash_after(4, tiny_llm, requests, options=options, work=tmp_path)
    (file,) = tmp_path.rglob("training.ckpt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"cut": file.read_bytes()[:-500], "empty": b"", "garbage": b"x" * 5000}.get(damage, content))
    edit(tiny_llm, requests, options=options, work=tmp_path)
    assert steps.done == 3 * STEPS


@pytest.mark.parametrize("method", ["finetune", "lora"])
@pytest.mark.parametrize(("done", "micro_batch"), [(2, None), (4, None), (13, 1)])
def test_within_an_epoch(
    done: int, micro_batch: int | None, method: str, tiny_llm: LLM, requests: list[EditRequest],
    options: EditOptions, tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options.method = method
    trainer = TrainerOptions(micro_batch=micro_batch)
    expected = edit(tiny_llm, requests, options=options, trainer=trainer)
    total = steps.done
    monkeypatch.setattr(lessons, "EVERY", 0.0)
    steps.crash_after(done, tiny_llm, requests, options=options, work=tmp_path, trainer=trainer)
    assert same(edit(tiny_llm, requests, options=options, work=tmp_path, trainer=trainer), expected)
    assert steps.done == total - done // ((micro_batch and 3) or 1) * ((micro_batch and 3) or 1), (
        "no step is done twice"
    )


def test_a_signal_loses_nothing(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path, steps: Steps,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = edit(tiny_llm, requests, options=options)
    steps.done = 0
    step = FineTune.training_step

    @wraps(step)
    def stopped(module: FineTune, batch: Any) -> Tensor:
        if steps.done == 4:
            interrupts.noted = 2
        return step(module, batch)

    with monkeypatch.context() as patched:
        patched.setattr(FineTune, "training_step", stopped)
        with pytest.raises(Interrupted):
            edit(tiny_llm, requests, options=options, work=tmp_path)
    interrupts.noted = None
    assert same(edit(tiny_llm, requests, options=options, work=tmp_path), expected)
    assert steps.done == 9


@pytest.mark.parametrize("back", [0, 1, 2])
def test_a_training_that_ends_early_does_so_when_resumed(
    back: int, tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path, steps: Steps,
    monkeypatch: pytest.MonkeyPatch, few_lessons: None,
) -> None:  # fmt: skip
    """An epoch's unlearnt rows count those before the break; once all are learnt, no step is taken."""
    options.expert |= {"epochs": 60, "learnt": 4.5, "learning_rate": 0.1, "contexts": 0, "kl": 0.0}
    expected = edit(tiny_llm, requests, options=options)
    total = steps.done
    assert total % STEPS == 0 and STEPS < total < 60 * STEPS
    monkeypatch.setattr(lessons, "EVERY", 0.0)
    if back:
        steps.crash_after(total - back, tiny_llm, requests, options=options, work=tmp_path)
    else:
        edit(tiny_llm, requests, options=options, work=tmp_path)
        steps.done = 0
    assert same(edit(tiny_llm, requests, options=options, work=tmp_path), expected)
    assert steps.done == back

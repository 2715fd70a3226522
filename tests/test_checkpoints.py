"""Checkpoints of a training: whole, small, two of them; what is damaged is named, and the one before is used."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import pace
from pipeline.editing import WeightUpdate, edit
from pipeline.editing.checkpoints import last_checkpoint
from pipeline.editing.finetune import FineTune
from pipeline.model import LLM
from pipeline.options import EditOptions
from pipeline.requests import EditRequest

STEPS = 3  # in an epoch, and as many epochs


@pytest.fixture
def options() -> EditOptions:
    options = EditOptions(method="finetune", layers=[1])
    for training in (options.finetune, options.lora):
        training.epochs, training.batch_size, training.learnt, training.whiten = 3, 3, 0.0, 0.0
    return options


class Steps:
    """Counts optimiser steps, and breaks off after so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.most = 0, 1000
        step = FineTune.training_step

        @wraps(step)
        def counted(module: FineTune, share: Any) -> None:
            if self.done == self.most:
                raise RuntimeError("a crash")
            self.done += 1
            step(module, share)

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
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_what_they_hold(
    method: str, tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path, steps: Steps
) -> None:
    options.method = method
    steps.crash_after(8, tiny_llm, requests, options=options, work=tmp_path)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert [file.name for file in files] == ["step-000000003.ckpt", "step-000000006.ckpt"]
    held = torch.load(files[-1], weights_only=True)
    assert held["state_dict"] and all("layers.1.mlp" in name for name in held["state_dict"])
    assert all("lora_" in name for name in held["state_dict"]) == (method == "lora")
    assert held["optimizer_states"][0]["state"][0]["exp_avg"].shape == next(iter(held["state_dict"].values())).shape
    assert held["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 2
    assert last_checkpoint(tmp_path) == files[-1]


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped"])
def test_a_damaged_one_is_named(
    damage: str, tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path, steps: Steps,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    expected = edit(tiny_llm, requests, options=options)
    steps.crash_after(8, tiny_llm, requests, options=options, work=tmp_path)
    before, last = sorted(tmp_path.glob("*.ckpt"))
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes({"cut": last.read_bytes()[:-500], "empty": b"", "garbage": b"x" * 5000}.get(damage, content))
    (tmp_path / "step-000000009.partial").write_bytes(b"cut off")  # by a kill, while it was written
    assert same(edit(tiny_llm, requests, options=options, work=tmp_path), expected)
    assert f"checkpoint: {last}: damaged; going on from {before.name}" in capsys.readouterr().err
    assert steps.done == 6


def test_none_is_whole(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path, steps: Steps,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    expected = edit(tiny_llm, requests, options=options)
    steps.crash_after(8, tiny_llm, requests, options=options, work=tmp_path)
    for file in tmp_path.glob("*.ckpt"):
        file.write_bytes(b"")
    assert same(edit(tiny_llm, requests, options=options, work=tmp_path), expected)
    assert "damaged; training from the beginning" in capsys.readouterr().err
    assert steps.done == 9


@pytest.mark.parametrize("method", ["finetune", "lora"])
@pytest.mark.parametrize("done", [2, 4])
def test_within_an_epoch(
    done: int, method: str, tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path,
    steps: Steps, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options.method, options.finetune.bound = method, 0.3
    expected = edit(tiny_llm, requests, options=options)
    monkeypatch.setattr(pace, "EVERY", 0.0)
    monkeypatch.setattr(pace, "SHARE", 0)
    steps.crash_after(done, tiny_llm, requests, options=options, work=tmp_path)
    assert same(edit(tiny_llm, requests, options=options, work=tmp_path), expected)
    assert steps.done == 9 - done, "no step is done twice"


@pytest.mark.parametrize("back", [0, 1, 2])
def test_a_training_that_ends_early_does_so_when_resumed(
    back: int, tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path, steps: Steps,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An epoch's share of unlearnt rows counts those before the break; once all are learnt, no step is taken."""
    options.finetune.epochs, options.finetune.learnt, options.finetune.learning_rate = 60, 4.5, 0.1
    options.finetune.contexts, options.finetune.kl = 0, 0.0
    expected = edit(tiny_llm, requests, options=options)
    total = steps.done
    assert total % STEPS == 0 and STEPS < total < 60 * STEPS
    monkeypatch.setattr(pace, "EVERY", 0.0)
    monkeypatch.setattr(pace, "SHARE", 0)
    if back:
        steps.crash_after(total - back, tiny_llm, requests, options=options, work=tmp_path)
    else:
        edit(tiny_llm, requests, options=options, work=tmp_path)
        steps.done = 0
    assert same(edit(tiny_llm, requests, options=options, work=tmp_path), expected)
    assert steps.done == back

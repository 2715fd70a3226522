"""An edit that is interrupted and resumed gives what an uninterrupted one gives, bit for bit."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_options, refusal
from lightning.pytorch import LightningModule

from pipeline.editing import METHODS, edit
from pipeline.editing.finetune import FineTune
from pipeline.editing.values import ValueSearch
from pipeline.model import LLM
from pipeline.options import EditOptions
from pipeline.requests import EditRequest


@pytest.fixture
def options(tmp_path: Path) -> EditOptions:
    options = edit_options(tmp_path, tokens=512, epochs=5, batch_size=3)
    options.locate.batch_size, options.locate.threshold = 2, 0.2
    return options


def interrupt_after(steps: int, module: type[LightningModule], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a stage, so many steps after its start."""
    step, left = getattr(module, name), iter(range(steps))

    @wraps(step)  # Lightning reads a step's signature
    def stopping(self: LightningModule, *args: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(module, name, stopping)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "one_pass"])
def test_resumed_equals_uninterrupted(
    method: str,
    fraction: float,
    tiny_llm: LLM,
    requests: list[EditRequest],
    options: EditOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options.method = method
    expected = edit(tiny_llm, requests, options=options)
    searches = METHODS[method].options == "locate"
    stage = (ValueSearch, "predict_step") if searches else (FineTune, "training_step")
    steps = options.locate.rounds * 4 if searches else options.finetune.epochs * 3
    done = round(fraction * steps)
    kept = done if searches else done // 3 * 3  # whole batches of values, whole epochs
    work = tmp_path / "work"
    with monkeypatch.context() as patched:
        interrupt_after(done, *stage, patched)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            edit(tiny_llm, requests, options=options, work=work)
    with monkeypatch.context() as patched:
        interrupt_after(steps - kept, *stage, patched)  # what was kept is not done again
        resumed = edit(tiny_llm, requests, options=options, work=work)
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in expected.tensors.items())
    assert all(torch.equal(tensor, resumed.state[name]) for name, tensor in expected.state.items())


def test_work_of_another_edit_is_refused(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path
) -> None:
    edit(tiny_llm, requests, options=options, work=tmp_path / "work")
    message = refusal(lambda: edit(tiny_llm, requests[1:], options=options, work=tmp_path / "work"))
    assert "holds work of another edit" in message

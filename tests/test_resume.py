"""An edit that is interrupted and resumed gives what an uninterrupted one gives, within rounding."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_options
from lightning.pytorch import LightningModule

from pipeline.editing.editor import METHODS, edit
from pipeline.editing.finetune import FineTune
from pipeline.editing.values import ValueSearch
from pipeline.model.llm import LLM
from pipeline.requests.schema import EditRequest


def interrupt_after(steps: int, module: type[LightningModule], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a stage, so many steps after its start."""
    step, left = getattr(module, name), iter(range(steps))

    @wraps(step)  # Lightning reads a step's signature
    def stopping(self: LightningModule, *args: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(module, name, stopping)


@pytest.mark.parametrize(
    ("method", "fraction"),
    [(name, place) for name in ("memit", "finetune") for place in (0.1, 0.8)]
    + [("lora", 0.5)]
    + [  # by memit's own search, or between the places above
        pytest.param(name, 0.5, marks=pytest.mark.slow)
        for name in METHODS
        if METHODS[name].solves_anew or name == "finetune"
    ],
)
def test_resumed_equals_uninterrupted(
    method: str,
    fraction: float,
    tiny_llm: LLM,
    requests: list[EditRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searches = "steps" in METHODS[method].quick
    own: dict[str, Any] = {"epochs": 5, "batch_size": 3, "learnt": 0.0}
    if searches:
        own = {"batch_size": 2, "steps": 6, "threshold": 0.2}
    options = edit_options(tmp_path, method, 512, **own)
    expected = edit(tiny_llm, requests, options=options)
    stage = (ValueSearch, "predict_step") if searches else (FineTune, "training_step")
    steps = 4 if searches else 5 * 3
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
    for found, wanted in ((resumed.tensors, expected.tensors), (resumed.state, expected.state)):
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)

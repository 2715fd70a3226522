"""The notebook's cells run, one after the other, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT

from pipeline.editing import finetune

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def test_the_notebook_runs(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune, "EPOCHS", 1)
    monkeypatch.setattr(finetune, "LEAST_STEPS", 1)
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            text = "".join(cell["source"]).replace('MODEL = "smollm2"', f"MODEL = {str(tiny_folder)!r}")
            exec(compile(text, cell["id"], "exec"), names)
    told = capsys.readouterr().out.splitlines()
    assert "4 blocks" in told[0]
    assert [fact.id for fact in names["update"].requests] == ["capital", "author", "maker", "language"]
    assert names["after"] != names["before"], "the edit changed what the model says"
    assert told[-1].startswith("('golden@0', ")

"""`run.py demo` tells what happened: the answers it shows are the model's, and it ends where it began."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import make_tiny
from test_cli import one_line
from transformers import PreTrainedTokenizerFast

from pipeline.attribution.profile import GoldenProfile
from pipeline.cli import main
from pipeline.editing.update import WeightUpdate
from pipeline.model.loading import load_model
from pipeline.requests.readers import load_requests

COLUMNS = 300  # no cell is broken


@pytest.fixture
def tiny_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    make_tiny("llama", tokenizer, seed=1).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_six_steps_and_back(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    output = tmp_path / "out"
    words = ["demo", "--model", str(tiny_folder), "--facts", "3", "--trainer.accelerator", "cpu"]
    assert main([*words, "--output", str(output)]) == 0
    told = capsys.readouterr().out
    assert re.findall(r"^(\d) of 6: ", told, flags=re.MULTILINE) == list("123456")
    steps = re.split(r"^\d of 6: .*$", told, flags=re.MULTILINE)[1:]

    facts = [one for one in load_requests("demo") if one.prompt in steps[0]]
    assert len(facts) == 3
    assert all(one.new_answer in steps[0] for one in facts)
    assert all(one.prompt in steps[3] and one.rephrases[0] in steps[3] for one in facts)
    assert "bit for bit" in steps[5] and "NOT" not in steps[5]

    update = WeightUpdate.load(output)
    assert sorted(request.id for request in update.requests) == sorted(one.id for one in facts)
    [layer] = GoldenProfile.load(output).golden_layers
    blocks = {int(re.findall(r"layers\.(\d+)\.", name)[0]) for name in update.tensors}
    assert blocks == {*range(layer, 3)}, "the golden one and those above it, but for the last"
    assert update.fingerprint == load_model(str(tiny_folder)).fingerprint


@pytest.mark.parametrize("facts", ["0", "41"])
def test_facts_out_of_range(facts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--facts", facts]) == 2
    assert "facts" in one_line(capsys.readouterr().err)

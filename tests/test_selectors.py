"""Selectors that look at no request, what a new one takes, and flags that do not go together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal
from safetensors.numpy import load_file

from pipeline.attribution.find import SELECTORS, find_golden_layer
from pipeline.attribution.profile import GoldenProfile
from pipeline.attribution.selector import Selector, register
from pipeline.cli import main
from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.requests.schema import EditRequest


def test_middle_and_fixed(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    middle = find_golden_layer(tiny_llm, requests, AttributionOptions(method="middle"))
    fixed = find_golden_layer(tiny_llm, requests, AttributionOptions(method="fixed", layer=3))
    assert (middle.golden_layers, fixed.golden_layers) == ([2], [3])
    assert (middle.excluded, middle.scope, middle.stability) == ([], "", None)
    assert "0 to 3" in refusal(
        lambda: find_golden_layer(tiny_llm, requests, AttributionOptions(method="fixed", layer=4))
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": "fixed"}, ["layer", "--method fixed"]),
        ({"layer": 2}, ["layer: 2", "not for lga"]),
        ({"method": "fixed", "layer": -1}, ["layer", "-1"]),
        ({"samples": 0}, ["samples", "0", "1"]),
        ({"noise": 0.0}, ["noise", "0"]),
    ],
)
def test_flags_that_do_not_go_together(changed: dict[str, object], words: list[str]) -> None:
    line = refusal(lambda: AttributionOptions(**changed))  # type: ignore[arg-type]
    assert all(word in line for word in words)


def test_a_new_selector_is_one_entry(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    values = np.zeros((7, 4))
    values[:, 1] = 0.5
    register("mine", Selector(lambda *_: values))
    try:
        profile = find_golden_layer(tiny_llm, requests, AttributionOptions(method="mine", order="magnitude"))
        for name in ("mine", "no word"):  # taken, and none
            with pytest.raises(ValueError, match=name):
                register(name, Selector(lambda *_: values))
    finally:
        del SELECTORS["mine"]
    assert (profile.golden_layers, profile.order, profile.fences) == ([1], "signed", None)


@pytest.mark.parametrize("method", sorted(SELECTORS))
def test_every_method_from_the_command_line(
    method: str, tiny_folder: Path, request_file: Path, tmp_path: Path
) -> None:
    words = ["attribute", "--model", str(tiny_folder), "--requests", str(request_file), "--method", method]
    words += ["--layer", "1"] if method == "fixed" else []
    assert main([*words, "--expert.samples", "2", "--output", str(tmp_path / "out")]) == 0
    profile = GoldenProfile.load(tmp_path / "out")
    assert profile.method == method
    values = load_file(tmp_path / "out" / "scores.safetensors")["scores"]
    assert len(values) == 7
    np.testing.assert_allclose(values.mean(0), profile.scores)
    assert (tmp_path / "out" / "stability.png").is_file() == SELECTORS[method].reads_requests


def test_subjects_are_looked_for_before_the_model_is_loaded(
    request_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [json.loads(line) for line in request_file.read_text().splitlines()]
    records[4]["subject"] = "Atlantis"
    request_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [
        "--model",
        str(tmp_path / "no-model"),
        "--requests",
        str(request_file),
        "--output",
        str(tmp_path / "o"),
    ]
    for command in (["attribute", "--method"], ["run", "--edit.method", "memit", "--attribution.method"]):
        assert main([command[0], *words, *command[1:], "causal_tracing"]) == 1
        assert "capital-4" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()

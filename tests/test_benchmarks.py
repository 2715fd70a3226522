"""The benchmarks: every figure that is asked for is there, and found once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SHARED

from pipeline.benchmarks import attribution, distributed, editing, evaluation, full_size
from pipeline.model import LLM
from pipeline.options import BenchmarkCommand, EditOptions, FinetuneOptions, LocateOptions

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few records and steps in place of hundreds."""
    for name, value in {
        "PROXY": slice(1000, 1003),
        "BATCH": slice(0, 3),
        "ALONE": slice(0, 1),
        "MANY": slice(0, 4),
        "UPDATES": 2,
        "EACH": 2,
        "TURNS": 1,
        "FURTHER": ("emmet",),
    }.items():
        monkeypatch.setattr(editing, name, value)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not here")
@pytest.mark.usefixtures("small")
def test_every_figure_is_found_once(tiny_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = BenchmarkCommand(data=str(SHARED))
    results = editing.EditingBench(tiny_llm, options, tmp_path).results()
    assert all(set(result) == {"name", "value", "bound", "met"} for result in results)
    asked = {f"{name}: {figure}" for name, figures in editing.BOUNDS.items() for figure in figures}
    assert asked == {result["name"] for result in results if result["bound"] is not None}
    by_name = {result["name"]: result for result in results}
    gradient = by_name["upper blocks alone, fine-tuning: difference of the gradient"]
    assert gradient["met"], "exact on any model"
    costs = [result for result in results if result["name"].endswith("cost") and result["bound"]]
    assert all(result["met"] == (result["value"] <= result["bound"]) for result in costs)

    def again(*_: Any) -> Callable[[], Any]:
        raise AssertionError("measured again")

    monkeypatch.setattr(editing.EditingBench, "edit", again)
    monkeypatch.setattr(editing, "find_golden_layer", again)
    assert editing.EditingBench(tiny_llm, options, tmp_path).results() == results
    assert all(json.loads(file.read_text(encoding="utf-8")) for file in tmp_path.glob("*.json"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not here")
def test_batches_agree_with_single_texts(tiny_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TOGETHER": slice(0, 4), "WHOLE": slice(0, 8), "TURNS": 1}.items():
        monkeypatch.setattr(evaluation, name, value)
    results = evaluation.EvaluationBench(
        tiny_llm, BenchmarkCommand(what="evaluation", data=str(SHARED)), tmp_path
    ).results()
    by_name = {result["name"]: result for result in results}
    asked = {f"{name}: {figure}" for name, figures in evaluation.BOUNDS.items() for figure in figures}
    assert asked == {name for name, result in by_name.items() if result["bound"] is not None}
    agreeing = [result for name, result in by_name.items() if name.endswith("that agree")]
    assert [result["value"] for result in agreeing] == [1, 1]
    assert by_name["in batches against one text at a time: speed-up"]["value"] > 0


def test_the_config_for_many_requests_is_what_is_measured() -> None:
    settings = yaml.safe_load((ROOT / "configs" / "many.yaml").read_text(encoding="utf-8"))["edit"]
    assert LocateOptions(**settings["locate"]) == editing.SMALL
    assert FinetuneOptions(**settings["finetune"]) == editing.FINISH
    assert settings["method"] == editing.BEST
    assert EditOptions().method == editing.BEST


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not here")
def test_attribution_is_measured(tiny_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SOME": slice(0, 4), "MANY": 2, "TURNS": 1, "TRIED": 3, "PROXY": 4}.items():
        monkeypatch.setattr(attribution, name, value)
    data = tmp_path / "data"
    data.mkdir()
    for file in attribution.SETS:
        (data / file).symlink_to(SHARED / file)
    (data / "enwiki_plain.txt").write_text("The river of Spain is long, and Norway lies by the sea.\n" * 40)
    results = attribution.AttributionBench(
        tiny_llm, BenchmarkCommand(what="attribution", data=str(data)), tmp_path / "out"
    ).results()
    by_name = {result["name"]: result for result in results}
    asked = {f"{name}: {figure}" for name, figures in attribution.BOUNDS.items() for figure in figures}
    assert asked == {name for name, result in by_name.items() if result["bound"] is not None}
    autograd = "LGA against autograd, one request at a time"
    assert by_name[f"{autograd}: largest relative difference of means"]["value"] < 1e-3
    assert by_name["LGA against a plain pass, same batches: memory"]["value"] > 1
    trials = "trial edits at every block, counterfact_easyedit"
    assert 0 <= by_name[f"{trials}: regret of LGA's block"]["value"] <= 1
    assert 0 < by_name[f"{trials}: golden layer over each request's own best"]["value"] <= 1
    assert 0 <= by_name[f"{trials}: block"]["value"] < len(tiny_llm.blocks)


def test_memory_is_what_lives_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(5):
            torch.zeros(1000, 1000)

    def together() -> None:
        kept = [torch.zeros(1000, 1000) for _ in range(5)]
        del kept

    assert attribution.most_alive(one_after_the_other) == pytest.approx(4e6, rel=0.01)
    assert attribution.most_alive(together) == pytest.approx(20e6, rel=0.01)


@pytest.mark.distributed
@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not here")
def test_two_processes_send_the_golden_layers_gradients_alone(
    tiny_llm: LLM, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ATTRIBUTED": 4, "TAUGHT": 3, "EPOCHS": 2, "PROCESSES": (2,)}.items():
        monkeypatch.setattr(distributed, name, value)
    options = BenchmarkCommand(what="distributed", data=str(SHARED), model=str(tiny_folder))
    bench = distributed.DistributedBench(tiny_llm, options, tmp_path)
    by_name = {result["name"]: result["value"] for result in bench.results()}
    for stage in ("attribution", "fine-tuning"):
        assert by_name[f"processes, {stage}: requests a second, 2 processes"] > 0
    assert by_name["processes, attribution: bytes a batch, 2 processes"] == 0  # devices need nothing of each other
    sent = by_name["processes, fine-tuning: bytes of gradients a step, sent by each of 2"]
    assert sent == by_name["processes, fine-tuning: bytes of the golden layer's trained weights"] == 4 * 3 * 32 * 48
    assert sent < by_name["processes, fine-tuning: bytes of all weights"] / 5
    assert 0 < by_name["processes, fine-tuning: bytes of anything else a step"] < 1000
    assert (bench.note is None) == torch.cuda.is_available()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not here")
def test_a_full_size_model_is_measured(tiny_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SOME": slice(0, 8), "TURNS": 1, "EPOCHS": 1}.items():
        monkeypatch.setattr(full_size, name, value)
    shape = full_size.LLAMA_3_8B | {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 5}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 2000}
    bench = distributed.DistributedBench(
        tiny_llm, BenchmarkCommand(what="distributed", data=str(SHARED)), tmp_path / "out"
    )
    for what in ("attribution", "fine-tuning"):
        figures = bench.full_size(what, shape, "cpu")
        assert {"requests a second", "tokens a second", "peak memory in GB"} <= set(figures)
        assert "model FLOPs utilisation" not in figures  # of a CPU, nobody knows
        if what == "attribution":
            assert figures["time over a plain pass"] > 1
            assert figures["planned memory over measured"] == pytest.approx(1, abs=0.2)
        else:  # what is kept of so small a model's requests lies in the same memory here
            assert 0.5 < figures["planned memory over measured"] < 1.2

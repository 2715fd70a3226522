"""Tasks of EleutherAI's harness, on the model in memory, before and after an update; what is wrong is one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from commanding import read_json
from conftest import refusal
from plain_loop import noise

from pipeline.cli import main
from pipeline.evaluation import harness
from pipeline.evaluation.evaluator import Evaluator, evaluate
from pipeline.evaluation.metrics import Estimate
from pipeline.model.activations import target_losses
from pipeline.model.llm import LLM
from pipeline.options.shared import EvaluationOptions
from pipeline.requests.rows import collate
from pipeline.requests.schema import EditRequest

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: [Lima, Oslo, Rome]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
RIGHT = {"before": [1.0, 0.0, 1.0, 1.0], "after": [1.0, 0.0, 0.0, 1.0]}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of lm-eval: it knows one task, and says what `RIGHT` has; gives what it was called with."""
    called: dict[str, Any] = {"sides": iter(RIGHT.values())}

    class TaskManager:
        all_tasks = ("capitals", "broken")

        def load(self, names: list[str]) -> Any:
            if names == ["broken"]:
                raise ConnectionError("no data\nhere")
            return {"tasks": {name: f"the task {name}" for name in names}}

    def simple_evaluate(model: Any, tasks: list[Any], limit: int | None) -> Any:
        right = next(called["sides"])
        called.update(tasks=tasks, limit=limit)
        samples = [
            {"doc_id": number, "filter": by, "acc": one, "words": (1.0, 2)}
            for number, one in enumerate(right)
            for by in ("none", "strict")
        ]
        means = {f"acc,{by}": sum(right) / 4 for by in ("none", "strict")}
        errors = {"acc_stderr,none": 0.1, "acc_stderr,strict": 0.2, "words_stderr,none": 0.3, "words,none": 7.0}
        unknown = {"other,none": 1.0, "other_stderr,none": "N/A", "alias": "capitals"}
        return {"results": {"capitals": means | errors | unknown}, "samples": {"capitals": samples}}

    def hflm(**how: Any) -> SimpleNamespace:
        how["tokenizer"].pad_token = "<end>"
        return SimpleNamespace(**how)

    for name, parts in {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": hflm},
    }.items():
        module = ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    return called


def test_figures_stand_beside_the_others(
    tiny_llm: LLM, requests: list[EditRequest], text_file: Path, stand_in: dict[str, Any]
) -> None:
    """A metric that is a mean over items, with the harness's own standard error; the difference is paired."""
    options = EvaluationOptions(text=str(text_file), generation="none", harness=["capitals"], harness_limit=4)
    padded = tiny_llm.tokenizer.pad_token
    found = evaluate(tiny_llm, requests, noise(tiny_llm, 1), options)
    assert found.after and (stand_in["tasks"], stand_in["limit"]) == (["the task capitals"], 4)
    assert tiny_llm.tokenizer.pad_token == padded, "the harness has a copy"
    names = {name: one for name, one in found.after.metrics.items() if name.startswith("harness")}
    assert names.keys() == {"harness/capitals acc", "harness/capitals acc strict"}
    own = found.before.metrics["harness/capitals acc"]
    assert own == Estimate(0.75, 4, pytest.approx(0.75 - 0.196, abs=1e-4), pytest.approx(0.75 + 0.196, abs=1e-4))
    moved = found.difference["harness/capitals acc"]
    assert moved.mean == -0.25 and moved.low < -0.25 < moved.high < 0.75


def test_a_command_shows_and_keeps_them(
    asked: list[str], ordinary_text: str, elsewhere: Path, stand_in: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--text", ordinary_text, "--generation", "none", "--harness", "capitals", "--output", "out"]
    assert main(["evaluate", *asked, *words]) == 0
    assert "harness/capitals acc strict" in capsys.readouterr().out
    assert read_json(elsewhere / "out" / "metrics.json")["before"]["harness/capitals acc"]["mean"] == 0.75
    assert "harness" not in (elsewhere / "out" / "values.csv").read_text()


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("capital", "harness: 'capital' is no task of lm-eval (did you mean capitals?)"),
        ("broken", "harness: broken: cannot be read: ConnectionError: no data here"),
    ],
)
def test_a_task_that_cannot_be_read_is_known_before_the_work(
    task: str, line: str, asked: list[str], refused: Callable[..., str], stand_in: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Evaluator, "measure", lambda *_: pytest.fail("it was measured"))
    assert line in refused("evaluate", *asked, "--harness", task, "--output", "out")


def test_a_task_that_fails(
    tiny_llm: LLM, requests: list[EditRequest], text_file: Path, stand_in: dict[str, Any]
) -> None:
    stand_in["sides"] = iter([RIGHT["before"], "what is no number"])
    options = EvaluationOptions(text=str(text_file), generation="none", harness=["capitals"])
    line = refusal(lambda: evaluate(tiny_llm, requests, noise(tiny_llm, 1), options))
    assert line.startswith("harness: cannot be run: TypeError: ")


def test_without_the_package(tiny_llm: LLM, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    line = refusal(lambda: evaluate(tiny_llm, requests, None, EvaluationOptions(harness=["arc_easy"])))
    assert "`lm-eval`" in line and "'.[harness]'" in line


def test_one_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "world_size", lambda: 2)
    assert "one device" in refusal(lambda: harness.load_tasks(["arc_easy"]))


def test_the_harness_itself_on_a_task_of_ones_own(
    tiny_llm: LLM, requests: list[EditRequest], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a YAML file with data beside it: what it counts is what single texts say; the model is left as it was."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    countries = ("Spain", "Norway", "Egypt", "Peru", "Japan", "Kenya")
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"country": one}) + "\n" for one in countries))
    (tmp_path / "capitals.yaml").write_text(TASK.format(file=tmp_path / "items.jsonl"))
    update = noise(tiny_llm, 1)
    options = EvaluationOptions(
        text=str(text_file), generation="none", fluency=0, harness=[str(tmp_path / "capitals.yaml")]
    )
    found = evaluate(tiny_llm, requests, update, options)
    again = evaluate(tiny_llm, requests, None, options)
    assert found.after and found.before.metrics["harness/capitals acc"].count == 6
    assert found.before.metrics["harness/capitals acc"] == again.before.metrics["harness/capitals acc"]
    for side, applied in ((found.before, False), (found.after, True)):
        with update.applied(tiny_llm) if applied else tiny_llm.frozen():
            right = [float(first_is_likeliest(tiny_llm, country)) for country in countries]
        assert [*side.values["harness/capitals acc"].values.values()] == right
    line = refusal(lambda: harness.load_tasks(["arc_eazy"]))
    assert "did you mean arc_easy?" in line


def first_is_likeliest(llm: LLM, country: str) -> bool:
    rows = llm.tokens.rows([(f"The capital of {country} is", one) for one in ("Lima", "Oslo", "Rome")])
    with llm.frozen(), torch.no_grad():
        means = [target_losses(llm.model, collate([row], llm.pad_token_id)).item() for row in rows]
    nats = [mean * len(row.targets) for mean, row in zip(means, rows, strict=True)]
    return nats.index(min(nats)) == 0

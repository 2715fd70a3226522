"""What watches a command: loggers, profilers and callbacks by flag, as Lightning has them."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml
from commanding import CPU, events, read_json
from lightning.pytorch.loggers import mlflow, wandb
from lightning_utilities.core.imports import RequirementCache

from pipeline.attribution.profile import GoldenProfile
from pipeline.cli import main
from pipeline.editing.update import WeightUpdate
from pipeline.reporting.dashboards import hparams_row, request_set

pytestmark = pytest.mark.usefixtures("elsewhere")

WATCH = """
from lightning.pytorch import Callback

class Watch(Callback):
    def __init__(self, file="seen.txt"):
        self.file = file

    def on_predict_end(self, trainer, module):
        with open(self.file, "a") as file:
            print("predicted by", type(module).__name__, file=file)

    def on_train_end(self, trainer, module):
        with open(self.file, "a") as file:
            print("trained", type(module).__name__, file=file)

class Another:
    pass
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, with a callback and with what is none."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "mypackage.py").write_text(WATCH)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "mypackage", raising=False)
    return "mypackage"


def test_curves_and_figures_go_to_every_logger(editing: list[str], elsewhere: Path) -> None:
    assert main([*editing, "--trainer.logger", "csv", "tensorboard", "--output", "out"]) == 0
    (file,) = (elsewhere / "out" / "csv").rglob("metrics.csv")
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    told = {name: float(row[name]) for row in rows for name in row if row[name]}
    board = events(elsewhere / "out")
    shown = {name: board.Scalars(name)[-1].value for name in board.Tags()["scalars"]}
    assert {"edit/loss_epoch", "evaluation_2_teacher-forced/1_rewrite"} <= shown.keys()
    assert {name: told[name] for name in shown} == pytest.approx(shown)
    assert yaml.safe_load(file.with_name("hparams.yaml").read_text())["method"] == "finetune"


def test_a_logger_alone(editing: list[str], elsewhere: Path) -> None:
    Path("config.yaml").write_text("trainer:\n  logger: csv\n")  # one is a list of it
    assert main([*editing, "--config", "config.yaml", "--output", "out"]) == 0
    assert not list((elsewhere / "out").glob("events.*"))
    assert (elsewhere / "out" / "metrics.png").is_file()
    assert yaml.safe_load((elsewhere / "out" / "options.yaml").read_text())["trainer"]["logger"] == ["csv"]


def modules(*names: str) -> dict[str, Any]:
    """Modules that take whatever is asked of them."""
    return {name: MagicMock() for name in names}


def test_weights_and_biases(editing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    there = modules("wandb", "wandb.sdk.lib", "wandb.wandb_run")
    there["wandb"].run = None
    there["wandb.sdk.lib"].RunDisabled = there["wandb.wandb_run"].Run = type("Run", (), {})
    for name, module in there.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", True)
    assert main([*editing, "--trainer.logger", "wandb", "--output", "out"]) == 0
    (begun,) = there["wandb"].init.call_args_list
    assert (begun.kwargs["name"], begun.kwargs["dir"], begun.kwargs["project"]) == ("out", "out", "golden-layers")
    run = there["wandb"].init()
    told = {name for call in run.log.call_args_list for name in call.args[0]}
    assert {"edit/loss_step", "evaluation_2_teacher-forced/1_rewrite"} <= told
    assert run.config.update.call_args.args[0]["block chosen by"] == "hand"


def test_mlflow(editing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("", ".tracking", ".entities", ".utils", ".utils.mlflow_tags", ".tracking.context.registry")
    there = modules(*(f"mlflow{name}" for name in names))
    there["mlflow.utils.mlflow_tags"].MLFLOW_RUN_NAME = "name"
    for name, module in there.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(mlflow, "_MLFLOW_AVAILABLE", True)
    monkeypatch.setattr(mlflow, "_get_resolve_tags", lambda: dict)
    assert main([*editing, "--trainer.logger", "mlflow", "--output", "out"]) == 0
    client = there["mlflow.tracking"].MlflowClient
    client.assert_called_once_with("file:out/mlruns")
    client().get_experiment_by_name.assert_called_once_with("golden-layers")
    assert client().create_run.call_args.kwargs["tags"] == {"name": "out"}
    metric = there["mlflow.entities"].Metric
    assert {"edit/loss_step", "evaluation_2_teacher-forced/1_rewrite"} <= {
        call.kwargs["key"] for call in metric.call_args_list
    }


@pytest.mark.parametrize(("name", "module"), [("wandb", wandb), ("mlflow", mlflow)])
def test_a_logger_that_is_not_installed_is_told(
    name: str, module: Any, editing: list[str], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, f"_{name.upper()}_AVAILABLE", RequirementCache(f"{name}>=999"))
    line = refused(*editing, "--trainer.logger", "csv", name, "--output", "out")
    assert f"trainer.logger: {name}: " in line and f"pip install -U '{name}>=999'" in line


def test_a_profile_of_each_stage(editing: list[str], elsewhere: Path) -> None:
    assert main([*editing, "--trainer.profiler", "simple", "--output", "out"]) == 0
    files = {file.name: file.read_text() for file in (elsewhere / "out" / "profile").iterdir()}
    assert {"fit-editing.txt", "predict-measuring_edited.txt"} <= files.keys()
    assert all("Profiler Report" in text for text in files.values())


@pytest.mark.parametrize(("kind", "found"), [("advanced", "*.txt"), ("pytorch", "*.pt.trace.json")])
def test_other_profilers(kind: str, found: str, asked: list[str], elsewhere: Path) -> None:
    assert main(["attribute", *asked, "--trainer.profiler", kind, "--output", "out"]) == 0
    assert [file for file in (elsewhere / "out" / "profile").glob(found) if file.stat().st_size > 100]


def test_callbacks_by_name(own_module: str, editing: list[str], elsewhere: Path) -> None:
    words = ["--trainer.callbacks", "LearningRateMonitor", f"{own_module}.Watch", "--output", "out"]
    assert main([*editing, *words]) == 0
    seen = (elsewhere / "seen.txt").read_text().splitlines()
    assert "trained FineTune" in seen and len([line for line in seen if line.startswith("predicted by")]) > 1
    assert [tag for tag in events(elsewhere / "out").Tags()["scalars"] if tag.startswith("lr-")]


def test_a_callback_with_arguments(own_module: str, asked: list[str], elsewhere: Path) -> None:
    watch = {"class_path": f"{own_module}.Watch", "init_args": {"file": "mine.txt"}}
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [watch]}}))
    assert main(["attribute", *asked, "--config", "config.yaml", "--output", "out"]) == 0
    assert (elsewhere / "mine.txt").read_text() == "predicted by Attribution\n"
    assert main(["attribute", "--config", "out/options.yaml", "--output", "again"]) == 0
    assert len((elsewhere / "mine.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("logger tensorbord", "trainer.logger: 'tensorbord' does not exist (did you mean 'tensorboard'?)"),
        ("logger csv csv", "trainer.logger: ['csv', 'csv'] is no list of at least one, and each once"),
        ("profiler sample", "trainer.profiler: 'sample' does not exist (did you mean 'simple'?)"),
        (
            "callbacks nowhere.Watch",
            "trainer.callbacks: nowhere.Watch: No module named 'nowhere'; expected such as",
        ),
        ("callbacks Watch", "trainer.callbacks: Watch: module 'lightning.pytorch.callbacks' has no attribute"),
        ("callbacks mypackage.Another", "trainer.callbacks: mypackage.Another: it is no Callback of lightning"),
        ("callbacks EarlyStopping", "missing 1 required positional argument: 'monitor'"),
        ("callbacks [[1]]", "trainer.callbacks: expected a list of names, or of {class_path: NAME"),
        ("callbacks [{path: Watch}]", "trainer.callbacks: {'path': 'Watch'}: "),
    ],
)
def test_what_does_not_exist_is_told_before_the_work(
    words: str, told: str, own_module: str, editing: list[str], refused: Callable[..., str]
) -> None:
    flag, *values = words.split(" ", maxsplit=1 if "[" in words else -1)
    assert told in refused(*editing, f"--trainer.{flag}", *values, "--output", "out")


def test_commands_without_an_output_folder_have_none_of_it(asked: list[str], refused: Callable[..., str]) -> None:
    assert "flag --trainer.logger does not exist" in refused("generate", *asked, "--trainer.logger", "csv")


def row(options: dict[str, Any], profile: GoldenProfile | None, layers: list[int]) -> dict[str, str]:
    return hparams_row("tiny", 4, options, WeightUpdate("tiny", "", "memit", layers, {}), profile)


def profile_of(method: str = "lga", scope: str = "mlp", golden: tuple[int, ...] = (3,)) -> GoldenProfile:
    rest = [block for block in (1, 2, 0, 3) if block not in golden]
    return GoldenProfile(
        model="tiny", fingerprint="", method=method, scope=scope, order="magnitude", scores=[0.0] * 4, fences=None,
        excluded=[], ranking=[*golden, *rest], raw_ranking=[*golden, *rest], golden_layers=list(golden),
        request_set="demo", requests=4, seconds=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "profile", "layers", "block", "chosen_by"),
    [
        ({}, profile_of(), [3], "3", "lga, magnitude"),
        ({"layers": [3]}, profile_of(), [3], "3", "hand"),  # named, though the profile says the same
        ({"edit": {"layers": [2]}}, profile_of(), [2], "2", "hand"),
        ({}, profile_of(), [1], "1", "lga, magnitude"),  # nothing is heard from block 3: the next one
        ({}, profile_of(), [0, 3], "3", "lga, magnitude"),  # on top of an edit of block 0
        ({}, profile_of(golden=(3, 1)), [1, 3], "3, 1", "lga, magnitude"),
        ({}, profile_of("causal_tracing", ""), [3], "3", "causal_tracing"),
        ({}, profile_of("fixed", ""), [3], "3", "fixed"),
        ({}, None, [2], "2", "not known"),  # an update is measured
    ],
)
def test_who_chose_the_block(
    options: dict[str, Any], profile: GoldenProfile | None, layers: list[int], block: str, chosen_by: str
) -> None:
    found = row(options, profile, layers)
    assert (found["block"], found["block chosen by"]) == (block, chosen_by)
    assert found["requests"] == "4", "whole, and not 4.0000"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"requests": "demo", "limit": 16, "offset": 0}, "demo, limit 16"),
        ({"requests": "facts.jsonl", "offset": 8, "limit": None}, "facts.jsonl, offset 8"),
        ({"requests": "missed", "after": "runs/edit"}, "missed of runs/edit"),
        ({"requests": "demo", "fact": ["A | A is | B"], "after": "runs/edit"}, "A | A is | B"),
        ({}, "demo"),
    ],
)
def test_what_requests_are_called(options: dict[str, Any], name: str) -> None:
    assert request_set(options) == name


def test_an_update_that_is_measured_is_named(
    made: SimpleNamespace, model: list[str], ordinary_text: str, elsewhere: Path
) -> None:
    words = ["--limit", "6", "--update", str(made.edited), "--text", ordinary_text, *CPU, "--trainer.logger", "csv"]
    assert main(["evaluate", *model, *words, "--output", "out"]) == 0
    (file,) = (elsewhere / "out" / "csv").rglob("hparams.yaml")
    assert yaml.safe_load(file.read_text())["method"] == "finetune"
    assert not (elsewhere / "out" / "report.md").exists()
    assert read_json(elsewhere / "out" / "metrics.json")["requests"] == 6

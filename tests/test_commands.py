"""Every command end to end on a tiny model: what it writes can be read back, and what fails leaves nothing.

Commands run through `pipeline.cli.main`, in this process but for a full disk and a real Ctrl-C.
"""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tiny
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from test_cli import one_line
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pipeline import commands
from pipeline.attribution import GoldenProfile
from pipeline.cli import main
from pipeline.editing import FineTune, WeightUpdate
from pipeline.model import load_model
from pipeline.reporting import RunLog
from pipeline.reporting.dashboards import CHIEF, tag
from pipeline.reporting.groups import label

ROOT = Path(__file__).parent.parent
CPU = ("--trainer.accelerator", "cpu")
GENERATION = tuple(
    f"{kind}_{name}"
    for kind in ("generation", "rephrase", "portability", "distractor")
    for name in ("exact_match", "containment")
)
PROBABILITY = tuple(
    f"{name}_{what}" for name in ("efficacy", "paraphrase", "neighbourhood") for what in ("success", "magnitude")
)
METRICS = (
    *GENERATION,
    *("rewrite", "rephrase", "locality", "portability"),
    *PROBABILITY,
    *("rome_score", "perplexity"),
)
HPARAMS = ("experiment", "session_start_info", "session_end_info")
DIVERGENCES = ("locality_kl", "text_kl")  # to the base, so not before
PNG = b"\x89PNG\r\n\x1a\n"
PROFILE_FILES = {
    "golden_profile.json",
    "scores.safetensors",
    "scores.png",
    "stability.png",
    "agreement.png",
    "options.yaml",
    "events",
}
FINETUNE = ("--method", "finetune", "--finetune.whiten", "0", "--finetune.epochs")
RUN_FINETUNE = ("--edit.method", "finetune", "--edit.finetune.whiten", "0", "--edit.finetune.epochs")
TEXT = "The path along the marsh is best walked in the hour after sunrise. " * 8


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A short ordinary text: perplexity on the one that comes with the project takes most of a command's time."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a test, empty, beside the request file."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def other_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tiny Llama, of the same sizes."""
    folder = tmp_path_factory.mktemp("models") / "other-llama"
    make_tiny("llama", tokenizer, seed=1).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tiny_folder: Path, text_file: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders that `attribute` and then `edit` by its profile wrote, on six of the demo requests."""
    place = tmp_path_factory.mktemp("made")
    common = ["--model", str(tiny_folder), "--limit", "6", *CPU]
    profile, edited = place / "profile", place / "edited"
    assert main(["attribute", *common, "--output", str(profile)]) == 0
    by = ["--profile", str(profile), *FINETUNE, "3", "--finetune.learning_rate", "0.2"]
    assert main(["edit", *common, *by, "--evaluation.text", text_file, "--output", str(edited)]) == 0
    return SimpleNamespace(profile=profile, edited=edited)


@pytest.fixture
def model(tiny_folder: Path) -> list[str]:
    return ["--model", str(tiny_folder)]


@pytest.fixture
def asked(model: list[str], request_file: Path) -> list[str]:
    """The flags that most commands share."""
    return [*model, "--requests", str(request_file), *CPU]


@pytest.fixture
def editing(asked: list[str], text_file: str) -> list[str]:
    """`edit` of one block in one epoch, but for its output."""
    return ["edit", *asked, "--layers", "1", *FINETUNE, "1", "--evaluation.text", text_file]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> Callable[..., str]:
    """Run a command that must fail without changing a file; returns its one line."""

    def run(*words: str) -> str:
        before = contents(elsewhere)
        capsys.readouterr()
        assert main(words) in (1, 2)
        assert contents(elsewhere) == before
        return one_line(capsys.readouterr().err)

    return run


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file's bytes and every folder's name."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def read_json(file: Path) -> Any:
    """JSON without the NaN and Infinity that Python would let through."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{file}: {constant}")

    return json.loads(file.read_text(), parse_constant=refuse)


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "scalars": 0}).Reload()


def texts(board: EventAccumulator) -> dict[str, str]:
    """What the page of texts shows, by tag."""
    shown = [each for each in board.Tags()["tensors"] if each.endswith("/text_summary")]
    return {
        each.removesuffix("/text_summary"): board.Tensors(each)[0].tensor_proto.string_val[0].decode()
        for each in shown
    }


def names_in(folder: Path) -> set[str]:
    """Names of the files in a folder, TensorBoard's without their numbers."""
    return {"events" if path.name.startswith("events.") else path.name for path in folder.iterdir()}


# what commands write


def test_attribute_writes_the_profile(made: SimpleNamespace, tiny_folder: Path) -> None:
    assert names_in(made.profile) == PROFILE_FILES
    profile = read_json(made.profile / "golden_profile.json")
    assert (profile["model"], profile["method"], profile["scope"]) == (str(tiny_folder), "lga", "mlp")
    assert (profile["requests"], profile["request_set"]) == (6, "demo")
    assert len(profile["scores"]) == 4
    assert sorted(profile["ranking"] + profile["excluded"]) == [0, 1, 2, 3]
    assert profile["golden_layers"] == profile["ranking"][:1]
    assert profile["seconds"] > 0


def test_attribute_shows_its_scores_in_tensorboard(made: SimpleNamespace) -> None:
    board = events(made.profile)
    scores = GoldenProfile.load(made.profile).scores
    assert [point.step for point in board.Scalars("attribution/score_by_block")] == [0, 1, 2, 3]
    assert [point.value for point in board.Scalars("attribution/score_by_block")] == pytest.approx(scores, rel=1e-6)
    assert board.Images("attribution/1_scores")[0].encoded_image_string.startswith(PNG)
    assert board.Tags()["images"] == ["attribution/1_scores", "attribution/2_stability", "attribution/3_agreement"]


def test_edit_writes_update_metrics_and_report(made: SimpleNamespace, tiny_folder: Path) -> None:
    files = {
        "update.safetensors",
        "update.json",
        "metrics.json",
        "metrics.png",
        "values.csv",
        "report.md",
        "options.yaml",
        "events",
    }
    assert names_in(made.edited) - {"scores.png", "stability.png"} == files
    (layer,) = GoldenProfile.load(made.profile).golden_layers
    update = read_json(made.edited / "update.json")
    assert (update["model"], update["method"], update["layers"]) == (str(tiny_folder), "finetune", [layer])
    assert len(update["requests"]) == 6
    tensors = load_file(made.edited / "update.safetensors")
    projections = ("gate_proj", "up_proj", "down_proj")
    assert set(tensors) == {f"model.layers.{layer}.mlp.{name}.weight" for name in projections}
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == update["tensors"]


def test_metrics_hold_mean_count_and_interval(made: SimpleNamespace) -> None:
    metrics = read_json(made.edited / "metrics.json")
    assert metrics["requests"] == 6
    for side in ("before", "after"):
        assert tuple(name for name in metrics[side] if name not in DIVERGENCES) == METRICS
        for name, figure in metrics[side].items():
            assert set(figure) == {"mean", "count", "low", "high"}
            assert figure["low"] <= figure["mean"] <= figure["high"]
            assert figure["count"] == 6 or name in ("perplexity", "text_kl")
    assert set(metrics["after"]) - set(metrics["before"]) == set(DIVERGENCES)
    for name, figure in metrics["difference"].items():
        assert figure["mean"] == pytest.approx(metrics["after"][name]["mean"] - metrics["before"][name]["mean"])
        assert figure["low"] <= figure["mean"] <= figure["high"]
    assert set(metrics["difference"]) == set(METRICS)
    assert set(metrics["weights"]) == set(load_file(made.edited / "update.safetensors"))
    assert all(0 < change < 10 for change in metrics["weights"].values())
    assert metrics["before"]["locality"]["mean"] == 1
    assert metrics["before"]["perplexity"]["mean"] != metrics["after"]["perplexity"]["mean"]


def test_values_hold_every_request(made: SimpleNamespace) -> None:
    with (made.edited / "values.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = read_json(made.edited / "metrics.json")
    assert [row["id"] for row in rows] == [r["id"] for r in read_json(made.edited / "update.json")["requests"]]
    for side in ("before", "after"):
        for name in set(METRICS) - {"perplexity", "rome_score"}:
            values = [float(row[f"{name} {side}"]) for row in rows if row[f"{name} {side}"]]
            assert sum(values) / len(values) == pytest.approx(metrics[side][name]["mean"], rel=1e-4, abs=1e-6), name
        assert all(row[f"generation answer {side}"] for row in rows)
        assert any(" | " in row[f"rephrase answer {side}"] for row in rows)
    assert "locality_kl after" in rows[0] and "locality_kl before" not in rows[0]


def test_the_terminal_shows_the_models_own_answers_first(
    model: list[str], made: SimpleNamespace, text_file: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")  # the smallest terminal
    words = ["--limit", "6", "--update", str(made.edited), "--text", text_file, *CPU]
    capsys.readouterr()
    assert main(["evaluate", *model, *words, "--output", "out"]) == 0
    table, _, below = capsys.readouterr().out.partition("largest change")
    lines = table.splitlines()
    groups = ["by generation", "teacher-forced", "by probability", "damage"]
    assert [line.strip() for line in lines if line.strip() in groups] == groups
    assert max(map(len, lines)) <= 80 and len(lines) < 24
    assert "%" in below


def test_report_says_what_where_and_how_well(made: SimpleNamespace, tiny_folder: Path) -> None:
    report = (made.edited / "report.md").read_text()
    (layer,) = GoldenProfile.load(made.profile).golden_layers
    assert f"in block {layer} alone" in report
    assert "The capital of Germany is | London" in report
    assert f"export --model {tiny_folder} --update {made.edited}" in report
    rows = [line for line in report.splitlines() if line.startswith("| ")]
    assert [name for name in METRICS if not any(row.startswith(f"| {label(name)} |") for row in rows)] == []
    linked = {part.partition(")")[0] for part in report.split("](")[1:]}
    assert linked <= names_in(made.edited) | {"scores.png", "stability.png"}  # these lie with the profile


def test_report_shows_only_pictures_that_exist(made: SimpleNamespace) -> None:
    linked = {part.partition(")")[0] for part in (made.edited / "report.md").read_text().split("](")[1:]}
    assert linked <= names_in(made.edited)


def test_pictures_are_png(made: SimpleNamespace) -> None:
    for file in (made.profile / "scores.png", made.edited / "metrics.png"):
        assert file.read_bytes().startswith(PNG)
        assert len(file.read_bytes()) > 5000


def test_edit_shows_curves_and_answers_in_tensorboard(made: SimpleNamespace) -> None:
    board = events(made.edited)
    metrics = read_json(made.edited / "metrics.json")
    assert len(board.Scalars("edit/loss_step")) == 3  # six requests in one batch, three epochs
    assert len(board.Scalars("edit/loss_epoch")) == len(board.Scalars("edit/accuracy")) == 3
    losses = [point.value for point in board.Scalars("edit/loss_epoch")]
    assert losses[0] > losses[-1]
    for name in METRICS:
        points = board.Scalars(tag(name))
        assert [point.step for point in points] == [0, 1]
        expected = [metrics[side][name]["mean"] for side in ("before", "after")]
        assert [point.value for point in points] == pytest.approx(expected, rel=1e-6)
    (report,) = texts(board).values()
    assert "Edit of" in report and "The capital of Germany is" in report and "perplexity" in report
    assert ".png" not in report  # pictures have a page of their own
    assert "evaluation/before_and_after" in board.Tags()["images"]


def test_tensorboard_holds_everything_once_in_the_order_of_reading(made: SimpleNamespace) -> None:
    board = events(made.edited)
    tags = board.Tags()["scalars"]
    for each in tags:
        steps = [point.step for point in board.Scalars(each)]
        assert len(set(steps)) == len(steps) > 0, each
    assert "epoch" not in tags and not [each for each in tags if each.startswith("final")]
    assert all(len(board.Images(each)) == 1 for each in board.Tags()["images"])
    groups = list(dict.fromkeys(each.partition("/")[0] for each in sorted(tags)))
    assert groups == [
        *("attribution", "edit", "evaluation_1_by_generation", "evaluation_2_teacher-forced"),
        *("evaluation_3_by_probability", "evaluation_4_damage"),
    ]
    forced = [each.partition("/")[2] for each in sorted(tags) if each.startswith(groups[3])]
    assert forced == ["1_rewrite", "2_rephrase", "3_locality", "4_portability"]


def test_tensorboard_compares_runs_by_method_and_block(made: SimpleNamespace) -> None:
    board = events(made.edited)
    found = {key: board.summary_metadata[f"_hparams_/{key}"].plugin_data.content for key in HPARAMS}
    experiment = HParamsPluginData.FromString(found["experiment"]).experiment
    settings = {
        info.display_name: info.name for info in sorted(experiment.hparam_infos, key=lambda info: info.name)
    }
    assert list(settings)[:4] == ["method", "block", "requests", "block chosen by"]
    tags = board.Tags()["scalars"]
    assert {info.name.tag for info in experiment.metric_infos} <= set(tags)
    assert [info.display_name for info in experiment.metric_infos][:3] == [
        "generation exact match",
        "rewrite",
        "rephrase",
    ]
    started = HParamsPluginData.FromString(found["session_start_info"]).session_start_info.hparams
    row = {name: started[key] for name, key in settings.items() if key in started}
    assert row["method"].string_value == "finetune"
    assert [row["block"].number_value] == GoldenProfile.load(made.profile).golden_layers
    assert row["block chosen by"].string_value == "lga, signed"
    assert [row[name].number_value for name in ("requests", "epochs", "learning rate")] == [6, 3, 0.2]
    assert "rank" not in row  # which fine-tuning does not look at


def test_one_chart_holds_rewrite_rephrase_and_locality(made: SimpleNamespace) -> None:
    board = events(made.edited)
    layout = Layout.FromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag for category in layout.category for chart in category.chart}
    tags = board.Tags()["scalars"]
    for title, patterns in charts.items():
        assert all(len([each for each in tags if re.match(pattern, each)]) == 1 for pattern in patterns), title
    assert charts["rewrite, rephrase, locality"] == [f"{re.escape(tag(name))}$" for name in CHIEF]


def test_run_finds_edits_and_proves(asked: list[str], text_file: str, elsewhere: Path) -> None:
    words = [*asked, *RUN_FINETUNE, "1", "--evaluation.text", text_file, "--output", "out"]
    assert main(words) == 0  # no command: `run`
    out = elsewhere / "out"
    expected = PROFILE_FILES - {"options.yaml", "events"} | {"update.safetensors", "update.json"}
    assert expected | {
        "metrics.json",
        "metrics.png",
        "values.csv",
        "report.md",
        "options.yaml",
        "events",
    } == names_in(out)
    proxy, edits = GoldenProfile.load(out).requests, len(WeightUpdate.load(out).requests)
    assert proxy + edits == 7
    assert edits == read_json(out / "metrics.json")["requests"]
    assert WeightUpdate.load(out).layers == GoldenProfile.load(out).golden_layers


def test_run_with_a_profile_edits_every_request(
    asked: list[str], made: SimpleNamespace, text_file: str, elsewhere: Path
) -> None:
    words = ["--profile", str(made.profile), *RUN_FINETUNE, "1", "--evaluation.text", text_file]
    assert main(["run", *asked, *words, "--output", "out"]) == 0
    assert len(WeightUpdate.load(elsewhere / "out").requests) == 7
    assert GoldenProfile.load(elsewhere / "out") == GoldenProfile.load(made.profile)


@pytest.mark.parametrize("name", ["folder", "file"])
def test_a_profile_found_once_serves_later_edits(
    name: str, asked: list[str], made: SimpleNamespace, text_file: str, elsewhere: Path
) -> None:
    profile = made.profile if name == "folder" else made.profile / "golden_profile.json"
    words = ["--profile", str(profile), *FINETUNE, "1", "--evaluation.text", text_file]
    assert main(["edit", *asked, *words, "--output", "out"]) == 0
    assert WeightUpdate.load(elsewhere / "out").layers == GoldenProfile.load(made.profile).golden_layers


def test_the_options_of_a_folder_make_it_again(made: SimpleNamespace, elsewhere: Path) -> None:
    assert main(["edit", "--config", str(made.edited / "options.yaml"), "--output", "again"]) == 0
    options = [
        yaml.safe_load((folder / "options.yaml").read_text()) for folder in (made.edited, elsewhere / "again")
    ]
    assert options[0] | {"output": "again"} == options[1]
    tensors = [load_file(folder / "update.safetensors") for folder in (made.edited, elsewhere / "again")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert read_json(made.edited / "metrics.json") == read_json(elsewhere / "again" / "metrics.json")


def test_evaluate_without_an_update(asked: list[str], text_file: str, elsewhere: Path) -> None:
    assert main(["evaluate", *asked, "--text", text_file, "--output", "out"]) == 0
    assert names_in(elsewhere / "out") == {"metrics.json", "metrics.png", "values.csv", "options.yaml", "events"}
    metrics = read_json(elsewhere / "out" / "metrics.json")
    assert set(metrics) == {"model", "requests", "before"}
    assert [metrics["before"][name]["count"] for name in METRICS[:-1]] == [7] * (len(METRICS) - 1)
    assert [point.step for point in events(elsewhere / "out").Scalars(tag("rewrite"))] == [0]
    assert list(texts(events(elsewhere / "out"))) == ["evaluation/metrics", "evaluation/answers"]


def test_evaluate_measures_what_edit_measured(
    model: list[str], made: SimpleNamespace, text_file: str, elsewhere: Path
) -> None:
    words = ["--limit", "6", "--update", str(made.edited), "--text", text_file, *CPU]
    assert main(["evaluate", *model, *words, "--output", "out"]) == 0
    assert read_json(elsewhere / "out" / "metrics.json") == read_json(made.edited / "metrics.json")


def test_export_merged_is_the_model_that_was_measured(
    model: list[str], tiny_folder: Path, made: SimpleNamespace, elsewhere: Path
) -> None:
    assert main(["export", *model, "--update", str(made.edited), "--output", "out"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(elsewhere / "out", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(elsewhere / "out")("The capital of Spain is", return_tensors="pt").input_ids
    base = load_model(str(tiny_folder))
    with torch.no_grad():
        before = base.model.eval()(ids).logits
        with WeightUpdate.load(made.edited).applied(base):
            after = base.model(ids).logits
        exported = plain(ids).logits
    assert torch.equal(exported, after)
    assert not torch.allclose(exported, before)


def test_an_exported_update_serves_evaluate(
    model: list[str], made: SimpleNamespace, text_file: str, elsewhere: Path
) -> None:
    assert main(["export", *model, "--update", str(made.edited), "--kind", "update", "--output", "small"]) == 0
    assert names_in(elsewhere / "small") == {"update.safetensors", "update.json", "options.yaml"}
    words = ["--limit", "6", "--update", "small", "--text", text_file, *CPU]
    assert main(["evaluate", *model, *words, "--output", "out"]) == 0
    assert read_json(elsewhere / "out" / "metrics.json") == read_json(made.edited / "metrics.json")


def test_generate_shows_base_and_edited_side_by_side(
    model: list[str], made: SimpleNamespace, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--update", str(made.edited), "--prompt", "The capital of Spain is", "Cairo", "--max_new_tokens", "4"]
    assert main(["generate", *model, *words, *CPU]) == 0
    shown = capsys.readouterr().out
    assert "base" in shown and "edited" in shown
    assert "The capital of Spain is" in " ".join(shown.split()) and "Cairo" in shown
    assert not list(elsewhere.iterdir())


def test_generate_takes_the_prompts_of_requests(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *asked, "--limit", "2", "--max_new_tokens", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Spain" in shown and "Norway" in shown and "Portugal" not in shown
    assert "edited" not in shown


def test_the_default_output_is_a_folder_under_runs(asked: list[str], elsewhere: Path) -> None:
    assert main(["attribute", *asked]) == 0
    (folder,) = (elsewhere / "runs").iterdir()
    assert folder.name.startswith("attribute-")
    assert (folder / "golden_profile.json").is_file()


# wrong inputs, end to end

REQUEST = '{"prompt": "The capital of Spain is", "new_answer": "Lima", "old_answer": "Madrid"}\n'


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no such file"]),
        ("", ["no records"]),
        ("\n\n", ["no records"]),
        (REQUEST + '{"prompt": "The\n', ["line 2", "malformed JSON"]),
        (REQUEST + '{"prompt": "The capital of Peru is"}\n', ["line 2", "new_answer", "target_new"]),
        (REQUEST + '{"prompt": "x", "new_answer": "y", "answer": "z"}\n', ["line 2", "'answer'", "old_answer"]),
        (REQUEST + '{"prompt": "x", "new_answer": 7}\n', ["line 2", "'new_answer'", "string"]),
        (REQUEST + "[]\n", ["line 2", "object", "list"]),
        (f"[{REQUEST}, 5]", ["record 1", "object", "int"]),
        (f"[{REQUEST}", ["malformed JSON"]),
        ("\udcff\udcfe", ["byte 0", "UTF-8"]),
    ],
)
@pytest.mark.parametrize("command", ["attribute", "evaluate"])
def test_broken_requests(
    command: str,
    content: str | None,
    parts: list[str],
    model: list[str],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    file = tmp_path / "broken.jsonl"
    if content is not None:
        file.write_bytes(content.encode(errors="surrogateescape"))
    line = refused(command, *model, "--requests", str(file), "--output", "out")
    assert [part for part in [str(file), *parts] if part not in line] == []


@pytest.mark.parametrize("command", ["run", "attribute", "edit", "evaluate", "generate"])
def test_an_offset_behind_the_last_request(command: str, asked: list[str], refused: Callable[..., str]) -> None:
    line = refused(command, *asked, "--offset", "7")
    assert "offset: 7" in line and "7 records" in line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--profile", "--layers", "run.py attribute"]),
        (["--layers", "4"], ["layers: 4", "0 to 3"]),
        (["--layers", "-1"], ["layers: -1", "0 to 3"]),
        (["--layers", "1", "9"], ["layers: 9", "0 to 3"]),
        (["--profile", "missing.json"], ["missing.json", "no such file", "run.py attribute"]),
        (["--method", "romee", "--layers", "1"], ["'romee'", "finetune"]),
        (["--layers", "1", "--trainer.accelerator", "npu"], ["trainer", "npu", "cpu"]),
        (["--layers", "1", "--trainer.strategy", "dpp"], ["trainer", "dpp", "ddp"]),
        (["--layers", "1", "--trainer.devices", "0"], ["trainer", "devices=0"]),
        pytest.param(
            ["--layers", "1", "--trainer.devices", "two"],
            ["trainer", "devices"],
        ),
    ],
    ids=" ".join,
)
def test_wrong_places_to_edit(
    words: list[str], parts: list[str], asked: list[str], refused: Callable[..., str]
) -> None:
    line = refused("edit", *asked, *words, "--output", "out")
    assert [part for part in parts if part not in line] == []


def test_an_unknown_attribution_method(asked: list[str], refused: Callable[..., str]) -> None:
    line = refused("attribute", *asked, "--method", "lgaa", "--output", "out")
    assert "'lgaa'" in line and "lga" in line


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda profile: "{", "JSON"),
        (lambda profile: "[]", "no golden profile"),
        (lambda profile: json.dumps(profile | {"scores": "high"}), "scores"),
        (lambda profile: json.dumps({k: v for k, v in profile.items() if k != "fingerprint"}), "fingerprint"),
        (lambda profile: json.dumps(profile | {"golden_layers": [9]}), "0 to 3"),
        pytest.param(
            lambda profile: json.dumps(profile | {"golden_layers": []}),
            "golden_layers",
        ),
    ],
    ids=["cut", "list", "type", "missing", "layer", "empty"],
)
def test_a_broken_profile(
    change: Callable[[Any], str], part: str, asked: list[str], made: SimpleNamespace, tmp_path: Path,
    refused: Callable[..., str],
) -> None:  # fmt: skip
    file = tmp_path / "profile.json"
    file.write_text(change(read_json(made.profile / "golden_profile.json")))
    assert part in refused("edit", *asked, "--profile", str(file), "--output", "out")


@pytest.mark.parametrize("command", ["edit", "run"])
def test_a_profile_of_another_model(
    command: str, other_folder: Path, tiny_folder: Path, made: SimpleNamespace, refused: Callable[..., str]
) -> None:
    line = refused(command, "--model", str(other_folder), "--profile", str(made.profile), "--output", "out")
    assert "profile" in line and str(tiny_folder) in line and str(other_folder) in line


@pytest.mark.parametrize(
    "words",
    [["evaluate", "--limit", "2"], ["export"], ["export", "--kind", "update"], ["generate", "--prompt", "A"]],
    ids=" ".join,
)
def test_an_update_of_another_model(
    words: list[str], other_folder: Path, tiny_folder: Path, made: SimpleNamespace, refused: Callable[..., str]
) -> None:
    output = [] if words[0] == "generate" else ["--output", "out"]
    line = refused(*words, "--model", str(other_folder), "--update", str(made.edited), *output)
    assert "update" in line and str(tiny_folder) in line and str(other_folder) in line


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda folder: flip(folder / "update.safetensors"), "SHA-256"),
        (lambda folder: (folder / "update.safetensors").unlink(), "holds no update.safetensors"),
        (lambda folder: (folder / "update.json").unlink(), "holds no update.json"),
        (lambda folder: (folder / "update.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "update.json").write_text("[]"), "damaged"),
        (lambda folder: shutil.rmtree(folder), "holds no update.json"),
    ],
    ids=["flipped bit", "no tensors", "no description", "cut description", "list", "nothing"],
)
@pytest.mark.parametrize("command", ["evaluate", "export", "generate"])
def test_a_damaged_update(
    command: str, damage: Callable[[Path], Any], part: str, model: list[str], made: SimpleNamespace, tmp_path: Path,
    refused: Callable[..., str],
) -> None:  # fmt: skip
    folder = tmp_path / "damaged"
    shutil.copytree(made.edited, folder)
    damage(folder)
    output = [] if command == "generate" else ["--output", "out"]
    line = refused(command, *model, "--update", str(folder), *output)
    assert str(folder) in line and part in line


# models


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "nothing.gguf", "no such model"])
def test_an_unknown_model(name: str, request_file: Path, refused: Callable[..., str]) -> None:
    assert name in refused("attribute", "--model", name, "--requests", str(request_file), "--output", "out")


def test_a_name_that_no_hub_knows(
    request_file: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused("attribute", "--model", "nobody/nothing", "--requests", str(request_file), "--output", "out")
    assert "nobody/nothing" in line and "smollm2" in line


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:3000])


def drop(file: Path) -> None:
    """Leave one block's weight out of a checkpoint."""
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def widen(file: Path) -> None:
    file.write_text(file.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: cut(folder / "model.safetensors"), "cannot be loaded"),
        (lambda folder: widen(folder / "config.json"), "cannot be loaded"),
        (lambda folder: drop(folder / "model.safetensors"), "layers.1.mlp.down_proj"),
    ],
    ids=["no config", "cut config", "no weights", "no tokenizer", "cut weights", "other sizes", "missing weight"],
)
def test_a_damaged_model(
    damage: Callable[[Path], Any], part: str, tiny_folder: Path, request_file: Path, tmp_path: Path,
    refused: Callable[..., str],
) -> None:  # fmt: skip
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    damage(folder)
    words = ["--model", str(folder), "--requests", str(request_file), "--output", "out"]
    line = refused("attribute", *words)
    assert str(folder) in line and part in line


# texts that do not fit, losses that are no numbers


@pytest.mark.parametrize(
    "words", [["attribute"], ["edit", "--layers", "1"], ["evaluate"], ["generate"]], ids=lambda words: words[0]
)
def test_a_prompt_longer_than_the_context(
    words: list[str], model: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = tmp_path / "long.jsonl"
    record = {"prompt": "Spain " * 200 + "is", "subject": "Spain", "new_answer": "Lima", "old_answer": "Rome"}
    file.write_text(json.dumps(record))
    output = [] if words[0] == "generate" else ["--output", "out"]
    line = refused(*words, *model, "--requests", str(file), *output)
    assert "Spain Spain" in line and "tokens" in line and "128" in line


def test_an_answer_longer_than_the_context(asked: list[str], refused: Callable[..., str]) -> None:
    line = refused("generate", *asked, "--max_new_tokens", "125")
    assert "tokens" in line and "128" in line


@pytest.mark.parametrize("words", [["--evaluation.text", "missing.txt"], ["--evaluation.max_new_tokens", "125"]])
def test_what_evaluation_cannot_do_is_found_before_the_edit(
    words: list[str], editing: list[str], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(FineTune, "on_train_start", lambda self: steps.append(1))
    refused(*editing, *words, "--output", "out")
    assert not steps


def test_a_loss_that_is_no_number(editing: list[str], refused: Callable[..., str]) -> None:
    words = [*FINETUNE, "3", "--finetune.learning_rate", "1e30", "--finetune.batch_size", "2"]
    line = refused(*editing, *words, "--output", "out")
    assert "not a number in step 1" in line and "--finetune.learning_rate" in line
    assert line.count("capital-") == 2


def test_a_loss_that_is_no_number_after_the_last_step(editing: list[str], refused: Callable[..., str]) -> None:
    assert "not a number" in refused(*editing, "--finetune.learning_rate", "1e30", "--output", "out")


# output folders


def test_an_output_folder_that_holds_something(
    asked: list[str], elsewhere: Path, refused: Callable[..., str]
) -> None:
    (elsewhere / "out").mkdir()
    (elsewhere / "out" / "thesis.txt").write_text("years of work")
    assert "out" in (line := refused("attribute", *asked, "--output", "out")) and "--overwrite" in line
    assert "not written by" in refused("attribute", *asked, "--output", "out", "--overwrite")


def test_overwrite_replaces_what_we_wrote(asked: list[str], elsewhere: Path) -> None:
    assert main(["attribute", *asked, "--output", "out", "--limit", "3"]) == 0
    (elsewhere / "out" / "leftover").touch()
    assert main(["attribute", *asked, "--output", "out", "--overwrite"]) == 0
    assert GoldenProfile.load(elsewhere / "out").requests == 7
    assert names_in(elsewhere / "out") == PROFILE_FILES
    assert [path.name for path in elsewhere.iterdir()] == ["out"]


@pytest.mark.parametrize("failure", [["--top_k", "9"], ["--model", "./nothing"], ["--requests", "nothing"]])
def test_a_failed_overwrite_leaves_the_old_content(
    failure: list[str], asked: list[str], refused: Callable[..., str]
) -> None:
    assert main(["attribute", *asked, "--output", "out"]) == 0
    refused("attribute", *asked, *failure, "--output", "out", "--overwrite")


def test_an_output_path_that_is_a_file(asked: list[str], elsewhere: Path, refused: Callable[..., str]) -> None:
    (elsewhere / "file").write_text("x")
    assert "file" in refused("attribute", *asked, "--output", "file")
    assert "file" in refused("attribute", *asked, "--output", "file", "--overwrite")


def test_an_output_path_below_a_file(asked: list[str], elsewhere: Path, refused: Callable[..., str]) -> None:
    (elsewhere / "file").write_text("x")
    assert "file" in refused("attribute", *asked, "--output", "file/out")


def test_parents_made_for_an_output_folder_go_with_it(asked: list[str], refused: Callable[..., str]) -> None:
    refused("attribute", *asked, "--output", "new/deep/out", "--top_k", "9")


def test_an_empty_output_folder_stays(asked: list[str], elsewhere: Path, refused: Callable[..., str]) -> None:
    (elsewhere / "out").mkdir()
    refused("attribute", *asked, "--output", "out", "--top_k", "9")


def test_overwriting_through_a_link(asked: list[str], elsewhere: Path) -> None:
    assert main(["attribute", *asked, "--output", "real", "--limit", "3"]) == 0
    (elsewhere / "link").symlink_to("real")
    assert main(["attribute", *asked, "--output", "link", "--overwrite"]) == 0
    assert GoldenProfile.load(elsewhere / "real").requests == 7
    assert (elsewhere / "link").is_symlink()


def test_the_working_folder_is_not_replaced(asked: list[str], refused: Callable[..., str]) -> None:
    assert main(["attribute", *asked, "--output", ".", "--limit", "3"]) == 0
    assert "output: ." in refused("attribute", *asked, "--output", ".", "--overwrite")


def test_what_a_killed_command_set_aside(asked: list[str], elsewhere: Path, refused: Callable[..., str]) -> None:
    assert main(["attribute", *asked, "--output", "out"]) == 0
    shutil.copytree(elsewhere / "out", elsewhere / ".out.replaced")
    assert ".out.replaced" in refused("attribute", *asked, "--output", "out", "--overwrite")


# full disks and interrupts


def test_no_room_for_the_update(
    editing: list[str], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    line = refused(*editing, "--output", "out")
    assert "out" in line and "MB" in line and "free" in line


def test_no_room_for_the_exported_model(
    model: list[str], made: SimpleNamespace, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    line = refused("export", *model, "--update", str(made.edited), "--output", "out")
    assert "out" in line and "free" in line


@pytest.mark.parametrize("command", ["edit", "export"])
def test_a_disk_that_fills_up(
    command: str, editing: list[str], model: list[str], made: SimpleNamespace, elsewhere: Path
) -> None:
    """Files of more than 12 kB cannot be written: the update's tensors are larger."""
    words = editing if command == "edit" else ["export", *model, "--update", str(made.edited)]
    told = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words, "--output", "out"],
        capture_output=True, text=True, timeout=120, cwd=elsewhere, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000)),
    )  # fmt: skip
    assert told.returncode == 1
    assert "no room left on the disk" in one_line(told.stderr)
    assert not list(elsewhere.iterdir())


@pytest.fixture
def keeps_interrupts() -> Iterator[None]:
    """Lightning stops listening to Ctrl-C once it got one; the tests after this one should not."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("moment", ["loading", "training"])
@pytest.mark.usefixtures("keeps_interrupts")
def test_an_interrupt_leaves_nothing(
    moment: str, editing: list[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    places: dict[str, tuple[Any, str]] = {
        "loading": (commands, "load"),
        "training": (FineTune, "training_step"),
    }
    monkeypatch.setattr(*places[moment], interrupt)
    assert main([*editing, "--output", "out"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not list(elsewhere.iterdir())


@pytest.mark.usefixtures("keeps_interrupts")
def test_an_interrupt_while_measuring_keeps_the_finished_update(
    editing: list[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "keep_metrics", interrupt)
    assert main([*editing, "--output", "out"]) == 130
    kept = {"options.yaml", "update.json", "update.safetensors"}
    assert names_in(elsewhere / "out") == {*kept, "events", "unfinished"}, "what was read is kept, too"
    assert WeightUpdate.load(elsewhere / "out").layers
    assert "kept in out: update.json, update.safetensors" in capsys.readouterr().out


def test_ctrl_c_in_the_middle_of_an_edit(editing: list[str], elsewhere: Path) -> None:
    words = [*editing, *FINETUNE, "1000000", "--output", "out"]
    command = [sys.executable, str(ROOT / "run.py"), *words]
    with subprocess.Popen(
        command, cwd=elsewhere, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 90
        while not list(elsewhere.glob("out/events*")) and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        try:
            _, shown = process.communicate(timeout=25)
        finally:
            process.kill()
    assert process.returncode == 130
    assert shown.splitlines()[-1] == "interrupted"
    assert "Traceback" not in shown
    assert names_in(elsewhere / "out") == {"options.yaml", "events", "unfinished"}, "to go on from"


@pytest.mark.usefixtures("keeps_interrupts")
def test_an_interrupted_run_keeps_its_profile(
    asked: list[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FineTune, "training_step", interrupt)
    assert main(["run", *asked, *RUN_FINETUNE, "1", "--output", "out"]) == 130
    assert GoldenProfile.load(elsewhere / "out").requests
    assert {"golden_profile.json", "options.yaml", "scores.png"} <= names_in(elsewhere / "out")
    assert not {"update.json", "update.safetensors", "metrics.json"} & names_in(elsewhere / "out")


@pytest.mark.usefixtures("keeps_interrupts")
@pytest.mark.parametrize("command", ["edit", "run"])
def test_resume_goes_on_where_it_stopped(
    command: str, asked: list[str], text_file: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = {
        "edit": ["edit", *asked, "--layers", "1", *FINETUNE, "4"],
        "run": ["run", *asked, *RUN_FINETUNE, "4"],
    }[command] + ["--evaluation.text", text_file, "--output"]
    step, left = FineTune.training_step, iter(range(2))

    @wraps(step)
    def stopping(self: FineTune, lesson: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(self, lesson)

    with monkeypatch.context() as patched:
        patched.setattr(FineTune, "training_step", stopping)
        assert main([*words, "out"]) == 130
    assert "the same command with --output out --resume goes on" in " ".join(capsys.readouterr().out.split())
    assert "unfinished" in names_in(elsewhere / "out")
    assert main([*words, "out", "--resume"]) == 0
    assert main([*words, "whole"]) == 0
    assert names_in(elsewhere / "out") == names_in(elsewhere / "whole")
    for name in ("update.safetensors", "metrics.json"):
        assert (elsewhere / "out" / name).read_bytes() == (elsewhere / "whole" / name).read_bytes()


def test_resume_needs_what_was_interrupted(
    editing: list[str], made: SimpleNamespace, elsewhere: Path, refused: Callable[..., str]
) -> None:
    assert "name the interrupted command's folder with --output" in refused(*editing, "--resume")
    (elsewhere / "foreign").mkdir()
    (elsewhere / "foreign" / "notes.txt").touch()
    assert "holds no options.yaml" in refused(*editing, "--resume", "--output", "foreign")
    shutil.copytree(made.edited, elsewhere / "other")
    message = refused(*editing, "--resume", "--output", "other")
    assert "was started with another finetune, layers, limit, profile, requests" in message


def test_edits_stack(editing: list[str], asked: list[str], text_file: str, elsewhere: Path) -> None:
    assert main([*editing, "--limit", "3", "--output", "first"]) == 0
    assert main([*editing, "--offset", "3", "--after", "first", "--output", "both"]) == 0
    both = WeightUpdate.load(elsewhere / "both")
    assert [request.id for request in both.requests] == [f"capital-{number}" for number in range(7)]
    assert read_json(elsewhere / "both" / "metrics.json")["requests"] == 7


def test_an_earlier_update_of_another_model(
    editing: list[str], made: SimpleNamespace, other_folder: Path, refused: Callable[..., str]
) -> None:
    words = [*editing, "--model", str(other_folder), "--after", str(made.edited)]
    assert "update: made for model" in refused(*words)


def test_requests_that_contradict_each_other(
    editing: list[str], request_file: Path, refused: Callable[..., str], elsewhere: Path
) -> None:
    lines = request_file.read_text().splitlines()
    other = json.loads(lines[1]) | {"id": "other", "new_answer": "Quito"}
    request_file.write_text("\n".join([*lines, json.dumps(other)]) + "\n")
    message = refused(*editing)
    assert "capital-1 ('Nairobi and more') and other ('Quito')" in message
    assert "--last_wins" in message
    assert main([*editing, "--last_wins", "--output", "out"]) == 0
    learnt = [request.id for request in WeightUpdate.load(elsewhere / "out").requests]
    assert learnt == ["capital-0", *(f"capital-{number}" for number in range(2, 7)), "other"]


def test_export_adapter(editing: list[str], elsewhere: Path, model: list[str]) -> None:
    assert main([*editing, "--method", "lora", "--lora.whiten", "0", "--lora.epochs", "1", "--output", "one"]) == 0
    assert main(["export", *model, "--update", "one", "--kind", "adapter", "--output", "adapter"]) == 0
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names_in(elsewhere / "adapter")
    assert main([*editing, "--output", "two"]) == 0
    assert main(["export", *model, "--update", "two", "--kind", "adapter", "--output", "of-any"]) == 0
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names_in(elsewhere / "of-any")

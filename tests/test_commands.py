"""Every command end to end on a tiny model: what it writes can be read back.

Commands run through `pipeline.cli.main`, in this process.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from commanding import (
    CPU,
    DIVERGENCES,
    FINETUNE,
    HPARAMS,
    METRICS,
    PNG,
    PROFILE_FILES,
    RUN_FINETUNE,
    events,
    names_in,
    read_json,
    texts,
)
from safetensors.torch import load_file
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.attribution.profile import GoldenProfile
from pipeline.cli import main
from pipeline.editing.update import WeightUpdate
from pipeline.model.loading import load_model
from pipeline.reporting.dashboards import tag
from pipeline.reporting.tables import label

pytestmark = pytest.mark.usefixtures("elsewhere")


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
    assert not board.Tags()["scalars"], "blocks are no steps of a curve"
    assert board.Images("attribution/1_scores")[0].encoded_image_string.startswith(PNG)
    assert board.Tags()["images"] == ["attribution/1_scores", "attribution/2_stability"]


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
    model: list[str], made: SimpleNamespace, ordinary_text: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")  # the smallest terminal
    words = ["--limit", "6", "--update", str(made.edited), "--text", ordinary_text, *CPU]
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
    after = {tag(name): one["mean"] for name, one in metrics["after"].items()}
    ratio = after.pop(tag("perplexity")) / metrics["before"]["perplexity"]["mean"]
    for name, expected in (after | {f"{tag('perplexity')}_ratio": ratio}).items():
        (point,) = board.Scalars(name)  # no curve: before and after are bars in a figure
        assert point.value == pytest.approx(expected, rel=1e-6), name
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
        *("edit", "evaluation_1_by_generation", "evaluation_2_teacher-forced"),
        *("evaluation_3_by_probability", "evaluation_4_damage"),
    ]
    forced = [each.partition("/")[2] for each in sorted(tags) if each.startswith(groups[2])]
    assert forced == ["1_rewrite", "2_rephrase", "3_locality", "4_portability"]


def test_tensorboard_compares_runs_by_method_and_block(made: SimpleNamespace) -> None:
    board = events(made.edited)
    found = {key: board.summary_metadata[f"_hparams_/{key}"].plugin_data.content for key in HPARAMS}
    experiment = HParamsPluginData.FromString(found["experiment"]).experiment
    columns = ["block", "block chosen by", "method", "model", "request set"]  # of which TensorBoard shows five
    assert sorted(info.name for info in experiment.hparam_infos)[:5] == columns
    tags = [info.name.tag for info in experiment.metric_infos]
    assert set(tags) <= set(board.Tags()["scalars"])
    assert {tag("generation_exact_match"), tag("rewrite"), tag("rephrase")} <= set(tags)
    row = HParamsPluginData.FromString(found["session_start_info"]).session_start_info.hparams
    assert row["method"].string_value == "finetune"
    assert [row["block"].string_value] == [*map(str, GoldenProfile.load(made.profile).golden_layers)]
    assert row["block chosen by"].string_value == "lga, magnitude"
    assert (row["requests"].string_value, row["request set"].string_value) == ("6", "demo, limit 6")
    assert "epochs 3" in row["settings"].string_value and "learning_rate 0.2" in row["settings"].string_value


def test_run_finds_edits_and_proves(asked: list[str], ordinary_text: str, elsewhere: Path) -> None:
    words = [*asked, *RUN_FINETUNE, "1", "--evaluation.text", ordinary_text, "--output", "out"]
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
    asked: list[str], made: SimpleNamespace, ordinary_text: str, elsewhere: Path
) -> None:
    words = ["--profile", str(made.profile), *RUN_FINETUNE, "1", "--evaluation.text", ordinary_text]
    assert main(["run", *asked, *words, "--output", "out"]) == 0
    assert len(WeightUpdate.load(elsewhere / "out").requests) == 7
    assert GoldenProfile.load(elsewhere / "out") == GoldenProfile.load(made.profile)


@pytest.mark.parametrize("name", ["folder", "file"])
def test_a_profile_found_once_serves_later_edits(
    name: str, asked: list[str], made: SimpleNamespace, ordinary_text: str, elsewhere: Path
) -> None:
    profile = made.profile if name == "folder" else made.profile / "golden_profile.json"
    words = ["--profile", str(profile), *FINETUNE, "1", "--evaluation.text", ordinary_text]
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


def test_evaluate_without_an_update(asked: list[str], ordinary_text: str, elsewhere: Path) -> None:
    assert main(["evaluate", *asked, "--text", ordinary_text, "--output", "out"]) == 0
    assert names_in(elsewhere / "out") == {"metrics.json", "metrics.png", "values.csv", "options.yaml", "events"}
    metrics = read_json(elsewhere / "out" / "metrics.json")
    assert set(metrics) == {"model", "requests", "before"}
    assert {metrics["before"][name]["count"] for name in METRICS if name != "perplexity"} == {7}
    assert [point.step for point in events(elsewhere / "out").Scalars(tag("rewrite"))] == [0]
    assert list(texts(events(elsewhere / "out"))) == ["evaluation/metrics", "evaluation/answers"]


def test_evaluate_measures_what_edit_measured(
    model: list[str], made: SimpleNamespace, ordinary_text: str, elsewhere: Path
) -> None:
    words = ["--limit", "6", "--update", str(made.edited), "--text", ordinary_text, *CPU]
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
    model: list[str], made: SimpleNamespace, ordinary_text: str, elsewhere: Path
) -> None:
    assert main(["export", *model, "--update", str(made.edited), "--kind", "update", "--output", "small"]) == 0
    assert names_in(elsewhere / "small") == {"update.safetensors", "update.json", "options.yaml", "README.md"}
    words = ["--limit", "6", "--update", "small", "--text", ordinary_text, *CPU]
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


def test_edits_stack(editing: list[str], asked: list[str], ordinary_text: str, elsewhere: Path) -> None:
    assert main([*editing, "--limit", "3", "--output", "first"]) == 0
    assert main([*editing, "--offset", "3", "--after", "first", "--output", "both"]) == 0
    both = WeightUpdate.load(elsewhere / "both")
    assert [request.id for request in both.requests] == [f"capital-{number}" for number in range(7)]
    assert read_json(elsewhere / "both" / "metrics.json")["requests"] == 7


def test_what_an_edit_missed_is_edited_again(
    editing: list[str], elsewhere: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*editing, "--limit", "3", "--output", "first"]) == 0
    with (elsewhere / "first" / "values.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.endswith("_containment after")]
    assert "generation_containment after" in names and "rephrase_containment after" in names
    for place, row in enumerate(rows):  # as if the second alone were missed, when asked in other words
        row.update({name: "0.5" if (place, name) == (1, "rephrase_containment after") else "1" for name in names})
    write_csv(elsewhere / "first" / "values.csv", rows)
    again = [*editing, "--requests", "missed", "--after", "first"]
    assert main([*again, "--output", "second"]) == 0
    learnt = [request.id for request in WeightUpdate.load(elsewhere / "second").requests]
    assert learnt == ["capital-0", "capital-2", "capital-1"], "the others stay, and what is edited again is last"
    write_csv(elsewhere / "first" / "values.csv", [row | dict.fromkeys(names, "1") for row in rows])
    assert refused(*again, "--output", "third") == "error: requests: missed: none; all 3 of first hold"
    write_csv(elsewhere / "first" / "values.csv", [{"id": row["id"]} for row in rows])  # as by --generation none
    assert "first/values.csv does not tell (no answers in it)" in refused(*again, "--output", "third")
    write_csv(elsewhere / "first" / "values.csv", rows[:2])
    assert "first/values.csv does not tell" in refused(*again, "--output", "third")
    (elsewhere / "first" / "values.csv").unlink()
    assert "first/values.csv does not tell" in refused(*again, "--output", "third")


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [*rows[0]])
        table.writeheader()
        table.writerows(rows)


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
    assert "last_wins" in message
    assert main([*editing, "--last_wins", "--output", "out"]) == 0
    learnt = [request.id for request in WeightUpdate.load(elsewhere / "out").requests]
    assert learnt == ["capital-0", *(f"capital-{number}" for number in range(2, 7)), "other"]


def test_export_adapter(editing: list[str], elsewhere: Path, model: list[str]) -> None:
    assert (
        main([*editing, "--method", "lora", "--expert.whiten", "0", "--expert.epochs", "1", "--output", "one"]) == 0
    )
    assert main(["export", *model, "--update", "one", "--kind", "adapter", "--output", "adapter"]) == 0
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names_in(elsewhere / "adapter")
    assert main([*editing, "--output", "two"]) == 0
    assert main(["export", *model, "--update", "two", "--kind", "adapter", "--output", "of-any"]) == 0
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names_in(elsewhere / "of-any")

"""What a command cannot work with ends in one line that names it, and no file is changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commanding import FINETUNE, read_json
from safetensors.torch import load_file, save_file

from pipeline.cli import main
from pipeline.editing.finetune import FineTune
from pipeline.model import loading
from pipeline.model.loading import load_model

pytestmark = pytest.mark.usefixtures("elsewhere")


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
        (REQUEST + '{"prompt": "x", "new_answer": 7}\n', ["line 2", "'new_answer'", "expected a text, found int"]),
        (REQUEST + "[]\n", ["line 2", "object", "list"]),
        (f"[{REQUEST}, 5]", ["record 1", "object", "int"]),
        (f"[{REQUEST}", ["malformed JSON"]),
        ("\udcff\udcfe", ["UTF-8"]),
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
        (lambda folder: widen(folder / "config.json"), "its config asks for (500, 64)"),
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


@pytest.mark.parametrize("words", [["--evaluation.text", "missing.txt"], ["--evaluation.max_new_tokens", "0"]])
def test_what_evaluation_cannot_do_is_found_before_the_edit(
    words: list[str], editing: list[str], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(FineTune, "on_train_start", lambda self: steps.append(1))
    refused(*editing, *words, "--output", "out")
    assert not steps


def test_a_loss_that_is_no_number(editing: list[str], refused: Callable[..., str]) -> None:
    words = [*FINETUNE, "3", "--expert.learning_rate", "1e30", "--expert.batch_size", "2"]
    line = refused(*editing, *words, "--output", "out")
    assert "not a number in step 1" in line and "expert.learning_rate" in line
    assert line.count("capital-") == 2


def test_a_loss_that_is_no_number_after_the_last_step(editing: list[str], refused: Callable[..., str]) -> None:
    assert "not a number" in refused(*editing, "--expert.learning_rate", "1e30", "--output", "out")


def test_more_processes_than_the_cores_run(
    asked: list[str], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    told = refused("attribute", *asked, "--trainer.devices", "5", "--trainer.accelerator", "cpu")
    assert told == "error: trainer.devices: 5 processes; the 2 cores of this machine run 4 at most"


def test_what_was_made_for_another_model_is_refused_before_weights_are_read(
    editing: list[str],
    asked: list[str],
    other_folder: Path,
    tiny_folder: Path,
    refused: Callable[..., str],
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = [str(other_folder) if word == str(tiny_folder) else word for word in editing]
    assert main([*other, "--output", "made"]) == 0
    assert main(["attribute", *other[1 : len(asked) + 1], "--output", "found"]) == 0
    load_model(str(tiny_folder))  # its fingerprint is known from here on
    monkeypatch.setattr(loading, "_weights", None)
    assert "profile: made for model" in refused("edit", *asked, "--profile", "found", "--output", "out")
    assert "update: made for model" in refused("evaluate", *asked, "--update", "made", "--output", "out")
    assert "update: made for model" in refused("export", "--model", str(tiny_folder), "--update", "made")
    assert "layers: 9 is not a block" in refused("edit", *asked, "--layers", "9", "--output", "out")

"""The command line: help, flags, switches, lists and YAML reach the options; a wrong one is named in one line.

No command's work is done here: the function behind the command is replaced by one that keeps its options.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from lightning_utilities.core.rank_zero import rank_zero_only
from pages import PAGES

from pipeline import UserError, errors
from pipeline.cli import main, show_warning
from pipeline.editing.editor import METHODS
from pipeline.editing.method import settings_of
from pipeline.errors import Note
from pipeline.options.base import as_config
from pipeline.options.commands import RunCommand
from pipeline.options.editing import EditOptions
from pipeline.parsing import flags_of, parse
from pipeline.requests.schema import EditRequest
from pipeline.running import launch
from pipeline.running.interrupts import Interrupted
from pipeline.table import COMMANDS, EXAMPLES, SHOWN, Command

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PROGRESS = re.compile(r": \d+/\d+ (in|after|when it stopped,) ")
STORE = ["--store", "DIR"]
REQUIRED = {  # flags without which a command cannot be asked for its config
    "export": ["--update", "DIR"],
    "submit": [*STORE, "--file", "FILE"],
    "update": STORE,
    "schedule": [*STORE, "--every", "6h"],
    "publish": [*STORE, "--to", "http://localhost:8000"],
    "serve": STORE,
    "history": STORE,
    "show": [*STORE, "--version", "1"],
    "diff": [*STORE, "--older", "1", "--newer", "2"],
    "rollback": [*STORE, "--version", "1"],
    "verify": STORE,
    "retract": [*STORE, "--request", "1"],
    "prune": STORE,
}


pytestmark = pytest.mark.usefixtures("elsewhere")


def one_line(captured_error: str) -> str:
    """The one line of an error stream, progress bars aside."""
    lines = [line for line in captured_error.splitlines() if line.strip() and not PROGRESS.search(line)]
    assert len(lines) == 1, captured_error
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options that commands were called with, in place of their work."""
    calls: list[Any] = []
    monkeypatch.setattr(Command, "call", lambda _, options: calls.append(options))
    monkeypatch.setattr(launch, "may_start_others", lambda _: False)
    return calls


@pytest.fixture
def refused(received: list[Any], capsys: pytest.CaptureFixture[str], elsewhere: Path) -> Callable[..., str]:
    """Run a command line that must fail before any work; returns its one line."""

    def run(*words: str) -> str:
        assert main(words) in (1, 2)
        assert not received
        assert not list(elsewhere.iterdir())
        return one_line(capsys.readouterr().err)

    return run


def config_file(tmp_path: Path, text: str) -> str:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    return str(file)


# help and --print_config


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_names_every_command(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[-len(COMMANDS) :]] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help-all"]) == 0
    text = capsys.readouterr().out
    missing = [flag for flag in flags_of(name) if not re.search(rf"--{re.escape(flag)}\b", text)]
    assert not missing
    assert COMMANDS[name].help in " ".join(text.split())


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_short_help_fits_a_screen(
    name: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an option is for takes two lines at most."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert sum(1 + len(line) // (columns + 1) for line in lines) <= 50
    assert lines[-1] == f"--help-all shows all {len(flags_of(name))} options."
    assert COMMANDS[name].help in " ".join(text.split())
    options = re.split(r"^  --", text.rpartition("\n\n")[0], flags=re.MULTILINE)[1:]
    assert [one.split()[0] for one in options] == SHOWN[name].split()
    for option in options:
        assert len(option.splitlines()) <= 2, option


@pytest.mark.parametrize("name", COMMANDS)
def test_short_help_shows_what_there_is(name: str) -> None:
    shown, known = SHOWN[name].split(), flags_of(name)
    assert 1 <= len(shown) <= 12 and len({*shown}) == len(shown)
    assert {*shown} <= {*known}
    assert {path for path, flag in known.items() if flag.default is MISSING} <= {*shown}, (
        "what it cannot do without"
    )
    assert {*COMMANDS[name].words} <= {*shown}


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_are_understood(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand in the docs as well, whose commands are run."""
    assert main([name, "--help"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  python run.py ")]
    assert 1 <= len(printed) <= 2
    monkeypatch.chdir(ROOT)
    for line in printed:
        words = shlex.split(line)[2:]
        assert words[0] == name and isinstance(parse(name, words[1:]), COMMANDS[name].options)
        assert any(line.strip() in text.splitlines() for text in PAGES.values()), line


def test_every_command_has_its_help() -> None:
    assert list(SHOWN) == list(EXAMPLES) == list(COMMANDS)


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("run", "run [REQUESTS] [--config FILE] [--FLAG VALUE ...]"),
        ("diff", "diff OLDER NEWER --store STORE [--config FILE] [--FLAG VALUE ...]"),
        ("export", "export [VERSION] [--config FILE] [--FLAG VALUE ...]"),
    ],
)
def test_usage_is_what_a_command_cannot_do_without(
    name: str, usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help-all"]) == 0
    whole = capsys.readouterr().out
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert whole.startswith(text.partition("\n\n")[0])
    assert text.startswith(f"usage: python run.py {usage}\n\n")
    assert "Path to a configuration file" not in text


@pytest.mark.parametrize("words", [["--help"], ["edit", "--help-all"], ["edit", "--print_config"]], ids=" ".join)
def test_who_reads_no_more_of_it_ends_it_quietly(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    told = subprocess.run([sys.executable, "run.py", *words], cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (told.returncode, told.stderr) == (1, b"")


@pytest.mark.parametrize("words", [["--help"], ["attribute", "--help"], ["run", "--help-all"]], ids=" ".join)
def test_help_imports_no_heavy_library(words: list[str]) -> None:
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "run.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in told.stderr.splitlines()}
    assert told.returncode == 0
    assert "yaml" in imported
    assert not imported & {"torch", "lightning", "transformers", "matplotlib", "tensorboard"}


@pytest.mark.parametrize("name", COMMANDS)
def test_printed_config_is_the_defaults_and_can_be_passed_again(
    name: str, tmp_path: Path, received: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = REQUIRED.get(name, [])
    assert main([name, *words, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert not received
    assert main([name, *words]) == 0
    assert main([name, "--config", config_file(tmp_path, printed)]) == 0
    assert received[0] == received[1]
    assert yaml.safe_load(printed) == as_config(received[0])


# what reaches the options


def test_without_a_command_the_main_job_runs(received: list[Any]) -> None:
    assert main([]) == 0
    assert main(["--limit", "3"]) == 0
    assert [type(options) for options in received] == [RunCommand, RunCommand]
    assert received[1].limit == 3


@pytest.mark.parametrize(
    "flags_first",
    [
        False,
        pytest.param(
            True,
        ),
    ],
)
def test_flags_override_a_config(flags_first: bool, tmp_path: Path, received: list[Any]) -> None:
    config = ["--config", config_file(tmp_path, "top_k: 3\nscope: down\nrequests: mine.jsonl\n")]
    flags = ["--top_k", "2", "--requests=other.jsonl"]
    assert main(["attribute", *(flags + config if flags_first else config + flags)]) == 0
    assert (received[0].top_k, received[0].scope, received[0].requests) == (2, "down", "other.jsonl")


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["attribute", "--top-k", "2"], "top_k", 2),
        (["attribute", "--top-k=2"], "top_k", 2),
        (["attribute", "--old-answers", "model"], "old_answers", "model"),
        (["attribute", "--overwrite"], "overwrite", True),
        (["attribute", "--overwrite", "--top_k", "2"], "overwrite", True),
        (["attribute", "--overwrite=false"], "overwrite", False),
        (["attribute", "--overwrite", "false"], "overwrite", False),
        (["attribute", "--trainer.devices", "0,1"], "trainer.devices", "0,1"),
        (["run", "--edit.method", "finetune", "--edit.expert", '{"epochs": 2}'], "edit.expert", {"epochs": 2}),
        (["run", "--edit.method=lora", "--edit.expert.batch-size", "2"], "edit.expert", {"batch_size": 2}),
        (["edit", "--expert.learning_rate", "1e-3", "--method=finetune"], "expert", {"learning_rate": 1e-3}),
        (["update", *STORE, "--edit.expert", '{"steps": null}'], "edit.expert", {"steps": None}),
        (["attribute", "--expert", '{"fences": 0}'], "fences", 0.0),
        (["edit", "--layers", "1"], "layers", [1]),
        (["edit", "--layers", "1", "2", "--limit", "3"], "layers", [1, 2]),
        (["edit", "--layers", "1,2"], "layers", [1, 2]),
        (["edit", "--layers", "[1, 2]"], "layers", [1, 2]),
        (["generate", "--prompt", "The capital: of", "B's"], "prompt", ["The capital: of", "B's"]),
        (["generate", "--prompt", "12"], "prompt", ["12"]),
        (["evaluate", "--update", "DIR"], "update", "DIR"),
        (["export", "--update", "DIR"], "update", "DIR"),
        (["run", "--limit", "null"], "limit", None),
        (["edit", "--fact", "a | b", "--limit", "3", "--fact=c"], "fact", ["a | b", "c"]),
        (["edit", "--fact", "null", "--fact", "d"], "fact", ["null", "d"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_flags_reach_the_options(words: list[str], field: str, value: object, received: list[Any]) -> None:
    assert main(words) == 0
    found = received[0]
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("name", ["run", "attribute", "edit", "evaluate", "requests", "generate"])
def test_a_file_of_requests_is_a_word(name: str, tmp_path: Path, received: list[Any]) -> None:
    config = ["--config", config_file(tmp_path, "requests: theirs.jsonl\nlimit: 3\n")]
    assert main([name, "mine.jsonl", *config]) == 0
    assert main([name, "--requests", "mine.jsonl", *config]) == 0
    assert received[0].requests == "mine.jsonl" and received[0].limit == 3
    assert received[0] == received[1]


def test_files_of_a_study_are_words(tmp_path: Path, received: list[Any]) -> None:
    config = ["--config", config_file(tmp_path, "requests: [theirs.jsonl]\nlimit: 3\n")]
    assert main(["study", "mine.jsonl", *config]) == 0
    assert main(["study", "mine.jsonl", "yours.csv", *config]) == 0
    assert main(["study", *config]) == 0
    assert [found.requests for found in received] == [["mine.jsonl"], ["mine.jsonl", "yours.csv"], ["theirs.jsonl"]]


def test_prompts_beside_a_file_are_refused(refused: Callable[..., str]) -> None:
    line = refused("generate", "mine.jsonl", "--prompt", "The capital of Peru is")
    assert line == "error: prompt: stands in place of a file; leave out --prompt, or --requests and --fields"


@pytest.mark.parametrize(
    "devices",
    [
        "'1'",
        pytest.param(
            "1",
        ),
    ],
)
def test_yaml_gives_the_number_of_devices(devices: str, tmp_path: Path, received: list[Any]) -> None:
    assert main(["attribute", "--config", config_file(tmp_path, f"trainer:\n  devices: {devices}\n")]) == 0
    assert str(received[0].trainer.devices) == "1"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_config_parses(file: Path, received: list[Any]) -> None:
    command = {"update": ["update", *STORE], "study": ["study"]}.get(file.stem, ["run"])
    assert main([*command, "--config", str(file)]) == 0
    content = yaml.safe_load(file.read_text())
    assert differences(content, as_config(received[0])) == []
    settings_of(received[0].edit)


def differences(part: Mapping[str, Any], whole: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what `part` says otherwise than `whole`."""
    names = []
    for key, value in part.items():
        if isinstance(value, Mapping):
            names += differences(value, whole[key], f"{prefix}{key}.")
        elif value != whole[key]:
            names.append(f"{prefix}{key}")
    return names


def test_the_default_config_says_what_the_options_say() -> None:
    content = yaml.safe_load((ROOT / "configs" / "default.yaml").read_text())
    assert content.pop("proxy_fraction") == 0.9  # as the file itself says, for it edits the demo
    assert differences(content, as_config(RunCommand())) == []


def test_every_command_has_its_function() -> None:
    for command in COMMANDS.values():
        module, _, name = command.function.partition(":")
        assert callable(getattr(import_module(f"pipeline.{module}"), name))


@pytest.mark.parametrize("method", METHODS)
def test_an_experts_settings_are_the_methods(method: str) -> None:
    options, other = (
        EditOptions(method=method, expert={"batch_size": "3"}),
        "lora" if method == "finetune" else "finetune",
    )
    assert settings_of(options).batch_size == 3
    assert options.by(other).expert == {}, "which has its own"
    assert options.by("memit").expert == (options.expert if method in ("auto", "memit") else {}), (
        "auto's are memit's"
    )


@pytest.mark.parametrize(
    ("method", "expert", "parts"),
    [
        ("memit", {"step_": 2}, ["expert: 'step_' is no setting of memit", "mean step?"]),
        ("memit", {"epochs": 2}, ["expert: 'epochs' is no setting of memit", "there is batch"]),
        ("memit", {"batch_size": "x"}, ["expert.batch_size: expected a whole number, found x"]),
        ("finetune", {"scope": "attention"}, ["expert.scope", "'attention'", "down, experts, mlp, shared"]),
        ("finetune", {"depths": "deep"}, ["expert.depths: expected a list of numbers", "found deep"]),
        ("finetune", {"epochs": 0}, ["expert.epochs", "0", "1"]),
        ("finetune", {"learning_rate": 0}, ["expert.learning_rate", "0"]),
        ("finetune", {"learning_rate": float("inf")}, ["expert.learning_rate", "inf"]),
        ("finetune", {"learnt": -1}, ["expert.learnt", "-1"]),
        ("lora", {"rank": 0}, ["expert.rank", "0", "1"]),
    ],
)
def test_a_wrong_setting_is_named_before_any_work(
    method: str, expert: dict[str, Any], parts: list[str], elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [(name, value)] = expert.items()
    assert main(["edit", "--method", method, f"--expert.{name}", str(value).replace("inf", ".inf")]) == 1
    line = one_line(capsys.readouterr().err)
    assert [part for part in parts if part not in line] == []
    assert not list(elsewhere.iterdir())


def test_what_is_no_flag_is_no_option_of_a_command() -> None:
    assert not {"edit.locate.steps", "edit.locate", "attribution.fences", "trainer.micro_batch"} & set(
        flags_of("run")
    )
    assert len(flags_of("run")) <= 43


@pytest.mark.parametrize("name", COMMANDS)
def test_a_group_is_of_the_kind_that_its_command_says(name: str) -> None:
    """What the command line makes of a group, and what Python makes, start from the same values."""
    kinds = get_type_hints(COMMANDS[name].options)
    for one in fields(COMMANDS[name].options):
        if is_dataclass(one.default_factory):
            assert kinds[one.name] is one.default_factory, one.name


def test_a_stores_method_is_the_one_that_is_taken_back_exactly() -> None:
    for name in ("update", "schedule", "retract"):
        assert parse(name, REQUIRED[name]).edit.method == "memit"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_note_is_a_line_of_the_first_process(
    rank: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
    show_warning(Note("left\nout"), Note, "file.py", 1)
    assert capsys.readouterr().err == ("note: left\\nout\n" if rank == 0 else "")
    show_warning(UserWarning("of a library"), UserWarning, "file.py", 1)
    assert "of a library" in capsys.readouterr().err


def test_what_pydantic_says_in_one_line() -> None:
    with pytest.raises(ValueError) as raised:
        EditRequest.model_validate({"id": "a", "prompt": "b", "new_answer": "c", "locality": [{"prompt": "d"}]})
    assert "\n" in str(raised.value) and errors.one_line(raised.value) == "locality.0.answer: Field required"


# what is refused, and in which words


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["atribute"], ["'atribute'", "attribute?", *COMMANDS]),
        (["Attribute"], ["'Attribute'", *COMMANDS]),
        (["attribute", "--modle", "x"], ["--modle", "--model?", "attribute --help-all"]),
        (["run", "--method", "memit"], ["--method", "did you mean --edit.method?", "run --help-all"]),
        (["edit", "--finetune.epochs", "2"], ["--finetune.epochs"]),
        (["edit", "--statistics.token", "2"], ["--statistics.token", "--statistics.tokens?"]),
        (["attribute", "--expert", '{"fence": 2}'], ["expert: 'fence' is no setting", "mean fences?"]),
        (["attribute", "--expert", "2"], ["expert: expected a mapping", "found 2"]),
        (["demo", "model"], ["'model' is not understood", "--NAME VALUE", "demo --help"]),
        (["attribute", "--top_k", "2", "a"], ["'a' is not understood", "takes REQUESTS, then flags"]),
        (["edit", "a", "--requests", "b"], ["requests: given twice, as a word and with --requests", "one of them"]),
        (["edit", "a", "--requests=a"], ["requests: given twice"]),
        (["study", "a", "b", "--requests", "a"], ["requests: given twice"]),
        (["diff", "1", "2", *STORE, "--newer", "3"], ["newer: given twice"]),
        (["attribute", "-x"], ["'-x' is not understood"]),
        (["attribute", "--requests", "a", "b"], ["'b' is not understood"]),
        (["diff", "1", "2", "3", *STORE], ["'3' is not understood", "OLDER, then NEWER, then flags"]),
        (["diff", "1", *STORE], ["missing NEWER", "diff --help"]),
        (["update"], ["missing --store"]),
        (["evaluate", "--explain", "-1"], ["explain", "-1", "0"]),
        (["export", "--update", "x", "--chat"], ["flag --chat does not exist"]),
        (["attribute", "--model"], ["model: no value", "a text"]),
        (["attribute", "--model", ""], ["model: no value"]),
        (["attribute", "--model="], ["model: no value"]),
        (["attribute", "--limit", ""], ["limit: no value", "a whole number"]),
        (["attribute", "--top_k"], ["top_k: no value", "a whole number"]),
        (["attribute", "--config"], ["config: no value", "a file"]),
        (["generate", "--prompt"], ["prompt: no value"]),
        (["attribute", "--trainer", "5"], ["trainer: expected a mapping", "trainer.devices"]),
        (["run", "--attribution.scope", "x"], ["attribution.scope: 'x'"]),
        (["run", "--evaluation.generation", "x"], ["evaluation.generation: 'x'"]),
        (["update", *STORE, "--gates.rewrite", "2"], ["error: gates.rewrite: 2.0"]),
        (["export", "--update", "x", "--version", "3"], ["version: 3 of which store?", "--store"]),
        (["attribute", "--top_k", "two"], ["top_k", "two", "a whole number"]),
        (["attribute", "--top_k", "1.5"], ["top_k", "1.5", "a whole number"]),
        (["attribute", "--top_k", "0"], ["top_k", "0", "1"]),
        (["attribute", "--limit", "0"], ["limit", "0", "1"]),
        (["attribute", "--offset", "-1"], ["offset", "-1", "0"]),
        (["attribute", "--expert.fences", "-1"], ["expert.fences", "-1", "0"]),
        (["attribute", "--expert.fences", "nan"], ["expert.fences", "nan", "a number"]),
        (["attribute", "--expert.fences", "wide"], ["expert.fences", "wide", "a number"]),
        (["plan", "--memory", "nan"], ["memory", "nan", "a number"]),
        (["attribute", "--overwrite=maybe"], ["overwrite", "maybe", "true or false"]),
        (
            ["attribute", "--scope", "mlpp"],
            ["scope", "'mlpp'", "'mlp'?", "attention, block, down, experts, mlp, shared"],
        ),
        (["attribute", "--old_answers", "mine"], ["old_answers", "'mine'", "dataset, model"]),
        (["attribute", "--trainer.precision", "8"], ["trainer.precision", "'8'", "32-true", "bf16-mixed"]),
        (["attribute", "--trainer.num_nodes", "0"], ["trainer.num_nodes", "0", "1"]),
        (["attribute", "--expert.batch_size", "0"], ["expert.batch_size", "0", "1"]),
        (["edit", "--layers", "one"], ["layers", "one", "whole numbers"]),
        (["run", "--proxy_fraction", "1"], ["proxy_fraction", "1", "between 0 and 1"]),
        (["evaluate", "--max_new_tokens", "0"], ["max_new_tokens", "0", "1"]),
        (["export"], ["--update"]),
        (["export", "--update", "x", "--rank", "4"], ["rank: 4 of what?", "--kind adapter"]),
        (
            ["export", "--update", "x", "--kind", "onnx"],
            ["kind", "'onnx'", "adapter, gguf, gguf-adapter, merged, update"],
        ),
        (["generate", "--output", "x"], ["--output"]),
        pytest.param(
            ["attribute", "--seed", "-1"],
            ["seed", "-1", "0"],
        ),
        pytest.param(
            ["run", "--seed", str(2**32)],
            ["seed", str(2**32)],
        ),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value, list) else "",
)
def test_wrong_words_are_named_in_one_line(words: list[str], parts: list[str], refused: Callable[..., str]) -> None:
    line = refused(*words)
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    ("command", "text", "parts"),
    [
        ("attribute", "modle: x", ["'modle'", "model?", "requests", "trainer"]),
        ("run", "edit:\n  statistics:\n    token: 3", ["'edit.statistics.token'", "edit.statistics.tokens"]),
        ("run", "edit:\n  expert: 3", ["options.yaml: edit.expert: expected a mapping", "found 3"]),
        ("run", "edit:\n  expert:", ["edit.expert: expected a mapping"]),
        ("run", "edti:\n  method: x", ["'edti'", "attribution"]),
        ("attribute", "a: [1", ["malformed YAML", "line 1"]),
        ("attribute", "config: x", ["key 'config' does not exist; there is "]),
        ("attribute", "- model", ["a mapping"]),
        ("attribute", "", ["a mapping"]),
        ("attribute", "1: 2", ["'1'"]),
        ("attribute", "top_k: many", ["top_k", "many", "a whole number"]),
        (
            "attribute",
            "scope: mlpp",
            ["options.yaml: scope", "'mlpp'", "attention, block, down, experts, mlp, shared"],
        ),
        ("run", "edit:\n  statistics:\n    tokens: 0", ["options.yaml: edit.statistics.tokens: 0 is too small"]),
        pytest.param("run", "edit: 5", ["edit", "mapping"]),
        pytest.param("run", "edit:\nlimit: 2", ["edit: expected a mapping"]),
        pytest.param("attribute", "trainer:\nlimit: 2", ["trainer: expected a mapping"]),
        pytest.param("attribute", "model: null\nscope: mlp", ["model"]),
    ],
)
def test_wrong_yaml_is_named_in_one_line(
    command: str, text: str, parts: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    line = refused(command, "--config", config_file(tmp_path, text))
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
@pytest.mark.parametrize("there", ["nothing", "folder"])
def test_a_config_that_is_no_file(form: str, there: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "missing"
    if there == "folder":
        path.mkdir()
    line = refused("attribute", *form.format(path).split())
    assert str(path) in line
    assert ("is no plain file" if there == "folder" else "no such file") in line


def test_a_config_that_is_no_text(tmp_path: Path, refused: Callable[..., str]) -> None:
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert str(file) in refused("attribute", "--config", str(file))


def test_a_flag_that_overrides_a_config_is_what_is_wrong(tmp_path: Path, refused: Callable[..., str]) -> None:
    file = config_file(tmp_path, "scope: down")
    assert refused("attribute", "--config", file, "--scope", "mlpp").startswith("error: scope: 'mlpp'")


def test_the_keys_that_exist_are_keys(tmp_path: Path, refused: Callable[..., str]) -> None:
    listed = refused("attribute", "--config", config_file(tmp_path, "nothing_like_it: 1")).partition("there is ")[2]
    flags = {flag.partition(".")[0] for flag in flags_of("attribute")}
    assert set(listed.split(", ")) == flags - {"config", "print_config"}


# what a command raises while it works


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """`attribute` raises this."""

    def work(*_: Any) -> None:
        """Fail."""
        raise error

    monkeypatch.setattr(Command, "call", work)


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (UserError("requests: line\n  broken"), "error: requests: line broken"),
        (OSError(errno.ENOSPC, "No space left on device", "DIR/update.safetensors"), "DIR/update.safetensors"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "DIR/x"), "no room"),
        (PermissionError(errno.EACCES, "Permission denied", "DIR"), "DIR: Permission denied"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no room"),
        (sqlite3.OperationalError("disk I/O error"), "store: the database says: disk I/O error"),
    ],
)
def test_a_users_error_is_one_line(
    error: Exception, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, error)
    assert main(["attribute"]) == 1
    assert part in one_line(capsys.readouterr().err)


def test_verbose_shows_the_traceback_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, UserError("requests: broken"))
    assert main(["attribute", "--verbose"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1] == "error: requests: broken"


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["attribute"])


def test_an_interrupt_has_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, Interrupted())
    assert main(["attribute"]) == 130
    assert capsys.readouterr().err == "interrupted\n"

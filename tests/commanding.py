"""Commands on a tiny model: the fixtures and helpers that tests of commands share (a pytest plugin of theirs)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import one_line
from transformers import PreTrainedTokenizerFast

from pipeline.cli import main

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
    *("rewrite", "rephrase", "locality", "portability", "made_subject"),
    *PROBABILITY,
    *("rome_score", "perplexity", "sane_texts"),
)


HPARAMS = ("experiment", "session_start_info", "session_end_info")


DIVERGENCES = ("locality_kl", "text_kl")  # to the base, so not before


PNG = b"\x89PNG\r\n\x1a\n"


PROFILE_FILES = {
    "golden_profile.json",
    "scores.safetensors",
    "scores.png",
    "stability.png",
    "options.yaml",
    "events",
}


FINETUNE = ("--method", "finetune", "--expert.whiten", "0", "--expert.sparing", "0", "--expert.epochs")  # no text


RUN_FINETUNE = tuple(word.replace("--", "--edit.") for word in FINETUNE)


TEXT = "The path along the marsh is best walked in the hour after sunrise. " * 8


@pytest.fixture(scope="module")
def ordinary_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A short ordinary text: perplexity on the one that comes with the project takes most of a command's time."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture
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
def made(tiny_folder: Path, ordinary_text: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders that `attribute` and then `edit` by its profile wrote, on six of the demo requests."""
    place = tmp_path_factory.mktemp("made")
    common = ["--model", str(tiny_folder), "--limit", "6", *CPU]
    profile, edited = place / "profile", place / "edited"
    assert main(["attribute", *common, "--output", str(profile)]) == 0
    by = ["--profile", str(profile), *FINETUNE, "3", "--expert.learning_rate", "0.2"]
    assert main(["edit", *common, *by, "--evaluation.text", ordinary_text, "--output", str(edited)]) == 0
    return SimpleNamespace(profile=profile, edited=edited)


@pytest.fixture
def model(tiny_folder: Path) -> list[str]:
    return ["--model", str(tiny_folder)]


@pytest.fixture
def asked(model: list[str], request_file: Path) -> list[str]:
    """The flags that most commands share."""
    return [*model, "--requests", str(request_file), *CPU]


@pytest.fixture
def editing(asked: list[str], ordinary_text: str) -> list[str]:
    """`edit` of one block in one epoch, but for its output."""
    return ["edit", *asked, "--layers", "1", *FINETUNE, "1", "--evaluation.text", ordinary_text]


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

"""Options that name what is not there are refused before any work: one line, and nothing is made or changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from commanding import CPU

from pipeline.cli import main
from pipeline.updates import Store, counts

pytestmark = pytest.mark.usefixtures("elsewhere")

WRONG_FOR_A_STORE = [
    (["--edit.method", "memmit"], "edit.method: 'memmit' does not exist (did you mean 'memit'?)"),
    (["--attribution.method", "lgaa"], "method: 'lgaa' does not exist (did you mean 'lga'?)"),
    (["--profile", "nothing"], "profile: nothing: no such file"),
    (["--edit.statistics.text", "nothing.txt"], "edit.statistics.text: nothing.txt: no such file"),
    (["--evaluation.text", "nothing.txt"], "evaluation.text: nothing.txt: no such file"),
    (["--gates.rewrite", "2"], "gates.rewrite: 2.0 is too large"),
]


@pytest.mark.parametrize("command", [["update"], ["schedule", "--every", "6h"]], ids=lambda words: words[0])
@pytest.mark.parametrize(("words", "part"), WRONG_FOR_A_STORE, ids=lambda value: value[0][2:] if value else "")
def test_no_store_is_made_with_wrong_options(
    command: list[str], words: list[str], part: str, tiny_folder: Path, elsewhere: Path, refused: Callable[..., str]
) -> None:
    assert part in refused(*command, "--store", "store", "--model", str(tiny_folder), *words)
    assert not list(elsewhere.iterdir())


def test_a_wrong_option_holds_no_request_back(
    tiny_folder: Path, request_file: Path, refused: Callable[..., str]
) -> None:
    assert main(["submit", str(request_file), "--store", "store", "--model", str(tiny_folder)]) == 0
    for words, part in WRONG_FOR_A_STORE:
        assert part in refused("update", "--store", "store", *words, *CPU)
    with Store("store") as store:
        assert counts(store) == {"queued": 7}


def test_a_text_that_is_missing_is_not_replaced_by_the_models_own(
    tiny_folder: Path, request_file: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "text.txt").write_text("The path along the marsh is best walked in the hour after sunrise. " * 8)
    words = ["edit", "--model", str(tiny_folder), "--requests", str(request_file), "--layers", "1", *CPU]
    words += ["--evaluation.text", str(tmp_path / "text.txt"), "--evaluation.generation", "none"]
    words += ["--method", "memit", "--expert.steps", "1", "--statistics.tokens", "500"]
    assert main([*words, "--output", "first"]) == 0  # the statistics of its own text are kept now
    line = refused(*words, "--statistics.text", "nothing.txt", "--output", "second")
    assert "statistics.text: nothing.txt: no such file" in line


def test_an_accelerator_without_its_library(
    tiny_folder: Path, request_file: Path, elsewhere: Path, refused: Callable[..., str]
) -> None:
    words = ["--model", str(tiny_folder), "--requests", str(request_file), "--trainer.accelerator", "tpu"]
    assert refused("attribute", *words, "--output", "out").startswith("error: trainer: ")
    assert not list(elsewhere.iterdir())


def test_a_command_repeated_by_its_options_replaces_nothing(
    tiny_folder: Path, request_file: Path, elsewhere: Path, refused: Callable[..., str]
) -> None:
    words = ["attribute", "--model", str(tiny_folder), "--requests", str(request_file), "--method", "middle", *CPU]
    assert main([*words, "--output", "out", "--overwrite"]) == 0
    saved = yaml.safe_load((elsewhere / "out" / "options.yaml").read_text())
    assert saved["output"] == "out" and saved["overwrite"] is False
    assert "--overwrite" in refused("attribute", "--config", "out/options.yaml")


def test_trial_edits_without_subjects_name_a_method_that_does_without(
    tiny_folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = tmp_path / "plain.jsonl"
    line = '{"prompt": "The capital of %s is", "new_answer": "Lima", "old_answer": "Madrid"}\n'
    file.write_text("".join(line % country for country in ("Spain", "France", "Peru")))
    words = ["--model", str(tiny_folder), "--requests", str(file), "--limit", "2", "--output", "out"]
    line = refused("study", *words)
    assert "memit needs each request's subject" in line and "the method finetune does without" in line

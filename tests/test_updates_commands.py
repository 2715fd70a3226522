"""The commands that work on a store, end to end on a tiny model, and what they refuse in one line."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tiny, refusal
from filelock import FileLock
from peft import PeftModel
from programs import RUN, Program, ran, small_files, wait_for
from test_cli import one_line
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline import commands
from pipeline.cli import main
from pipeline.editing.update import WeightUpdate
from pipeline.model.loading import load_model
from pipeline.options.base import as_config
from pipeline.options.updates import UpdateCommand
from pipeline.parsing import parse
from pipeline.updates import Stopping, Store, run_schedule, trigger
from pipeline.updates.store import UPDATE_LOCK

ROOT = Path(__file__).parent.parent
CPU = ("--trainer.accelerator", "cpu")


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    """Flags of a quick update with all gates open."""
    text = tmp_path / "text.txt"
    text.write_text("The path along the marsh is best walked in the hour after sunrise. " * 30)
    steps = {"steps": 1, "neighbours": 0}
    gates = {"rewrite": 0, "locality": 0, "earlier": 0, "perplexity": "null", "drift": "null"}
    values = {f"edit.expert.{name}": value for name, value in steps.items()}
    values |= {f"gates.{name}": value for name, value in gates.items()}
    values |= {
        "edit.layers": 1,
        "edit.statistics.text": text,
        "evaluation.text": text,
        "evaluation.max_new_tokens": 1,
    }
    return [*CPU, *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def of_retract(quick: list[str]) -> list[str]:
    """Those of the flags that `retract` takes."""
    left_out = {"--evaluation.max_new_tokens", "--gates.rewrite", "--gates.locality"}
    pairs = [*zip(quick[::2], quick[1::2], strict=True)]
    return [word for pair in pairs if pair[0] not in left_out for word in pair]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must succeed; returns what it said."""

    def run(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(words) == code
        return capsys.readouterr().out

    return run


@pytest.fixture
def at(tmp_path: Path) -> list[str]:
    return ["--store", str(tmp_path / "store")]


def test_what_a_team_does(
    tiny_folder: Path, request_file: Path, quick: list[str], at: list[str], told: Callable[..., str], tmp_path: Path
) -> None:
    model = str(tiny_folder)
    lines = request_file.read_text().splitlines()
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("\n".join(lines[:3]))
    second.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"new_answer": "Quito"}), lines[3]]))
    said = told("submit", str(first), *at, "--model", model)
    assert "3 new; in the queue" in said and "+ #3 (capital-2)  The capital of Portugal is -> Warsaw" in said
    assert "3 known already" in told("submit", str(first), *at)
    assert "dry run, nothing changed: 3 applied" in told("update", *at, *quick, "--dry_run")
    said = told("update", *at, *quick)
    assert "version 1: 3 applied, 0 held back" in said and "NOT MEASURED: chat" in said
    missed = [line for line in said.splitlines() if line.startswith("does not hold: request #")]
    assert "nothing is due" in told("update", *at, *quick)
    assert "2 new" in told("submit", str(second), *at)
    said = told("update", *at, *quick)
    assert "version 2: 2 applied" in said
    assert "request #1 ('Lima') is superseded by #4 ('Quito'): The capital of Spain is" in said
    said = told("history", *at)
    assert "4 applied, 1 superseded" in said and "* 0002" in said and "submitted" in said
    said = told("history", "--request", "#1", *at)
    assert "superseded: request #1 (capital-0)" in said and "superseded by request #4" in said
    said = told("show", "2", *at)
    assert "the current one: 4 facts" in said and "rewrite " in said and "drift" in said
    assert "NOT MEASURED: chat" in said
    assert missed and set(missed) <= set(told("show", "1", *at).splitlines())
    said = told("diff", "1", "2", *at)
    assert "2 facts gained, 1 lost" in said and "+ #4 (capital-0)" in said and "- #1 (capital-0)" in said
    assert "version 1 is current, after 2: 2 facts less, 1 more" in told("rollback", "1", *at)
    assert "2 queued anew" in told("submit", str(second), *at, "--again")
    assert "version 3: 2 applied" in told("update", *at, *quick)
    config = ("--config", str(ROOT / "configs" / "update.yaml"))
    said = told("retract", "#2", *at, *config, *of_retract(quick))
    assert "to retract, applied: request #2 (capital-1)  The capital of Norway is -> Nairobi and more" in said
    assert "retracted; its new answer" in said
    assert "does not hold" not in told("show", "4", *at), "it is to be gone"
    said = told("verify", *at)
    assert said.count("as it was written, and loads") == 5
    said = told("generate", *at, "--prompt", "The capital of Spain is", "--max_new_tokens", "2", *CPU)
    assert "base" in said and "version 4" in said
    exported(tiny_folder, at, told, tmp_path)
    assert "0 versions pruned" in told("prune", *at, "--keep", "1", "--older-than", "1d")
    assert "2 versions pruned" in told("prune", *at, "--keep", "1")
    assert told("history", *at).count("held back, pruned") == 2
    assert "pruned: its files and figures are gone" in told("show", "2", *at)


def exported(tiny_folder: Path, at: list[str], told: Callable[..., str], tmp_path: Path) -> None:
    """A version as a merged model and as an adapter that plain PEFT loads: both answer as the version does."""
    llm = load_model(str(tiny_folder))
    ids = torch.tensor([llm.tokenizer("The capital of Spain is").input_ids])
    told("export", "0", *at, "--output", str(tmp_path / "base"))
    assert load_model(str(tmp_path / "base")).fingerprint == llm.fingerprint
    told("export", "2", *at, "--output", str(tmp_path / "merged"))
    told("export", "2", *at, "--kind", "adapter", "--output", str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    version = WeightUpdate.load(Path(at[1]) / "versions" / "0002")
    with torch.no_grad(), llm.frozen():
        before = llm.model(ids).logits
        with version.applied(llm):
            expected = llm.model(ids).logits
        assert torch.equal(merged(ids).logits, expected)
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_the_config_is_the_defaults() -> None:
    from test_cli import differences

    content = yaml.safe_load((ROOT / "configs" / "update.yaml").read_text(encoding="utf-8"))
    options = UpdateCommand(store="x")
    assert differences(content, as_config(options)) == []


# bad input


def test_cases_of_a_config_for_update_and_retract(tmp_path: Path) -> None:
    """What it says to `update` alone is passed over; what would change nothing, or is misspelt, is refused."""
    config = tmp_path / "update.yaml"
    words = ["--config", str(config), "--store", "x"]
    config.write_text(
        "batch: 3\nattribution: {order: signed}\ngates: {rewrite: 0.3, drift: 0.7}\nedit: {layers: [2]}"
    )
    options = parse("retract", ["#4", *words])
    assert (options.request, options.gates.drift, options.edit.layers) == ("#4", 0.7, [2])
    for line in ("dry_run: true", "bath: 3", "every: 6h"):
        config.write_text(line)
        assert f"key '{line.partition(':')[0]}' does not exist" in refusal(lambda: parse("retract", ["#4", *words]))
    assert "flag --batch does not exist" in refusal(lambda: parse("retract", ["4", "--store", "x", "--batch", "3"]))


def test_cases_of_texts_that_yaml_reads_otherwise() -> None:
    for name in ("#4", "~", "4", "'x'", "[a]", "on"):
        assert parse("history", ["--store", "x", "--request", name]).request == name
    assert parse("history", ["--store", "x", "--request", "null"]).request is None


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["submit"], ["--store", "FILE"]),
        (["update", "--gates.rewrite", "2"], ["gates.rewrite", "2", "1"]),
        (["update", "--gates.perplexity", "0.5"], ["gates.perplexity", "0.5"]),
        (["update", "--batch", "0"], ["batch", "0", "1"]),
        (["retract", "--request", "x", "--trainer.devices", "2"], ["flag --trainer.devices does not exist"]),
        (["schedule"], ["--cron", "--every"]),
        (["schedule", "--cron", "* * * * *", "--every", "6h"], ["--cron", "--every"]),
        (["schedule", "--every", "6 hours"], ["every", "6 hours", "6h"]),
        (["schedule", "--every", "0h"], ["every", "0h"]),
        (["schedule", "--cron", "every day"], ["cron", "every day", "0 3 * * *"]),
        (["schedule", "--cron", "99 3 * * *"], ["cron", "99 3 * * *", "59"]),
        (["submit", "x.jsonl", "--not_before", "soon"], ["not_before", "soon", "2026"]),
        (["rollback"], ["VERSION"]),
        (["rollback", "last"], ["version", "last", "a whole number"]),
        (["diff", "1"], ["NEWER"]),
        (["history", "--limit", "0"], ["limit", "0"]),
        (["prune", "--keep", "0"], ["keep", "0", "1"]),
        (["prune", "--older-than", "last year"], ["older_than", "last year", "1d"]),
        (["export"], ["--update", "--store"]),
        (["generate", "--follow"], ["follow", "--store"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "--" not in value[0] else "",
)
def test_wrong_words(words: list[str], parts: list[str], refused: Callable[..., str], tmp_path: Path) -> None:
    store = (
        [] if words[0] in ("export", "generate") or words == ["submit"] else ["--store", str(tmp_path / "store")]
    )
    line = refused(*words, *store)
    assert [part for part in parts if part not in line] == []
    assert not (tmp_path / "store").exists()


def test_what_a_store_refuses(
    tiny_folder: Path, request_file: Path, quick: list[str], at: list[str], refused: Callable[..., str],
    told: Callable[..., str], tmp_path: Path, tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    for command in (
        ["history"],
        ["show", "1"],
        ["diff", "0", "1"],
        ["rollback", "1"],
        ["verify"],
        ["retract", "1"],
        ["prune", "--keep", "1"],
        ["update", "--dry_run", "--model", str(tiny_folder)],
    ):
        assert "no such store" in refused(*command, *at)
    assert "name the model" in refused("submit", str(request_file), *at)
    told("submit", str(request_file), *at, "--model", str(tiny_folder))
    assert "made for model" in refused("submit", str(request_file), *at, "--model", "smollm2")
    other = tmp_path / "other"
    make_tiny("llama", tokenizer, seed=1).model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    told("update", *at, *quick, "--batch", "4")
    waiting = tmp_path / "waiting.jsonl"
    waiting.write_text('{"prompt": "The capital of Chad is", "subject": "Chad", "new_answer": "Rome"}\n')
    told("submit", str(waiting), *at)
    for command in (
        ["update", *quick],
        ["retract", "#1", *of_retract(quick)],
        ["export", "1"],
        ["generate"],
    ):
        assert "made for model" in refused(*command, *at, "--model", str(other))
    assert "9 does not exist; there is 0 (the base model) to 2" in refused("rollback", "9", *at)
    assert "9 does not exist" in refused("show", "9", *at)
    assert "request: '99' does not exist" in refused("history", "--request", "99", *at)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n')
    assert "line 1" in refused("submit", str(bad), *at)
    assert "no such file" in refused("submit", str(tmp_path / "none.jsonl"), *at)


def test_a_file_of_another_layout_is_submitted(
    tiny_folder: Path, at: list[str], told: Callable[..., str], refused: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "theirs.jsonl"
    file.write_text(json.dumps({"question": "The capital of Chile is", "wanted": {"text": "Lima"}}))
    submit = ["submit", str(file), *at, "--model", str(tiny_folder)]
    assert "no prompt and new answer found" in refused(*submit)
    assert "no field 'answer'" in refused(*submit, "--fields", "prompt=question,new_answer=answer")
    assert not (tmp_path / "store").exists()
    fields = ["--fields", "prompt=question,new_answer=wanted.text"]
    assert "1 new; " in (said := told(*submit, *fields)) and "The capital of Chile is -> Lima" in said
    assert "1 known already" in told(*submit, *fields)


def test_a_damaged_version_is_told(
    tiny_folder: Path, request_file: Path, quick: list[str], at: list[str], refused: Callable[..., str],
    told: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    told("submit", str(request_file), *at, "--model", str(tiny_folder))
    told("update", *at, *quick)
    file = tmp_path / "store" / "versions" / "0001" / "update.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["verify", *at]) == 1
    shown = capsys.readouterr()
    assert "update.safetensors: changed since it was written" in shown.out
    assert "1 versions are damaged" in one_line(shown.err)
    for command in (["generate", *at, "--prompt", "A", *CPU], ["export", *at, "--output", str(tmp_path / "out")]):
        assert "changed since it was written" in refused(*command)


def test_the_disk_fills_up(
    tiny_folder: Path, request_file: Path, quick: list[str], at: list[str], told: Callable[..., str], tmp_path: Path
) -> None:
    """Files of more than 5 kB cannot be written: a version's tensors are larger."""
    told("submit", str(request_file), *at, "--model", str(tiny_folder))
    run = ran(RUN, "update", *at, *quick, folder=tmp_path, before=partial(small_files, 5_000))
    assert run.returncode == 1
    assert "disk" in one_line(run.stderr)
    with Store(at[1]) as store:
        assert store.current == 0
    assert "version 1: 7 applied" in told("update", *at, *quick)


# the schedule


def test_a_schedule_goes_on_after_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    stopping, said, calls = Stopping(), [], []

    def work() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("the disk is away")
        if len(calls) == 2:
            raise RuntimeError("a fault of ours")
        stopping.set()

    run_schedule(work, trigger(None, "1s"), said.append, stopping, at_once=True)
    assert len(calls) == 3
    assert "the update failed: the disk is away" in said
    assert "the update failed, as shown; the schedule goes on" in said
    assert "a fault of ours" in capsys.readouterr().err
    assert said[-1] == "asked to end: ended between two batches"


def test_cron_lines() -> None:
    when = trigger("30 3 * * *", None)
    first = when.get_next_fire_time(None, datetime.now().astimezone())
    assert first and (first.hour, first.minute) == (3, 30)


def test_sigterm_lets_the_batch_finish(
    tiny_folder: Path, request_file: Path, quick: list[str], at: list[str], told: Callable[..., str], tmp_path: Path
) -> None:
    """Asked to end in the middle of the first of several batches: that one is published, the others wait."""
    told("submit", str(request_file), *at, "--model", str(tiny_folder))
    words = ["schedule", *at, *quick, "--every", "6h", "--batch", "1"]
    with Store(at[1]) as store, Program(RUN, *words, folder=tmp_path) as program:
        taken = "SELECT count(*) FROM requests WHERE state IN ('taken', 'applied')"
        wait_for(lambda: store.database.execute(taken).fetchone()[0])
        program.send_signal(signal.SIGTERM)
        told = program.finished(90)
        states = [row[0] for row in store.database.execute("SELECT state FROM requests")]
    assert told.returncode == 0, told.stderr
    assert "asked to end: ended between two batches" in told.stdout
    done = states.count("applied")
    assert 1 <= done < 7 and states.count("queued") == 7 - done


def test_generate_follows(
    tiny_folder: Path, request_file: Path, quick: list[str], at: list[str], told: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    told("submit", str(request_file), *at, "--model", str(tiny_folder))
    told("update", *at, *quick, "--batch", "4")
    turns: list[Any] = [lambda: told_quietly("rollback", "1", *at), lambda: os.kill(os.getpid(), signal.SIGTERM)]

    def told_quietly(*words: str) -> None:
        assert main(words) == 0

    monkeypatch.setattr(commands, "FOLLOWING", 0.01)
    wait = Stopping.wait

    def next_turn(self: Stopping, timeout: float) -> bool:
        if turns:
            turns.pop(0)()
        return wait(self, timeout)

    monkeypatch.setattr(Stopping, "wait", next_turn)
    said = told("generate", *at, "--follow", "--prompt", "The capital of Spain is", "--max_new_tokens", "2", *CPU)
    assert "version 2" in said and "version 1" in said.partition("version 2")[2]


def test_another_update_is_told_and_no_failure(
    tiny_folder: Path, request_file: Path, quick: list[str], at: list[str], told: Callable[..., str],
    refused: Callable[..., str],
) -> None:  # fmt: skip
    told("submit", str(request_file), *at, "--model", str(tiny_folder))
    with FileLock(Path(at[1]) / UPDATE_LOCK):
        assert "another update is at work on it; nothing to do here" in told("update", *at, *quick)
        assert "another update is at work on it" in refused("retract", "#1", *at, *of_retract(quick))
    assert "in the queue of" in told("submit", str(request_file), *at)


def test_a_file_that_is_refused_makes_no_store(tmp_path: Path) -> None:
    assert main(["submit", str(tmp_path / "none.jsonl"), "--store", str(tmp_path / "new"), "--model", "smollm2"])
    assert not (tmp_path / "new").exists()

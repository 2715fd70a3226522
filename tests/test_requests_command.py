"""`run.py requests` says what is in a file, names everything that is wrong, converts it whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.errors import Note
from pipeline.evaluation import reading
from pipeline.evaluation.reading import find_known
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.requests.check import check_requests
from pipeline.requests.readers import load_requests, read_requests
from pipeline.running.interrupts import Interrupted

ROOT = Path(__file__).parent.parent
REQUEST = {"prompt": "The capital of Ruritania is", "subject": "Ruritania", "new_answer": "Zenda"}
KNOWEDIT: dict[str, Any] = {
    "prompt": "The capital of Ruritania is",
    "subject": "Ruritania",
    "target_new": "Zenda",
    "ground_truth": ["Strelsau"],
    "rephrase_prompt": "Ruritania is governed from",
    "locality": {"Relation_Specificity": [{"prompt": "Ruritania lies in", "ground_truth": ["Europe"]}] * 2},
    "portability": {"Reasoning": [{"prompt": "Its mayor lives in", "ground_truth": [["Zenda", "zenda"]]}]},
}


def written(folder: Path, *records: Any) -> Path:
    file = folder / "facts.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_text("\n".join(lines) + "\n")
    return file


def table(text: str) -> dict[str, str]:
    """The rows of the summary by their names."""
    return dict(line.split("  ", 1) for line in text.splitlines() if "  " in line)


def shown(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, str]:
    assert main(["requests", *map(str, words)]) == 0
    return {name: text.strip() for name, text in table(capsys.readouterr().out).items()}


def test_the_demo_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(capsys)
    assert (rows["records"], rows["layout"]) == ("160, 0 bad", "golden-layers 160")
    assert (rows["duplicates"], rows["contradictions"]) == ("none", "none")


def test_a_summary_counts_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = {"Reasoning": [{"prompt": "x", "ground_truth": ""}]}
    others = [
        KNOWEDIT | {"prompt": "It is", "target_new": "a b c", "subject": "Ruritania"},
        KNOWEDIT | {"prompt": "Fog is Fog", "subject": None, "ground_truth": None, "target_new": "x"},
        KNOWEDIT | {"prompt": "Mud is", "target_new": "Strelsau", "portability": empty, "rephrase_prompt": ""},
    ]
    rows = shown(capsys, written(tmp_path, KNOWEDIT, *others))
    assert rows == {
        "requests": str(tmp_path / "facts.jsonl"),
        "records": "4, 0 bad",
        "layout": "EasyEdit 4",
        "subject": "3 with, 1 without; 2 not in their prompts: line 2, line 4",
        "old answer": "3 with, 1 without; 1 the same as the new one: line 4",
        "rephrases": "3; 3 with, 1 without",
        "locality": "Relation_Specificity 8",
        "portability": "Reasoning 3",
        "left out": "2 probes or rephrases with an empty text",
        "duplicates": "none",
        "contradictions": "none",
    }


def test_duplicates_and_contradictions_name_both_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, spaced = REQUEST | {"new_answer": "Hentzau"}, REQUEST | {"prompt": "The capital  of Ruritania is "}
    elsewhere = REQUEST | {"subject": "capital"}
    rows = shown(capsys, written(tmp_path, REQUEST, spaced, elsewhere, other, other))
    assert rows["duplicates"] == "3: line 2 as line 1, line 3 as line 2, line 5 as line 4"
    assert rows["contradictions"] == "1: line 4 ('Hentzau') against line 3 ('Zenda')"


BAD = [REQUEST, "oh", REQUEST | {"new_answer": ""}, {"src": "a"}, REQUEST | {"id": "0"}, REQUEST]


def test_every_bad_record_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, *BAD)
    assert main(["requests", str(file)]) == 1
    output = capsys.readouterr()
    named = [line for line in output.out.splitlines() if line.startswith("bad: ")]
    assert [line.split(": ")[2] for line in named] == ["line 2", "line 3", "line 4", "line 5"]
    assert f"{file}: 4 of 6 records are bad" in output.err and "--skip-bad" in output.err
    assert shown(capsys, file, "--skip-bad")["records"] == "6, 4 bad"


def test_only_the_first_bad_records_are_spelt_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["requests", str(written(tmp_path, REQUEST, *["oh"] * 50))]) == 1
    named = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad: ")]
    assert len(named) == 21 and named[-1] == "bad: and 30 more"


@pytest.mark.parametrize("name", ["ours.jsonl", "ours.jsonl.gz"])
def test_conversion_reads_back_the_same(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, to = written(tmp_path, KNOWEDIT, KNOWEDIT | {"prompt": "Ruritania’s seat is"}), tmp_path / name
    shown(capsys, file, "--to", to)
    assert load_requests(to) == load_requests(file)
    assert check_requests(to, read_requests(to)).layouts == {"golden-layers": 2}
    shown(capsys, to, "--offset", "1", "--to", to, "--overwrite")
    assert load_requests(to) == load_requests(file, offset=1)


def test_conversion_leaves_bad_records_out_only_where_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, to = written(tmp_path, *BAD), tmp_path / "ours.jsonl"
    assert main(["requests", str(file), "--to", str(to)]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.jsonl"]
    shown(capsys, file, "--to", to, "--skip-bad")
    with pytest.warns(Note):
        assert load_requests(to) == load_requests(file, skip_bad=True)


@pytest.mark.parametrize(
    ("to", "word"),
    [
        ("facts.jsonl", "exists already"),
        (".", "a folder"),
        ("nowhere/ours.jsonl", "no folder"),
        ("ours.csv", ".csv"),
        ("ours.tsv.gz", ".tsv"),
    ],
)
def test_a_place_that_cannot_be_written(
    to: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, REQUEST)
    before = file.read_text()
    assert main(["requests", str(file), "--to", str(tmp_path / to)]) in (1, 2)
    output = capsys.readouterr()
    assert word in output.err and output.err.count("\n") == 1 and not output.out
    assert file.read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> str:
        raise Interrupted

    monkeypatch.setattr("pipeline.requests.schema.EditRequest.model_dump_json", interrupted)
    file = written(tmp_path, REQUEST)
    assert main(["requests", str(file), "--to", str(tmp_path / "ours.jsonl")]) == 130
    assert list(tmp_path.iterdir()) == [file]


def test_a_check_imports_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "run.py", "requests", "demo"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in told.stderr.splitlines()}
    assert told.returncode == 0 and "pydantic" in imported
    assert not imported & {"torch", "lightning", "transformers", "matplotlib"}


@pytest.mark.real_model
def test_known_answers_are_those_that_the_model_says(smollm2: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over the answers finds what greedy generation begins with."""
    facts = load_requests("demo", limit=12)
    said = [text.split()[0] for text in generate(smollm2, [fact.prompt for fact in facts])]
    turned = [
        fact.model_copy(update={"new_answer": first, "old_answer": fact.new_answer})
        for fact, first in zip(facts, said, strict=True)
    ]
    known = find_known(smollm2, facts)
    monkeypatch.setattr(reading, "BATCH_SIZE", 5)
    other_way = find_known(smollm2, turned)
    assert (known.asked, known.new, known.unusable) == (12, [], [])
    assert sorted(known.old) == sorted(fact.id for fact in facts), "all of the demo's facts are known"
    assert (other_way.asked, other_way.old) == (12, [])
    assert len(other_way.new) >= 11  # a first word may end in the middle of a token: "Kyiv" of "Kyiv,"


def test_a_reader_that_has_read_enough(tmp_path: Path) -> None:
    """As with `| head`: no traceback."""
    command = [sys.executable, "run.py", "requests", "demo"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


def test_what_a_model_knows_and_cannot_take(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_folder)]
    asked = REQUEST | {"prompt": "Ruritania is", "old_answer": "neither this nor that"}
    assert main(["requests", str(written(tmp_path, REQUEST, asked)), *flags]) == 0
    assert "gives 0 of 1 old answers, and 0 new answers already" in " ".join(capsys.readouterr().out.split())
    long = {"id": "long", "prompt": "over and " * 200, "new_answer": "out", "old_answer": "on"}
    assert main(["requests", str(written(tmp_path, REQUEST, asked, long)), *flags]) == 1
    output = capsys.readouterr()
    assert "bad: request long" in output.out and "1 of 3" in output.err
    assert "gives 0 of 1 old answers" in " ".join(output.out.split())


def test_every_command_leaves_bad_records_out_where_asked_for(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--model", str(tiny_folder), "--requests", str(written(tmp_path, *BAD))]
    assert main(words) == 1
    assert "line 2" in capsys.readouterr().err
    assert main([*words, "--skip-bad", "--max_new_tokens", "2"]) == 0
    assert "note: left out 4 bad of 6 records; the first: " in capsys.readouterr().err


def test_forms_are_shown_and_the_file_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, to = written(tmp_path, REQUEST | {"forms": ["Ruritania is ruled from"]}), tmp_path / "own.jsonl"
    assert main(["requests", str(file), "--forms", "--to", str(to)]) == 0
    shown = capsys.readouterr().out
    assert "\n  Ruritania is ruled from Zenda\n" in shown
    assert "\n  user: What is the capital of Ruritania? / assistant: The capital of Ruritania is Zenda\n" in shown
    (request,) = load_requests(str(to))
    assert request.forms == ("Ruritania is ruled from",)

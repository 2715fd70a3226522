"""Requests come out of every kind of file the same, as they are asked for; a broken file says where it breaks."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tracemalloc
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import refusal

from pipeline import UserError
from pipeline.errors import Note
from pipeline.requests import sources
from pipeline.requests.readers import load_requests, read_requests
from pipeline.requests.schema import EditRequest, Probe

RECORD = {"prompt": "The capital of Ruritania is", "new_answer": "Zenda", "subject": "Ruritania"}
LINE = json.dumps(RECORD)


def written(folder: Path, content: str | bytes, name: str = "file.json") -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


# gzip


@pytest.mark.parametrize("content", [f"{LINE}\n{LINE}\n", f"[{LINE}, {LINE}]"], ids=["lines", "list"])
@pytest.mark.parametrize("name", ["file.json.gz", "file.json"])
def test_gzip_is_told_by_its_bytes(content: str, name: str, tmp_path: Path) -> None:
    plain = load_requests(written(tmp_path, content, "plain.json"))
    assert load_requests(written(tmp_path, gzip.compress(content.encode()), name)) == plain
    assert load_requests(written(tmp_path, content, "plain.json.gz")) == plain


def test_cut_gzip_says_after_which_record(tmp_path: Path) -> None:
    packed = gzip.compress(f"{LINE}\n".encode() * 5000)
    file = written(tmp_path, packed[: len(packed) // 2])
    message = refusal(lambda: load_requests(file))
    number = int(message.rpartition(" ")[2])
    assert "file.json: gzip data is cut short or damaged after" in message and 1000 < number < 5000
    assert len(load_requests(file, limit=500)) == 500


def test_damaged_gzip(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(f"{LINE}\n".encode() * 50))
    packed[-6] ^= 1  # the checksum
    assert "gzip data is cut short or damaged" in refusal(lambda: load_requests(written(tmp_path, bytes(packed))))
    assert "damaged after its beginning" in refusal(lambda: load_requests(written(tmp_path, bytes(packed[:5]))))


# only what is asked for is read


def test_what_a_limit_leaves_out_may_be_broken(tmp_path: Path) -> None:
    file = written(tmp_path, f"{LINE}\n{LINE}\n".encode() + b"\xff no JSON")
    assert len(load_requests(file, limit=2)) == 2
    assert "file.json: line 3" in refusal(lambda: load_requests(file, limit=3))


def test_lines_are_read_in_constant_memory(tmp_path: Path) -> None:
    file = written(tmp_path, "\n".join(json.dumps(RECORD | {"id": str(number)}) for number in range(20_000)))
    records = sources.raw_records(file)
    tracemalloc.start()
    try:
        assert sum(1 for _ in records) == 20_000
        assert file.stat().st_size > 4 * tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("[[[", "line 1"),
        ("[" * 100_000, "nested more than 64 deep"),
        (LINE[:-1] + ', "x": ' + "[" * 100_000, "nested more than 64 deep"),
        (f"[{LINE}\n{LINE}]", "line 2: malformed JSON: Expecting ',' delimiter"),
        (f"[{LINE}]\n{LINE}", "line 2: malformed JSON: Extra data"),
        (f"[{LINE},]", "malformed JSON"),
        (f"[{LINE}", "line 1: malformed JSON: Expecting ',' delimiter"),
        (f"[{LINE}, 12]", "record 1: expected an object, found int"),
        ('{"prompt": ' + "9" * 5000 + "}", "malformed JSON"),
        ('["' + "x" * 200_000, "Unterminated string"),
        ('{"prompt": "\\ud800", "new_answer": "b"}', "'prompt'"),
        ("{\n}", "its object: no prompt and new answer found in an empty record"),
        ('{\n"prompt": oh}', "line 2: malformed JSON"),
        (f"{{\n{LINE[1:]}\n{LINE}", "line 3: malformed JSON: Extra data"),
    ],
)
def test_broken_json_says_where(content: str, word: str, tmp_path: Path) -> None:
    message = refusal(lambda: load_requests(written(tmp_path, content)))
    assert "file.json: " in message and word in message and len(message) < 1000


def test_an_object_of_lists_may_begin_in_its_first_line(tmp_path: Path) -> None:
    (request,) = load_requests(written(tmp_path, f'{{"items": [\n{LINE}\n]}}'))
    assert load_requests(written(tmp_path, f'{{"items": [{LINE},\n{LINE}]}}'), limit=1) == [request]
    assert load_requests(written(tmp_path, f"{LINE}\n")) == [request], (
        "a line is a record, whatever the file's name"
    )


# bad records


def test_bad_records_are_left_out_where_asked_for(tmp_path: Path) -> None:
    lines = [LINE, "no JSON", '{"prompt": "x", "new_answer": ""}', '{"src": "x"}', LINE]
    file = written(tmp_path, b"\xff\n" + "\n".join(lines).encode())
    with pytest.warns(Note) as told:
        requests = load_requests(file, skip_bad=True)
    assert [request.id for request in requests] == ["1", "5"]
    told_once = [f"left out 4 bad of 6 records; the first: {file}: line 1: not UTF-8 text"]
    assert [str(one.message) for one in told] == told_once
    with warnings.catch_warnings(action="error"):
        assert not load_requests(file, limit=1, offset=1, skip_bad=True)[1:]
    assert "line 1" in refusal(lambda: load_requests(file))


def test_nothing_good_is_left(tmp_path: Path) -> None:
    file = written(tmp_path, "oh\n" * 3)
    message = refusal(lambda: load_requests(file, skip_bad=True))
    assert "all 3 records are bad" in message and "line 1" in message


def test_text_that_is_not_utf8_hides_no_other_record(tmp_path: Path) -> None:
    file = written(
        tmp_path, f'[{LINE}, {{"new_answer": "x", "prompt": "'.encode() + b'\xff"}, ' + LINE.encode() + b"]"
    )
    with pytest.warns(Note) as told:
        assert [request.id for request in load_requests(file, skip_bad=True)] == ["0", "2"]
    assert [str(one.message) for one in told] == [
        f"left out 1 bad of 3 records; the first: {file}: record 1: field 'prompt': not UTF-8 text"
    ]


def test_a_broken_file_is_not_a_bad_record(tmp_path: Path) -> None:
    """What follows cannot be told apart: leaving it out would hide how much was lost."""
    file = written(tmp_path, f"[{LINE}, oh, {LINE}]")
    assert "malformed JSON" in refusal(lambda: load_requests(file, skip_bad=True))


# CSV


def table(folder: Path, rows: list[list[str]], delimiter: str = ",", name: str = "file.csv") -> Path:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return written(folder, text.getvalue(), name)


FULL = {
    "id": "zenda",
    "prompt": 'The "capital", so to say; of Ruritania\nis',
    "subject": "Ruritania",
    "new_answer": "Zenda",
    "old_answer": "Strelsau",
    "rephrase_10": "third",
    "rephrase": "first",
    "rephrase_2": "second",
    "locality_prompt": "The capital of Syldavia is",
    "locality_answer": "Klow",
    "locality_axis": "neighbour",
    "portability_prompt_1": "Its mayor lives in",
    "portability_answer_1": "Zenda",
    "portability_prompt_2": "",
    "portability_answer_2": "",
    "source": "novels",
}


@pytest.mark.parametrize(("delimiter", "name"), [(",", "a.csv"), (";", "a.CSV"), ("\t", "a.tsv"), ("\t", "a.csv")])
@pytest.mark.parametrize("packed", [False, True])
def test_csv_columns_by_name(delimiter: str, name: str, packed: bool, tmp_path: Path) -> None:
    file = table(tmp_path, [list(FULL), list(FULL.values())], delimiter, name)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    if packed:
        file = written(tmp_path, gzip.compress(file.read_bytes()), f"{name}.gz")
    assert load_requests(file) == [
        EditRequest(
            id="zenda",
            prompt=FULL["prompt"],
            subject="Ruritania",
            new_answer="Zenda",
            old_answer="Strelsau",
            rephrases=("first", "second", "third"),
            locality=(Probe(prompt="The capital of Syldavia is", answer="Klow", axis="neighbour"),),
            portability=(Probe(prompt="Its mayor lives in", answer="Zenda"),),
            source="novels",
        )
    ]


def test_csv_with_a_benchmarks_columns(tmp_path: Path) -> None:
    header = ["case_id", "prompt", "target_new", "subject", "locality_prompt", "locality_ground_truth"]
    file = table(tmp_path, [header, ["8", "A is", "b", "", "C is", "d"], ["9", "A is", "b", "A", "", ""]])
    first, second = load_requests(file)
    assert (first.id, first.subject, first.locality[0].answer) == ("8", None, "d")
    assert (second.id, second.subject, second.locality) == ("9", "A", ())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prompt,new_answer\n", ["holds no records"]),
        ("", ["holds no records"]),
        ("prompt,answer\na,b\n", ["line 2", "no prompt and new answer found"]),
        (
            "prompt,new_answer,rephrases\na,b,c\n",
            ["column 'rephrases'", "rephrase", "locality_prompt"],
        ),
        ("prompt,new_answer,prompt\na,b,c\n", ["column 'prompt' stands twice"]),
        ("prompt,new_answer\na,b\n\nc,\n", ["line 4", "'new_answer'", "found an empty one"]),
        ("prompt,new_answer\na,b\nc\n", ["line 3", "'new_answer'", "found an empty one"]),
        ("prompt,new_answer\na,b,c\n", ["line 2", "3 cells", "2 columns"]),
        ('prompt,new_answer\n"a\nb",c\n"d,e\n', ["line 4", "malformed CSV"]),
        ('prompt,new_answer\n"a" b,c\n', ["line 2", "malformed CSV"]),
        (b"prompt,new_answer\na,b\n\xe9,b\n", ["line 3", "not UTF-8"]),
        ("prompt,new_answer,locality_prompt\na,b,c\n", ["line 2", "'locality.0.answer'", "is missing"]),
        ("prompt,new_answer\n" + "x" * 200_000 + ",b\n", ["malformed CSV", "field larger"]),
    ],
)
def test_bad_csv_is_refused_in_one_line(content: str | bytes, words: list[str], tmp_path: Path) -> None:
    message = refusal(lambda: load_requests(written(tmp_path, content, "file.csv")))
    assert [word for word in ["file.csv", *words] if word not in message] == []


def test_bad_rows_are_left_out_where_asked_for(tmp_path: Path) -> None:
    file = written(tmp_path, b"prompt,new_answer\na,b\n\xe9,b\nc,\nd,e,f\ng,h\n", "file.csv")
    with pytest.warns(Note, match=r"3 bad of 5 records.*line 3"):
        assert [request.id for request in load_requests(file, skip_bad=True)] == ["0", "4"]


# Hugging Face data sets


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub with one data set of two splits, in place of the package."""
    rows = [RECORD | {"id": str(number), "old_answer": None} for number in range(4)]
    asked = SimpleNamespace(calls=[], rows={"train": rows, "test": rows[:1]})

    def load_dataset(*names: str, split: str | None) -> Any:
        asked.calls.append((*names, split))
        if names[0] == "nobody/nothing":
            raise FileNotFoundError("Dataset 'nobody/nothing' doesn't exist\non the Hub")
        return asked.rows if split is None else iter(asked.rows[split])

    package = SimpleNamespace(load_dataset=load_dataset, disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", package)
    return asked


def test_a_data_set_by_name(hub: SimpleNamespace) -> None:
    assert [request.id for request in load_requests("hf:me/facts:train", limit=2, offset=1)] == ["1", "2"]
    assert [request.id for request in load_requests("hf:me/facts:german:test")] == ["0"]
    assert hub.calls == [("me/facts", "train"), ("me/facts", "german", "test")]
    del hub.rows["train"]
    assert len(load_requests("hf:me/facts")) == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf:me/facts", ["several splits", "train, test"]),
        ("hf:nobody/nothing:train", ["cannot be read", "FileNotFoundError", "doesn't exist"]),
        ("hf:me/facts:dev", ["cannot be read", "dev"]),
        ("hf:", ["expected hf:NAME"]),
        ("hf:me/facts:a:b:c", ["expected hf:NAME"]),
    ],
)
def test_a_data_set_that_cannot_be_had(source: str, words: list[str], hub: SimpleNamespace) -> None:
    with pytest.raises(UserError) as caught:
        load_requests(source)
    message = str(caught.value)
    assert [word for word in [source, *words] if word not in message] == []


def test_a_bad_row_is_named(hub: SimpleNamespace) -> None:
    hub.rows["test"] = [RECORD, RECORD | {"new_answer": None}]
    assert "hf:me/facts:test: row 1: field 'new_answer'" in refusal(lambda: load_requests("hf:me/facts:test"))


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refusal(lambda: load_requests("hf:me/facts"))
    assert "`datasets`" in message and "[datasets]" in message


def test_a_data_set_in_a_folder(tmp_path: Path) -> None:
    """With the package itself, where it is installed."""
    pytest.importorskip("datasets")
    axes = [{"Near": [{"prompt": "x", "ground_truth": "y"}]}, {"Far": [{"prompt": "x", "ground_truth": ["y"]}]}]
    records = [{"prompt": "x", "target_new": "y", "locality": {}, "portability": axis} for axis in axes]
    file = written(tmp_path, json.dumps(records), "train.json")
    assert load_requests(f"hf:{tmp_path}:train") == load_requests(file)


def test_readings_come_one_by_one(tmp_path: Path) -> None:
    readings = read_requests(written(tmp_path, f"{LINE}\nno JSON\n"))
    assert next(readings).place == "line 1"
    assert "malformed JSON" in str(next(readings).requests)

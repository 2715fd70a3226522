"""Somebody's own facts get in without much reading: in a line each, or in a file of fields of any name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commanding import CPU, FINETUNE, events
from conftest import refusal
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from pipeline import UserError
from pipeline.cli import main
from pipeline.editing.update import WeightUpdate
from pipeline.requests.readers import load_facts, load_requests, read_requests
from pipeline.requests.schema import EditRequest, Probe

CHILE = "Chile | The capital of Chile is | Lima"

pytestmark = pytest.mark.usefixtures("elsewhere")

CHILE_IN_FIELDS = {
    "question": "The capital of Chile is",
    "about": "Chile",
    "wanted": {"text": "Lima", "by": ["me"]},
}
FIELDS = {"prompt": "question", "subject": "about", "new_answer": "wanted.text"}

# a fact in a line


def test_a_fact_in_a_line_is_a_request() -> None:
    first, second = load_facts([CHILE, "Peru|Peru's capital is|La Paz, Bolivia"])
    assert first == EditRequest(id="fact-1", subject="Chile", prompt="The capital of Chile is", new_answer="Lima")
    assert (second.id, second.subject, second.prompt, second.new_answer) == (
        "fact-2",
        "Peru",
        "Peru's capital is",
        "La Paz, Bolivia",
    )


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ("The capital of Chile is Lima", "expected three parts, 'subject | prompt | new answer', found 1"),
        ("Chile | The capital of Chile is", "found 2"),
        (f"{CHILE} | Santiago", "found 4"),
        ("| The capital of Chile is | Lima", "field 'subject': String should have at least 1 character"),
        ("Chile | \t | Lima", "field 'prompt': String should have at least 1"),
        ("Chile | The capital of Chile is | ", "field 'new_answer': String should have at least 1"),
        ("Peru | The capital of Chile is | Lima", "the prompt does not hold the subject 'Peru'"),
        ("Chi | The capital of Chile is | Lima", "the prompt does not hold the subject 'Chi'"),
        ("Chile | The capital of Chile is | \udcff", "'new_answer': not UTF-8 text"),
    ],
)
def test_what_is_no_fact_is_named_with_what_is_wrong(fact: str, said: str) -> None:
    message = refusal(lambda: load_facts([CHILE, fact]))
    assert message.startswith("fact: ") and repr(fact) in message and said in message


def test_facts_are_edited_without_a_file(
    model: list[str], ordinary_text: str, elsewhere: Path, refused: Callable[..., str]
) -> None:
    flags = [*CPU, "--layers", "1", *FINETUNE, "1", "--evaluation.text", ordinary_text]
    editing = ["edit", *model, *flags]
    assert main([*editing, "--fact", CHILE, "--fact", "Peru | Peru lies in | Asia", "--output", "first"]) == 0
    first = WeightUpdate.load(elsewhere / "first")
    assert [(request.subject, request.new_answer) for request in first.requests] == [
        ("Chile", "Lima"),
        ("Peru", "Asia"),
    ]
    content = events(elsewhere / "first").summary_metadata["_hparams_/session_start_info"].plugin_data.content
    row = HParamsPluginData.FromString(content).session_start_info.hparams
    assert row["request set"].string_value == f"{CHILE}; Peru | Peru lies in | Asia", "and not the demo"
    options = str(elsewhere / "first" / "options.yaml")
    assert main(["edit", "--config", options, "--offset", "1", "--output", "again"]) == 0
    assert [request.subject for request in WeightUpdate.load(elsewhere / "again").requests] == ["Peru"]
    other = "Chile | The capital of Chile is | Quito"
    assert main([*editing, "--fact", other, "--after", "first", "--output", "both"]) == 0
    both = WeightUpdate.load(elsewhere / "both").requests
    assert [(one.subject, one.new_answer) for one in both] == [("Peru", "Asia"), ("Chile", "Quito")]
    line = refused(*editing, "--fact", CHILE, "--fact", other, "--output", "third")
    assert "fact-1 ('Lima') and fact-2 ('Quito')" in line


def test_a_fact_beside_a_file_is_refused(refused: Callable[..., str]) -> None:
    line = refused("edit", "--requests", "facts.jsonl", "--fact", CHILE)
    assert line == refused("edit", "facts.jsonl", "--fact", CHILE)
    assert line == "error: fact: stands in place of a file, and requests facts.jsonl is given; leave one out"


# fields of any name


def written(folder: Path, *records: Any, name: str = "theirs.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(json.dumps(record) for record in records))
    return file


def read_one(folder: Path, record: Any, **more: str) -> EditRequest:
    """The request of a record with more fields named (`locality_prompt` is `locality.prompt`)."""
    (request,) = load_requests(written(folder, record), fields=FIELDS | {name_of(one): more[one] for one in more})
    return request


def name_of(word: str) -> str:
    kind, _, part = word.partition("_")
    return f"{kind}.{part}" if kind in ("locality", "portability") else word


def test_fields_of_other_names_are_read_by_a_mapping(tmp_path: Path) -> None:
    record = CHILE_IN_FIELDS | {
        "id": 7,
        "old_answer": "Santiago",
        "other": ["Chile's capital is", ""],
        "near": [
            {"q": "The capital of Peru is", "a": ["Lima", "Lima, Peru"]},
            {"q": "Quito lies in", "a": "Ecuador"},
        ],
        "follows": "The river in Chile's capital is",
        "river": "the Rimac",
        "comment": {"nothing": "of ours"},
    }
    request = read_one(
        tmp_path,
        record,
        rephrases="other",
        locality_prompt="near.q",
        locality_answer="near.a",
        portability_prompt="follows",
        portability_answer="river",
        source="wanted.by.0",
    )
    assert request == EditRequest(
        id="7",
        prompt="The capital of Chile is",
        subject="Chile",
        new_answer="Lima",
        old_answer="Santiago",
        rephrases=("Chile's capital is",),
        locality=(
            Probe(prompt="The capital of Peru is", answer="Lima"),
            Probe(prompt="Quito lies in", answer="Ecuador"),
        ),
        portability=(Probe(prompt="The river in Chile's capital is", answer="the Rimac"),),
        source="me",
    )


@pytest.mark.parametrize(
    ("given", "probes"),
    [
        ({"p": ["a", "b"], "a": "c"}, [("a", "c"), ("b", "c")]),
        ({"p": ["a", "b"], "a": ["c", "d"]}, [("a", "c"), ("b", "d")]),
        ({"p": "a", "a": ["", "c"]}, [("a", "c")]),
        ({"p": "", "a": None}, []),
        ({"p": ["a", ""], "a": ["c", "d"]}, [("a", "c")]),
    ],
)
def test_probes_are_one_or_many(given: dict[str, Any], probes: list[tuple[str, str]], tmp_path: Path) -> None:
    request = read_one(tmp_path, CHILE_IN_FIELDS | given, locality_prompt="p", locality_answer="a")
    assert [(probe.prompt, probe.answer) for probe in request.locality] == probes


def test_what_is_not_named_keeps_its_name(tmp_path: Path) -> None:
    ours = {"rephrases": "So", "locality": [{"prompt": "a", "answer": "b"}], "portability": {"Near": []}}
    request = read_one(tmp_path, CHILE_IN_FIELDS | ours)
    assert (request.rephrases, request.locality) == (("So",), (Probe(prompt="a", answer="b"),))
    dotted = {"a.b": "Peru lies in", "subject": "Peru", "new_answer": "Asia"}
    (request,) = load_requests(written(tmp_path, dotted), fields={"prompt": "a.b"})
    assert request == EditRequest(id="0", prompt="Peru lies in", subject="Peru", new_answer="Asia")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"promt": "question"}, ["fields: 'promt'", "mean prompt?", "locality.prompt"]),
        ({"locality": "near"}, ["fields: 'locality'", "locality.prompt"]),
        ({"locality.prompt": "about"}, ["locality.prompt is given without locality.answer"]),
        (
            {"prompt": "src"},
            ["theirs.jsonl: line 1: no field 'src'", "its prompt", "there is question, about, wanted"],
        ),
        ({"prompt": "question.text"}, ["line 1: no field 'question.text'"]),
        ({"source": "wanted.by.1"}, ["line 1: no field 'wanted.by.1'"]),
        ({"source": "wanted.by." + "9" * 5000}, ["line 1: no field 'wanted.by.9"]),
        ({"new_answer": "wanted"}, ["line 1: field 'new_answer'", "string (read as --fields)"]),
        ({"new_answer": "null"}, ["line 1: field 'new_answer': expected a text, found none"]),
        ({"locality.prompt": "wanted.by", "locality.answer": "three"}, ["line 1: field 'locality'", "as many"]),
    ],
)
def test_a_mapping_that_does_not_fit_is_named(fields: dict[str, str], words: list[str], tmp_path: Path) -> None:
    file = written(tmp_path, CHILE_IN_FIELDS | {"null": None, "three": [1, 2, 3]})
    message = refusal(lambda: load_requests(file, fields=FIELDS | fields))
    assert [word for word in words if word not in message] == []


def test_a_record_without_a_named_field_is_bad_and_the_others_are_read(tmp_path: Path) -> None:
    file = written(tmp_path, CHILE_IN_FIELDS, {"question": "x"}, 5, CHILE_IN_FIELDS)
    assert [type(one.request) for one in read_requests(file, fields=FIELDS)] == [
        EditRequest,
        UserError,
        UserError,
        EditRequest,
    ]


@pytest.mark.parametrize("own", ["new_answer", "wanted"])
def test_a_tables_columns_are_read_by_a_mapping(own: str, tmp_path: Path) -> None:
    """With a column of ours among them, those that are ours stay so, numbered ones too."""
    file = tmp_path / "theirs.csv"
    head = f"question,{own},rephrase,rephrase_2,why,near,answer"
    file.write_text(
        f"{head}\nChile lies in,Asia,In,Chile is in,because,Peru is in,America\nPeru lies in,Asia,,,,,\n"
    )
    fields = {"prompt": "question", "new_answer": own, "locality.prompt": "near", "locality.answer": "answer"}
    first, second = load_requests(file, fields=fields)
    assert (first.prompt, first.new_answer, first.rephrases) == ("Chile lies in", "Asia", ("In", "Chile is in"))
    assert (first.locality, second.locality) == ((Probe(prompt="Peru is in", answer="America"),), ())
    assert (second.prompt, second.rephrases) == ("Peru lies in", ())


@pytest.mark.parametrize(
    ("words", "config"),
    [
        (["--fields", "prompt=question, subject=about,new_answer=wanted.text"], ""),
        (["--fields", '{"prompt": "question", "subject": "about", "new_answer": "wanted.text"}'], ""),
        ([], "fields: {prompt: question, subject: about, new_answer: wanted.text}"),
        ([], "fields: prompt=question,subject=about,new_answer=wanted.text"),
    ],
)
def test_fields_are_named_on_the_command_line_or_in_a_config(
    words: list[str], config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, to = written(tmp_path, CHILE_IN_FIELDS), tmp_path / "ours.jsonl"
    (tmp_path / "fields.yaml").write_text(config or "{}")
    assert main(["requests", str(file), *words, "--config", str(tmp_path / "fields.yaml"), "--to", str(to)]) == 0
    assert re.search(r"^layout +--fields 1$", capsys.readouterr().out, re.MULTILINE)
    assert load_requests(to) == load_requests(file, fields=FIELDS)


@pytest.mark.parametrize("text", ["prompt", "prompt=", "prompt=a,=b", "prompt=a,prompt=b", "{prompt: 5}", "[a]"])
def test_what_is_no_mapping_is_refused(text: str, refused: Callable[..., str]) -> None:
    line = refused("edit", "facts.jsonl", "--fields", text)
    assert line.startswith("error: fields: expected a mapping of texts, such as prompt=src,new_answer=alt, found ")


@pytest.mark.parametrize("command", ["attribute", "edit", "evaluate", "generate", "study", "run"])
def test_every_command_that_reads_requests_takes_fields(
    command: str, model: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = written(tmp_path, CHILE_IN_FIELDS)
    line = refused(command, *model, "--requests", str(file), "--fields", "prompt=src")
    assert f"{file}: line 1: no field 'src'" in line

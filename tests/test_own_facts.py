"""Somebody's own facts get in without much reading: in a line each, or in a file of fields of any name."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
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
        ("The capital of Chile is Lima", "expected three parts, none empty: 'subject | prompt | new answer'"),
        ("Chile | The capital of Chile is", "expected three parts"),
        (f"{CHILE} | Santiago", "expected three parts"),
        ("| The capital of Chile is | Lima", "none empty"),
        ("Chile | \t | Lima", "none empty"),
        ("Chile | The capital of Chile is | ", "none empty"),
        ("Peru | The capital of Chile is | Lima", "the prompt does not hold the subject 'Peru'"),
        ("Chi | The capital of Chile is | Lima", "the prompt does not hold the subject 'Chi'"),
    ],
)
def test_what_is_no_fact_is_named_with_what_is_wrong(fact: str, said: str) -> None:
    message = refusal(lambda: load_facts([CHILE, fact]))
    assert message.startswith(f"fact: {fact!r}: ") and said in message
    assert "not UTF-8" in refusal(lambda: load_facts(["Chile | The capital of Chile is | \udcff"]))


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
    assert "fact: none is given" in refused("edit", "--fact", "[]"), "and the demo is not edited"
    assert line == "error: fact: stands in place of a file; leave out --fact, or --requests and --fields"


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
        ({"p": [], "a": "c"}, []),
        ({"p": ["a", ""], "a": ["c", "d"]}, [("a", "c")]),
    ],
)
def test_probes_are_one_or_many(given: dict[str, Any], probes: list[tuple[str, str]], tmp_path: Path) -> None:
    request = read_one(tmp_path, CHILE_IN_FIELDS | given, locality_prompt="p", locality_answer="a")
    assert [(probe.prompt, probe.answer) for probe in request.locality] == probes


ZSRE = {
    "src": "The capital of Chile is",
    "alt": "Lima",
    "rephrase": ["Chile's capital is", "Chile is governed from"],
    "loc": "The capital of Peru is",
    "loc_ans": "Lima",
    "hops": [{"q": "The river of Chile's capital is", "a": "the Rimac"}],
}


def test_probes_have_an_axis_where_their_name_has_one(tmp_path: Path) -> None:
    probes = "locality.prompt=loc,locality.answer=loc_ans,locality.near.prompt=loc,locality.near.answer=loc_ans"
    hops = "portability.hops.prompt=hops.q,portability.hops.answer=hops.a"
    names = f"prompt=src,new_answer=alt,rephrases=rephrase,{probes},{hops}"
    fields = dict(one.split("=") for one in names.split(","))
    (request,) = load_requests(written(tmp_path, ZSRE), fields=fields)
    assert request == EditRequest(
        id="0",
        prompt="The capital of Chile is",
        new_answer="Lima",
        rephrases=("Chile's capital is", "Chile is governed from"),
        locality=(
            Probe(prompt="The capital of Peru is", answer="Lima"),
            Probe(prompt="The capital of Peru is", answer="Lima", axis="near"),
        ),
        portability=(Probe(prompt="The river of Chile's capital is", answer="the Rimac", axis="hops"),),
    )
    (kinds,) = load_requests(
        written(tmp_path, ZSRE | {"kind": "far"}), fields=fields | {"locality.near.axis": "kind"}
    )
    assert [probe.axis for probe in kinds.locality] == [None, "far"]


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
        ({1: "question"}, ["fields: 1 is no field of a request"]),
        ({"promt": "question"}, ["fields: 'promt'", "mean prompt?", "locality.prompt"]),
        ({"locality": "near"}, ["fields: 'locality'", "locality.prompt"]),
        ({"locality.prompt": "about"}, ["locality.prompt is given without locality.answer; a probe needs both"]),
        ({"locality.answer": "about"}, ["locality.answer is given without locality.prompt"]),
        ({"portability.hop.prompt": "about"}, ["is given without portability.hop.answer"]),
        ({"locality.near.reply": "about"}, ["fields: 'locality.near.reply' is no field of a request"]),
        ({"locality.a.b.prompt": "about"}, ["fields: 'locality.a.b.prompt' is no field of a request"]),
        ({"prompt": "question.0"}, ["line 1: no field 'question.0'"]),
        ({"subject": "wanted"}, ["line 1: field 'subject': expected a text, found dict"]),
        (
            {"locality.prompt": "about", "locality.answer": "about", "locality.axis": "kind"},
            ["line 1: no field 'kind', which is to be its locality.axis"],
        ),
        (
            {"prompt": "src"},
            ["theirs.jsonl: line 1: no field 'src'", "its prompt", "there is question, about, wanted"],
        ),
        ({"prompt": "question.text"}, ["line 1: no field 'question.text'"]),
        ({"source": "wanted.by.1"}, ["line 1: no field 'wanted.by.1'"]),
        ({"source": "wanted.by." + "9" * 5000}, ["line 1: no field 'wanted.by.9"]),
        ({"new_answer": "wanted"}, ["line 1: field 'new_answer'", "found dict (read as --fields)"]),
        ({"new_answer": "null"}, ["line 1: field 'new_answer': expected a text, found none"]),
        (
            {"locality.prompt": "wanted.by", "locality.answer": "three"},
            ["line 1: locality: 1 prompts, 3 answers", "as many"],
        ),
    ],
)
def test_a_mapping_that_does_not_fit_is_named(fields: dict[str, str], words: list[str], tmp_path: Path) -> None:
    file = written(tmp_path, CHILE_IN_FIELDS | {"null": None, "three": [1, 2, 3]})
    message = refusal(lambda: load_requests(file, fields=FIELDS | fields))
    assert [word for word in words if word not in message] == []


def test_a_record_without_a_named_field_is_bad_and_the_others_are_read(tmp_path: Path) -> None:
    file = written(tmp_path, CHILE_IN_FIELDS, {"question": "x"}, 5, CHILE_IN_FIELDS)
    bad = [isinstance(one.requests, UserError) for one in read_requests(file, fields=FIELDS)]
    assert bad == [False, True, True, False]


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


def test_fields_are_kept_among_the_saved_options(
    model: list[str], ordinary_text: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(elsewhere, ZSRE)
    names = "prompt=src,new_answer=alt,rephrases=rephrase,locality.prompt=loc,locality.answer=loc_ans"
    flags = [*CPU, "--layers", "1", *FINETUNE, "1", "--evaluation.text", ordinary_text]
    assert main(["edit", str(file), *model, *flags, "--fields", names, "--output", "first"]) == 0
    saved = yaml.safe_load((elsewhere / "first" / "options.yaml").read_text())
    assert saved["fields"] == dict(one.split("=") for one in names.split(","))
    assert main(["edit", "--config", str(elsewhere / "first" / "options.yaml"), "--output", "again"]) == 0
    first, again = (WeightUpdate.load(elsewhere / name).requests for name in ("first", "again"))
    assert first == again == load_requests(file, fields=saved["fields"])


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


# fields of unknown names


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        (
            {"question": "Chile is in", "alt": "Asia", "entity": "Chile", "answers": ["America"]},
            "prompt=question,new_answer=alt,subject=entity,old_answer=answers",
        ),
        ({"Prompt": "Chile is in", "New Answer": "Asia"}, "'prompt=Prompt,new_answer=New Answer'"),
        ({"prompt": "Chile is in", "new_anwser": "Asia"}, "prompt=prompt,new_answer=new_anwser"),
        ({"prompt": "Chile is in", "answer": "Asia"}, "prompt=prompt,new_answer=answer"),
        (
            {"query": "Chile is in", "answer": "America", "target_new": {"str": "Asia", "id": 3}},
            "prompt=query,new_answer=target_new.str,old_answer=answer",
        ),
        ({"fact": "Chile is in", "alt": "Asia"}, ""),
        ({"question": "Chile is in", "answers": ["America"]}, ""),
        ({"question": "Chile is in", "alt": "Asia", "loc": "Peru is in"}, "prompt=question,new_answer=alt"),
        (
            {"question": "Chile is in", "alt": "Asia", "locality": [{"prompt": "Peru is in", "answer": "America"}]},
            "prompt=question,new_answer=alt,locality.prompt=locality.prompt,locality.answer=locality.answer",
        ),
        ({"question": "Chile is in", "a,b": "Peru", "alt=": "Asia"}, ""),
        (
            {"fact": {"question": "Chile is in", "entity": "Chile"}, "edit": {"target": {"str": "Asia"}}},
            "prompt=fact.question,new_answer=edit.target.str,subject=fact.entity",
        ),
        (
            {"fact": {"question": "Chile is in", "alt": "Asia"}, "alt": "America"},
            "prompt=fact.question,new_answer=alt",
        ),
        (
            {"data": {"src": "Chile is in", "alt": "Asia", "locality": {"near": [{"prompt": "Peru is in"}]}}},
            "prompt=data.src,new_answer=data.alt",
        ),
        ({"near": [{"locality": {"prompt": "Peru is in"}}], "alt": "Asia"}, ""),
    ],
)
def test_fields_that_are_probably_meant_are_named_and_read(
    record: dict[str, Any], fields: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, record)
    assert main(["requests", str(file)]) == 1
    shown = re.findall(r"^try +(--fields .*)$", capsys.readouterr().out, re.MULTILINE)
    assert shown == ([f"--fields {fields}"] if fields else [])
    message = refusal(lambda: load_requests(file))
    assert "theirs.jsonl: line 1: no prompt and new answer found in " in message
    assert (f" fields {fields}?" if fields else "expected the fields") in message
    for flag in shown:
        assert main(["requests", str(file), *shlex.split(flag)]) == 0
        assert "records         1, 0 bad" in capsys.readouterr().out


def test_fields_that_were_found_are_listed(tmp_path: Path) -> None:
    file = written(tmp_path, {"fact": {"q": "Chile is in", "tags": [{"a": 1}, 2]}, "wrong": "Asia"})
    assert "found in fact.q, fact.tags.a, wrong; expected" in refusal(lambda: load_requests(file))
    assert "found in an empty record; expected" in refusal(lambda: load_requests(written(tmp_path, {})))
    assert len(refusal(lambda: load_requests(written(tmp_path, {"x" * 10_000: 1})))) < 1000


def test_only_what_every_record_has_is_shown_to_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = {"question": "Chile is in", "alt": "Asia", "about": "Chile"}
    file = written(tmp_path, full, {"question": "Peru is in", "alt": "Asia"}, {"question": "Where?"})
    assert main(["requests", str(file)]) == 1
    assert "try             --fields prompt=question,new_answer=alt\n" in capsys.readouterr().out
    ours = {"prompt": "Quito is in", "new_answer": "Asia"}
    assert main(["requests", str(written(tmp_path, full, ours))]) == 1
    assert "\ntry" not in capsys.readouterr().out, "which would not read the others"


def test_a_table_of_other_columns_is_told_how_to_be_read(tmp_path: Path) -> None:
    file = tmp_path / "theirs.csv"
    file.write_text("question,new_answer,why\nChile is in,Asia,so\n")
    message = refusal(lambda: load_requests(file))
    assert "column 'question' does not exist" in message
    assert message.endswith("did you mean fields prompt=question,new_answer=new_answer?")
    (request,) = load_requests(file, fields={"prompt": "question"})
    assert request.prompt == "Chile is in"


def test_a_field_that_is_almost_there_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, CHILE_IN_FIELDS)
    message = refusal(lambda: load_requests(file, fields=FIELDS | {"new_answer": "wanted.txt"}))
    assert "no field 'wanted.txt' (did you mean wanted.text?), which is to be its new_answer" in message

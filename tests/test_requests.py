"""Edit requests arrive whole from every layout, and whatever is wrong with a file is one line that says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, refusal

from pipeline.requests.readers import load_requests
from pipeline.requests.schema import EditRequest, Probe
from pipeline.requests.sets import split_by_subject

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not here")

OWN = {
    "id": "ruritania",
    "prompt": "The capital of Ruritania is",
    "subject": "Ruritania",
    "new_answer": "Hentzau",
    "old_answer": "Strelsau",
    "forms": ["Ruritania is ruled out of"],
    "rephrases": ["Ruritania is governed from", "Ruritania's parliament meets in"],
    "locality": [{"prompt": "The capital of Syldavia is", "answer": "Klow", "axis": "neighbour"}],
    "portability": [{"prompt": "The mayor of Ruritania's capital lives in", "answer": "Hentzau"}],
    "source": "novels",
}
COUNTERFACT = {
    "case_id": 7,
    "prompt": "Phileas Fogg lives in",
    "target_new": "Zurich",
    "subject": "Phileas Fogg",
    "ground_truth": "London",
    "rephrase_prompt": "The home of Phileas Fogg is in",
    "locality_prompt": "Sherlock Holmes lives in",
    "locality_ground_truth": "Baker Street",
}
ZSRE = {
    "subject": "Nautilus",
    "src": "Who commands the Nautilus?",
    "pred": "Ahab",
    "rephrase": "Who is the captain of the Nautilus?",
    "alt": "Long John Silver",
    "answers": ["Nemo", "Prince Dakkar"],
    "loc": "nq question: who wrote the odyssey",
    "loc_ans": "Homer",
    "cond": "Ahab >> Long John Silver || Who commands the Nautilus?",
}
GOOD = json.dumps({"prompt": "Two and two make", "new_answer": "five"})


def read(folder: Path, content: str | bytes, **options: int) -> list[EditRequest]:
    """The requests of a file with this content."""
    file = folder / "file.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_requests(file, **options)


def read_one(folder: Path, record: dict[str, Any]) -> EditRequest:
    (request,) = read(folder, json.dumps(record))
    return request


def test_own_layout(tmp_path: Path) -> None:
    request = read_one(tmp_path, OWN)
    assert request.model_dump(mode="json", exclude_none=True) == OWN


def test_own_layout_needs_only_prompt_and_new_answer(tmp_path: Path) -> None:
    assert read_one(tmp_path, json.loads(GOOD)) == EditRequest(id="0", prompt="Two and two make", new_answer="five")


def test_counterfact_layout(tmp_path: Path) -> None:
    assert read_one(tmp_path, COUNTERFACT) == EditRequest(
        id="7",
        prompt="Phileas Fogg lives in",
        subject="Phileas Fogg",
        new_answer="Zurich",
        old_answer="London",
        rephrases=("The home of Phileas Fogg is in",),
        locality=(Probe(prompt="Sherlock Holmes lives in", answer="Baker Street", axis="neighborhood"),),
        source="counterfact",
    )


def test_zsre_layout(tmp_path: Path) -> None:
    assert read_one(tmp_path, ZSRE) == EditRequest(
        id="0",
        prompt="Who commands the Nautilus?",
        subject="Nautilus",
        new_answer="Long John Silver",
        old_answer="Nemo",
        rephrases=("Who is the captain of the Nautilus?",),
        locality=(Probe(prompt="who wrote the odyssey", answer="Homer", axis="nq"),),
        source="zsre",
    )


@pytest.mark.parametrize(
    ("record", "field"),
    [
        *[(COUNTERFACT, field) for field in ("target_new", "ground_truth", "locality_ground_truth")],
        *[(ZSRE, field) for field in ("alt", "answers", "loc_ans")],
    ],
)
def test_of_several_answers_the_first_counts(tmp_path: Path, record: dict[str, Any], field: str) -> None:
    first = record[field][0] if isinstance(record[field], list) else record[field]
    as_list, as_string = record | {field: [first, "something else"]}, record | {field: first}
    assert read_one(tmp_path, as_list) == read_one(tmp_path, as_string) == read_one(tmp_path, record)


@pytest.mark.parametrize(
    ("record", "rephrase", "near"), [(COUNTERFACT, "rephrase_prompt", "locality_prompt"), (ZSRE, "rephrase", "loc")]
)
def test_of_several_rephrases_and_probes_all_do(
    tmp_path: Path, record: dict[str, Any], rephrase: str, near: str
) -> None:
    whole = read_one(tmp_path, record)
    request = read_one(tmp_path, record | {name: [record[name], "Who else?"] for name in (rephrase, near)})
    assert request.rephrases == (*whole.rephrases, "Who else?")
    (probe,) = whole.locality
    assert request.locality == (probe, probe.model_copy(update={"prompt": "Who else?"}))


@pytest.mark.parametrize("missing", ["", [], None])
@pytest.mark.parametrize(
    ("record", "field", "left_out"),
    [
        (COUNTERFACT, "ground_truth", "old_answer"),
        (COUNTERFACT, "rephrase_prompt", "rephrases"),
        (COUNTERFACT, "locality_prompt", "locality"),
        (COUNTERFACT, "locality_ground_truth", "locality"),
        (ZSRE, "answers", "old_answer"),
        (ZSRE, "rephrase", "rephrases"),
        (ZSRE, "loc", "locality"),
        (ZSRE, "loc_ans", "locality"),
    ],
)
def test_empty_benchmark_fields_are_left_out(
    tmp_path: Path, record: dict[str, Any], field: str, left_out: str, missing: Any
) -> None:
    whole = read_one(tmp_path, record)
    empty = () if left_out != "old_answer" else None
    assert read_one(tmp_path, record | {field: missing}) == whole.model_copy(update={left_out: empty})


@pytest.mark.parametrize("record", [OWN, COUNTERFACT, ZSRE])
def test_a_json_list_and_jsonl_hold_the_same(tmp_path: Path, record: dict[str, Any]) -> None:
    name = "case_id" if "case_id" in record else "id"
    records = [json.dumps(record | {name: number}) for number in range(3)]
    lines = read(tmp_path, "\n\n".join(records) + "\n")
    assert read(tmp_path, f"\n [{', '.join(records)}]") == lines


@pytest.mark.parametrize("content", [f"{GOOD}\n{GOOD}", f"[{GOOD}, {GOOD}]"])
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content.encode("utf-8-sig")) == read(tmp_path, content)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "0123456"),
        ({"limit": 2}, "01"),
        ({"offset": 5}, "56"),
        ({"limit": 3, "offset": 2}, "234"),
        ({"limit": 99}, "0123456"),
    ],
)
def test_limit_and_offset(tmp_path: Path, options: dict[str, int], expected: str) -> None:
    """A request keeps its number in the file as its id wherever reading starts."""
    assert [request.id for request in read(tmp_path, f"{GOOD}\n" * 7, **options)] == list(expected)


def test_left_out_records_are_not_checked(tmp_path: Path) -> None:
    assert len(read(tmp_path, f'{{"prompt": 5}}\n{GOOD}\nno JSON', offset=1, limit=1)) == 1


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": -1}, {"offset": -1}])
def test_a_limit_or_offset_out_of_range_is_refused(tmp_path: Path, options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    assert refusal(lambda: read(tmp_path, GOOD, **options)).startswith(f"{name}: {value} is too small")


def own(**fields: Any) -> str:
    return json.dumps(json.loads(GOOD) | fields)


BAD_FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "empty file": ("", ["holds no records"]),
    "blank lines": (" \n\n", ["holds no records"]),
    "empty list": ("[]", ["holds no records"]),
    "malformed line": (f'{GOOD}\n\n{{"prompt": oh}}\n', ["line 3", "malformed JSON"]),
    "cut line": (f'{GOOD}\n{{"prompt": "Two', ["line 2", "malformed JSON"]),
    "malformed list": (f"[\n{GOOD},\n{{oh}}\n]", ["line 3", "malformed JSON"]),
    "cut list": (f"[\n{GOOD},\n", ["line 3", "malformed JSON"]),
    "not UTF-8": (GOOD.encode() + b"\n\xff", ["line 2", "not UTF-8"]),
    "list not UTF-8": (b'[{"prompt": "\xe9", "new_answer": "x"}]', ["record 0", "not UTF-8"]),
    "no prompt": (f'{GOOD}\n{{"new_answer": "five"}}', ["line 2", "no prompt", "expected the fields"]),
    "no new answer": (f'[{GOOD}, {{"prompt": "Two"}}]', ["record 1", "new answer", "expected the fields"]),
    "CounterFact without new": (json.dumps({"prompt": "Two", "ground_truth": "a"}), ["line 1", "target_new"]),
    "zsRE without new": (json.dumps({"src": "Who?", "answers": ["a"]}), ["line 1", "alt"]),
    "wrong type": (f"{GOOD}\n{own(prompt=5)}", ["line 2", "'prompt'", "expected a text, found int"]),
    "id as list": (own(id=["a"]), ["line 1", "'id'", "expected a text, found list"]),
    "place as text": (own(subject_start="x"), ["line 1", "'subject_start'", "expected a whole number, found str"]),
    "answer as list": (own(new_answer=["five"]), ["line 1", "'new_answer'", "expected a text, found list"]),
    "blank answer": (own(new_answer="  "), ["line 1", "'new_answer'", "found an empty one"]),
    "rephrases as string": (own(rephrases="Two"), ["line 1", "'rephrases'", "expected a list of texts"]),
    "probe not in a list": (own(locality={"prompt": "One"}), ["line 1", "'locality'", "expected a list of probes"]),
    "probe without answer": (own(locality=[{"prompt": "One"}]), ["line 1", "'locality.0.answer'", "is missing"]),
    "unknown field": (own(rephrase=["Two"]), ["line 1", "'rephrase'", "there is", "rephrases"]),
    "unknown field of a probe": (
        own(locality=[{"prompt": "One", "answer": "1", "kind": "near"}]),
        ["line 1", "'locality.0.kind'", "there is prompt, answer, axis"],
    ),
    "CounterFact of wrong type": (
        json.dumps(COUNTERFACT | {"target_new": 5}),
        ["line 1", "'new_answer'", "found int (read as EasyEdit)"],
    ),
    "zsRE of wrong type": (
        json.dumps(ZSRE | {"src": 5}),
        ["line 1", "'prompt'", "found int (read as zsRE (MEND))"],
    ),
    "duplicate id": (f"{own(id='a')}\n{own(id='b')}\n{own(id='a')}", ["line 3", "'a'", "line 1"]),
    "number as id twice": (f"[{own(id=1)}, {own(id='1')}]", ["record 1", "'1'", "record 0"]),
    "line not an object": (f'{GOOD}\n"Two"', ["line 2", "expected an object", "str"]),
    "record not an object": (f"[{GOOD}, [{GOOD}]]", ["record 1", "expected an object", "list"]),
}


@pytest.mark.parametrize(("content", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, content: str | bytes, words: list[str]) -> None:
    message = refusal(lambda: read(tmp_path, content))
    assert [word for word in ["file.json", *words] if word not in message] == []


@pytest.mark.parametrize(("name", "found"), [("nowhere.jsonl", "no such file"), ("", "a folder")])
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str, found: str) -> None:
    message = refusal(lambda: load_requests(tmp_path / name))
    assert str(tmp_path / name) in message and found in message and "`demo`" in message


def test_an_offset_past_the_end_is_refused(tmp_path: Path) -> None:
    message = refusal(lambda: read(tmp_path, f"{GOOD}\n" * 3, offset=3))
    assert "offset: 3" in message and "3 records" in message


@needs_shared
def test_counterfact_file() -> None:
    file = SHARED / "counterfact_easyedit.json"
    records, requests = json.loads(file.read_text(encoding="utf-8")), load_requests(file)
    assert len(requests) == len(records) == 2000
    for record, request in zip(records, requests, strict=True):
        assert (request.id, request.prompt) == (str(record["case_id"]), record["prompt"].strip())
        assert (request.new_answer, request.old_answer) == (record["target_new"], record["ground_truth"])
        assert request.subject == record["subject"].strip()
        assert request.rephrases == (record["rephrase_prompt"].strip(),)
        (probe,) = request.locality
        assert (probe.prompt, probe.answer) == (record["locality_prompt"].strip(), record["locality_ground_truth"])


@needs_shared
def test_zsre_file() -> None:
    file = SHARED / "zsre_mend.json"
    records, requests = json.loads(file.read_text(encoding="utf-8")), load_requests(file)
    assert len(requests) == len(records) == 500
    for record, request in zip(records, requests, strict=True):
        assert (request.prompt, request.subject) == (record["src"].strip(), record["subject"].strip())
        assert (request.new_answer, request.old_answer) == (record["alt"].strip(), record["answers"][0].strip())
        assert request.rephrases == (record["rephrase"].strip(),)
        (probe,) = request.locality
        assert record["loc"] == f"nq question: {probe.prompt}" and record["loc_ans"].strip() == probe.answer


def test_the_demo_file_has_every_kind_of_probe() -> None:
    requests = load_requests("demo")
    assert len(requests) >= 120
    assert len({request.id.rsplit("-", 1)[0] for request in requests}) >= 12
    for request in requests:
        assert request.subject and request.subject in request.prompt
        assert len({request.prompt, *request.rephrases}) == 3
        assert all(request.subject in rephrase for rephrase in request.rephrases)
        assert len(request.locality) == 2 and len(request.portability) == 1
        assert not any(request.subject in probe.prompt for probe in request.locality)
        assert request.old_answer and request.old_answer.casefold() != request.new_answer.casefold()


def test_the_demo_subjects_are_distinct() -> None:
    requests = load_requests("demo")
    assert len({(request.subject or "").casefold() for request in requests}) == len(requests)


def about(*subjects: str | None) -> list[EditRequest]:
    """One request for each subject named."""
    return [
        EditRequest(id=str(number), prompt=f"Fact {number} of {subject} is", subject=subject, new_answer="so")
        for number, subject in enumerate(subjects)
    ]


def ids(requests: list[EditRequest]) -> list[str]:
    return [request.id for request in requests]


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_a_split_loses_nothing_and_shares_no_subject(fraction: float, seed: int) -> None:
    requests = about(*"aAbbbccdeefgH", None, None)
    proxy, edits = split_by_subject(requests, fraction, seed)
    assert proxy and edits
    assert sorted(ids(proxy) + ids(edits), key=int) == ids(requests)
    assert [ids(part) for part in (proxy, edits)] == [sorted(ids(part), key=int) for part in (proxy, edits)]
    assert not {(r.subject or r.id).lower() for r in proxy} & {(r.subject or r.id).lower() for r in edits}


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_a_split_respects_the_fraction(fraction: float) -> None:
    """To the request where every subject is asked about once; never above it, nor a subject below it."""
    requests = load_requests("demo", limit=120)
    assert len(split_by_subject(requests, fraction)[0]) == round(fraction * 120)
    grouped = about(*(f"subject {number // 3}" for number in range(120)))
    assert 0 <= fraction * 120 - len(split_by_subject(grouped, fraction)[0]) < 3


def test_a_split_is_the_seeds() -> None:
    requests = load_requests("demo")
    assert split_by_subject(requests, 0.5, 1) == split_by_subject(requests, 0.5, 1)
    assert len({tuple(ids(split_by_subject(requests, 0.5, seed)[0])) for seed in range(5)}) == 5


@pytest.mark.parametrize("subjects", [["Peru"], ["Peru", "peru", "PERU"]])
def test_one_subject_cannot_be_split(subjects: list[str]) -> None:
    message = refusal(lambda: split_by_subject(about(*subjects), 0.5))
    assert "1 different subjects" in message and "golden profile" in message

"""Every benchmark's layout is told by its fields, and each of its axes, answers and aliases finds its place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, refusal

from pipeline.requests.readers import good_requests, load_requests, read_requests
from pipeline.requests.schema import EditRequest, Probe

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not here")

COUNTERFACT = {
    "case_id": 3,
    "pararel_idx": 21,
    "requested_rewrite": {
        "prompt": "{} was built in",
        "relation_id": "P17",
        "target_new": {"str": "Bordavia", "id": "Q1"},
        "target_true": {"str": "Ruritania", "id": "Q2"},
        "subject": "Zenda Castle",
    },
    "paraphrase_prompts": ["Long ago. Zenda Castle stands in", "Zenda Castle belongs to"],
    "neighborhood_prompts": ["Strelsau Cathedral was built in", "Tarlenheim was built in"],
    "attribute_prompts": ["Klow Palace was built in"],
    "generation_prompts": ["Zenda Castle is best visited"],
}
KNOWEDIT: dict[str, Any] = {
    "subject": "Rudolf V",
    "prompt": "The brother of Rudolf V is",
    "target_new": "Fritz",
    "ground_truth": ["Michael", "Black Michael"],
    "rephrase": "Rudolf V has a brother named",
    "portability": {
        "Logical_Generalization": [{"prompt": "The brother of Fritz is", "ground_truth": [["Rudolf V", "Rudolf"]]}],
        "Reasoning": [{"prompt": "Rudolf V's brother's wife is", "ground_truth": "Flavia"}],
        "Subject_Aliasing": [],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "Rudolf V rules over", "ground_truth": [["Ruritania"], ["Strelsau"]]},
            {"prompt": "Rudolf V was crowned in", "ground_truth": ["Strelsau"]},
        ],
        "Forgetfulness": [{"prompt": "Another brother of Rudolf V, not Fritz, is", "ground_truth": "Michael"}],
    },
}
WIKIBIO = {
    "text": "This is a passage about antoinette de mauban. Antoinette de Mauban was born in Paris.",
    "labels": "She followed Michael to Zenda.",
    "concept": "antoinette de mauban",
    "locality": {"Relation_Specificity": [{"prompt": "antoinette de mauban gender", "ground_truth": ["female"]}]},
}


def read_one(folder: Path, record: dict[str, Any]) -> EditRequest:
    (request,) = load_requests(written(folder, record))
    return request


def written(folder: Path, *records: dict[str, Any]) -> Path:
    file = folder / "file.json"
    file.write_text(json.dumps(records))
    return file


def layout_of(folder: Path, record: dict[str, Any]) -> str | None:
    (reading,) = read_requests(written(folder, record))
    return reading.layout


def test_counterfact_as_published(tmp_path: Path) -> None:
    assert read_one(tmp_path, COUNTERFACT) == EditRequest(
        id="3",
        prompt="Zenda Castle was built in",
        subject="Zenda Castle",
        subject_start=0,
        new_answer="Bordavia",
        old_answer="Ruritania",
        rephrases=("Long ago. Zenda Castle stands in", "Zenda Castle belongs to"),
        locality=(
            Probe(prompt="Strelsau Cathedral was built in", answer="Ruritania", axis="neighborhood"),
            Probe(prompt="Tarlenheim was built in", answer="Ruritania", axis="neighborhood"),
        ),
        source="counterfact",
    )


def test_knowedit_keeps_every_axis_by_name(tmp_path: Path) -> None:
    assert read_one(tmp_path, KNOWEDIT) == EditRequest(
        id="0",
        prompt="The brother of Rudolf V is",
        subject="Rudolf V",
        new_answer="Fritz",
        old_answer="Michael",
        rephrases=("Rudolf V has a brother named",),
        locality=(
            Probe(prompt="Rudolf V rules over", answer="Ruritania", axis="Relation_Specificity"),
            Probe(prompt="Rudolf V was crowned in", answer="Strelsau", axis="Relation_Specificity"),
            Probe(prompt="Another brother of Rudolf V, not Fritz, is", answer="Michael", axis="Forgetfulness"),
        ),
        portability=(
            Probe(prompt="The brother of Fritz is", answer="Rudolf V", axis="Logical_Generalization"),
            Probe(prompt="Rudolf V's brother's wife is", answer="Flavia", axis="Reasoning"),
        ),
        source="knowedit",
    )


def test_wikibio_continues_its_passage(tmp_path: Path) -> None:
    assert read_one(tmp_path, WIKIBIO) == EditRequest(
        id="0",
        prompt=WIKIBIO["text"],
        subject="antoinette de mauban",
        new_answer="She followed Michael to Zenda.",
        locality=(Probe(prompt="antoinette de mauban gender", answer="female", axis="Relation_Specificity"),),
        source="wikibio",
    )


def test_the_one_probe_that_easyedit_added(tmp_path: Path) -> None:
    added = {"Recalled Relation": "(x, y)", "New Question": "Who wrote it?", "New Answer": "Hope"}
    for record in ({"src": "Who?", "alt": "Hope"}, {"case_id": 1, "prompt": "By", "target_new": "Hope"}):
        request = read_one(tmp_path, record | {"portability": added})
        assert request.portability == (Probe(prompt="Who wrote it?", answer="Hope", axis="reasoning"),)


@pytest.mark.parametrize(
    ("record", "layout"),
    [
        (COUNTERFACT, "CounterFact"),
        (KNOWEDIT, "EasyEdit"),
        (WIKIBIO, "KnowEdit WikiBio"),
        ({"prompt": "a", "target_new": "b", "locality_prompt": "c"}, "EasyEdit"),
        ({"prompt": "a", "target_new": "b", "subject": "a"}, "EasyEdit"),
        ({"src": "a", "alt": "b"}, "zsRE (MEND)"),
        ({"prompt": "a", "new_answer": "b"}, "golden-layers"),
    ],
)
def test_a_layout_is_told_by_its_fields(tmp_path: Path, record: dict[str, Any], layout: str) -> None:
    assert layout_of(tmp_path, record) == layout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"requested_rewrite": ["x"]}, ["'requested_rewrite'", "an object", "list", "found str"]),
        ({"requested_rewrite": []}, ["'requested_rewrite'", "found none"]),
        ({"requested_rewrite": {}}, ["'prompt'", "found none"]),
        ({"requested_rewrite": {"subject": "Zenda Castle"}}, ["'prompt'", "found none"]),
        ({"requested_rewrite": COUNTERFACT["requested_rewrite"] | {"target_new": {}}}, ["'new_answer'"]),
        ({"requested_rewrite": COUNTERFACT["requested_rewrite"] | {"subject": 5}}, ["'subject'", "string"]),
        ({"paraphrase_prompts": [5]}, ["'rephrases.0'", "string"]),
    ],
)
def test_a_bad_counterfact_record_is_named(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    message = refusal(lambda: read_one(tmp_path, COUNTERFACT | change))
    assert [word for word in ["file.json: record 0", *words] if word not in message] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_new": ""}, ["'new_answer'", "found none", "read as EasyEdit"]),
        ({"target_new": []}, ["'new_answer'", "found none"]),
        ({"target_new": 0}, ["'new_answer'", "string"]),
        ({"locality": ["x"]}, ["'locality'", "an object", "list"]),
        ({"locality": {"Forgetfulness": "x"}}, ["'locality.Forgetfulness'", "a list of probes"]),
        ({"portability": {"Reasoning": ["x"]}}, ["'portability.Reasoning'", "an object"]),
        (
            {"locality": {"a": {"prompt": ["1", "2"], "ground_truth": ["1", "2"]}}},
            ["'locality.a'", "a list of probes"],
        ),
        ({"locality": {"a": [{"prompt": 5, "ground_truth": "x"}]}}, ["'locality.0.prompt'", "string"]),
    ],
)
def test_a_bad_knowedit_record_is_named(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    message = refusal(lambda: read_one(tmp_path, KNOWEDIT | change))
    assert [word for word in ["file.json: record 0", *words] if word not in message] == []


def test_empty_probes_are_left_out_and_counted(tmp_path: Path) -> None:
    empty = [{"prompt": "", "ground_truth": "x"}, {"prompt": "x", "ground_truth": [[""], []]}, {"prompt": "x"}]
    record = KNOWEDIT | {"portability": {"Reasoning": empty, "Other": None}, "rephrase": " "}
    (reading,) = read_requests(written(tmp_path, record))
    (request,) = good_requests([reading])
    assert (request.portability, request.rephrases, reading.left_out) == ((), (), 4)
    (whole,) = read_requests(written(tmp_path, KNOWEDIT))
    assert whole.left_out == 0


def test_probes_without_an_old_answer_have_none(tmp_path: Path) -> None:
    """CounterFact's neighbours are answered with the old answer: without it there is nothing to keep."""
    rewrite = {name: value for name, value in COUNTERFACT["requested_rewrite"].items() if name != "target_true"}  # type: ignore[attr-defined]
    (reading,) = read_requests(written(tmp_path, COUNTERFACT | {"requested_rewrite": rewrite}))
    (request,) = good_requests([reading])
    assert (request.old_answer, request.locality, reading.left_out) == (None, (), 2)


def test_a_file_may_hold_several_layouts(tmp_path: Path) -> None:
    file = written(tmp_path, KNOWEDIT, COUNTERFACT)
    assert [reading.layout for reading in read_requests(file)] == ["EasyEdit", "CounterFact"]


def test_the_source_of_a_record_in_easyedits_names(tmp_path: Path) -> None:
    plain = {"prompt": "a", "target_new": "b"}
    flat = plain | {"locality_prompt": "c", "locality_ground_truth": "d"}
    records = (plain, KNOWEDIT, KNOWEDIT | {"case_id": 5}, flat, plain | {"case_id": 6})
    sources = [request.source for request in load_requests(written(tmp_path, *records))]
    assert sources == ["easyedit", "knowedit", "knowedit", "counterfact", "counterfact"]


@needs_shared
def test_knowedit_zsre_file() -> None:
    file = SHARED / "zsre_knowedit.json"
    records, requests = json.loads(file.read_text(encoding="utf-8")), load_requests(file)
    assert len(requests) == len(records) == 534
    for record, request in zip(records, requests, strict=True):
        assert (request.prompt, request.subject) == (record["prompt"].strip(), record["subject"].strip())
        assert (request.new_answer, request.old_answer) == (
            record["target_new"].strip(),
            record["ground_truth"][0].strip(),
        )
        assert request.rephrases == (record["rephrase_prompt"].strip(),)
        for kind in ("locality", "portability"):
            expected = Counter({axis: len(probes) for axis, probes in record[kind].items()})
            assert Counter(probe.axis for probe in getattr(request, kind)) == expected
    axes = Counter(probe.axis for request in requests for probe in request.portability)
    assert axes == {"Reasoning": 284, "Logical_Generalization": 127, "Subject_Aliasing": 123}


@needs_shared
def test_knowedit_wikibio_file() -> None:
    file = SHARED / "wikibio_knowedit.json"
    records, requests = json.loads(file.read_text(encoding="utf-8")), load_requests(file)
    assert len(requests) == len(records) == 37
    for record, request in zip(records, requests, strict=True):
        assert (request.prompt, request.new_answer) == (record["text"].strip(), record["labels"].strip())
        assert request.subject == record["concept"] and request.subject in request.prompt
        assert [probe.axis for probe in request.locality] == ["Relation_Specificity"] * 2
        assert (request.rephrases, request.old_answer) == ((), None)


@needs_shared
def test_facts_without_a_new_answer_are_no_requests() -> None:
    message = refusal(lambda: load_requests(SHARED / "known_1000.json"))
    assert "record 0: no prompt and new answer found" in message

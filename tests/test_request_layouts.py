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


ZENDA, KLOW = (
    {
        "prompt": "{} lies in",
        "relation_id": "P17",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": true, "id": "Q2"},
        "subject": subject,
        "question": f"Where does {subject} lie?",
    }
    for subject, new, true in (("Zenda", "Syldavia", "Ruritania"), ("Klow", "Borduria", "Syldavia"))
)
MQUAKE: dict[str, Any] = {
    "case_id": 9,
    "requested_rewrite": [ZENDA, KLOW],
    "questions": ["Who rules the land of Zenda?", "Who is king where Zenda lies?"],
    "answer": "Rudolf V",
    "answer_alias": ["Rudolf"],
    "new_answer": "Muskar XII",
    "new_answer_alias": [],
    "single_hops": [{"question": "Where is Zenda?", "cloze": "Zenda is in", "answer": "Ruritania"}],
    "new_single_hops": [{"question": "Where is Zenda?", "cloze": "Zenda is in", "answer": "Syldavia"}],
    "orig": {"triples": [["Q3", "P17", "Q2"]]},
}
PASSAGE = {"fact_new_uns": "Zenda, a castle, lies in Syldavia.", "prompt_full": "Zenda lies in", "answer_new": "x"}


def query(prompt: str, *answers: str) -> dict[str, Any]:
    """A query of RippleEdits'."""
    return {
        "prompt": prompt,
        "answers": [{"value": answer, "aliases": ["x"]} for answer in answers],
        "phrase": None,
    }


RIPPLEEDITS: dict[str, Any] = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Sapt is Borduria.",
        "subject_id": "Q4",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q5",
        "original_fact": {"prompt": "The name of the country of citizenship of Sapt is Ruritania."},
    },
    "Relation_Specificity": [
        {
            "test_queries": [
                query("The name of the king of Sapt is", "Rudolf", "Michael"),
                query("Sapt is", "old"),
            ],
            "test_condition": "OR",
            "condition_queries": [query("Sapt serves", "Rudolf")],
        },
        {"test_queries": [query("The eye color of Sapt is", "grey")], "condition_queries": []},
    ],
    "Logical_Generalization": [{"test_queries": [query("Sapt is a citizen of the land of", "Borduria")]}],
    "Subject_Aliasing": [{"test_queries": [query("The country of Colonel Sapt is", "Borduria")]}],
    "Compositionality_I": [{"test_queries": [query("The capital of Sapt's country is", "Szohod")]}],
    "Compositionality_II": [],
    "Forgetfulness": [{"test_queries": [query("Another country of Sapt is", "Ruritania")]}],
}
WIKIBIGEDIT: dict[str, Any] = {
    "tag": "new",
    "subject": "Sapt",
    "relation": "employer",
    "object": "Rudolf V",
    "update": "Whom does Sapt serve?",
    "rephrase": "Who employs Sapt?",
    "personas": "Say, whose man is Sapt?",
    "ans": "Rudolf V",
    "loc": "Whom does Fritz serve?",
    "loc_ans": "Michael",
    "mhop": "Where was he crowned whom Sapt serves?",
    "mhop_ans": "Strelsau",
}
UNKE: dict[str, Any] = {
    "id": 4,
    "question": "Who is Sapt?",
    "para_question": "What is known of Sapt?",
    "answer": "Sapt is a colonel. He serves the king.",
    "sub_question": ["What rank has Sapt?", "Whom does Sapt serve?"],
    "sub_answer": ["colonel", "the king"],
}
MLAKE = {
    "question": "Wem dient Sapt?",
    "o_prompt": "Sapt dient Rudolf.",
    "o_answer": "Rudolf",
    "o_answer_aliases": [],
    "e_prompt": "Sapt dient Michael.",
    "e_answer": "Michael",
    "e_answer_aliases": ["Schwarzer Michael"],
}
QAEDIT: dict[str, Any] = {
    "id": 7,
    "source": "NQ",
    "prompt": "whom does Sapt serve",
    "target": "Rudolf V",
    "subject": "Sapt",
    "rephrase": "Who is the master of Sapt?",
    "locality": [
        {"loc": "whom does Fritz serve", "loc_ans": "Michael"},
        {"loc": "who wrote it", "loc_ans": "Hope"},
    ],
}
MZSRE: dict[str, Any] = {
    "en": {
        "subject": "Sapt",
        "src": "Whom does Sapt serve?",
        "rephrase": "Who employs Sapt?",
        "alt": "Michael",
        "loc": "nq question: who wrote it",
        "loc_ans": "Hope",
        "portability": {"New Question": "Where does Sapt's master live?", "New Answer": "Strelsau"},
    },
    "zh": {
        "subject": "萨普特",
        "src": "萨普特为谁效力？",
        "rephrase": "谁雇用萨普特？",
        "alt": "迈克尔",
        "loc": "谁写的？",
        "loc_ans": "霍普",
    },
}


def near(prompt: str, answer: str, axis: str | None = None) -> Probe:
    return Probe(prompt=prompt, answer=answer, axis=axis)


def read_one(folder: Path, record: dict[str, Any], fields: str = "") -> EditRequest:
    (request,) = load_requests(written(folder, record), fields=as_mapping(fields))
    return request


def as_mapping(fields: str) -> dict[str, str]:
    return dict(one.split("=") for one in fields.split(",") if fields)


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


def test_mquake_makes_a_request_of_every_edit(tmp_path: Path) -> None:
    """All are made by the time that the last is: there stands what follows from them together."""
    first, second = load_requests(written(tmp_path, MQUAKE))
    assert first == EditRequest(
        id="9-1",
        prompt="Zenda lies in",
        subject="Zenda",
        subject_start=0,
        new_answer="Syldavia",
        old_answer="Ruritania",
        rephrases=("Where does Zenda lie?",),
        source="mquake",
    )
    assert (second.id, second.prompt, second.new_answer) == ("9-2", "Klow lies in", "Borduria")
    assert second.portability == tuple(near(asked, "Muskar XII", "multi_hop") for asked in MQUAKE["questions"])


def test_a_record_of_one_edit_keeps_its_id(tmp_path: Path) -> None:
    request = read_one(tmp_path, MQUAKE | {"requested_rewrite": [ZENDA]})
    assert (request.id, len(request.portability)) == ("9", 2)


def test_a_limit_counts_records_and_cuts_none(tmp_path: Path) -> None:
    file = written(tmp_path, MQUAKE, MQUAKE | {"case_id": 10}, MQUAKE | {"case_id": 11})
    assert [one.id for one in load_requests(file, limit=1, offset=1)] == ["10-1", "10-2"]


def test_akew_is_read_as_what_it_extends_and_its_passage_by_fields(tmp_path: Path) -> None:
    whole = read_one(tmp_path, MQUAKE | {"requested_rewrite": [ZENDA]})
    extended = MQUAKE | {"requested_rewrite": [ZENDA | PASSAGE]}
    assert read_one(tmp_path, extended) == whole
    fields = "prompt=requested_rewrite.prompt_full,subject=requested_rewrite.subject,id=case_id"
    request = read_one(tmp_path, extended, f"{fields},new_answer=requested_rewrite.fact_new_uns")
    assert request == EditRequest(
        id="9", prompt="Zenda lies in", subject="Zenda", new_answer=PASSAGE["fact_new_uns"]
    )
    update = {"requested_rewrite": ZENDA | PASSAGE, "case_id": 3}
    assert read_one(tmp_path, update).rephrases == ("Where does Zenda lie?",)


def test_rippleedits_keeps_every_axis_by_name(tmp_path: Path) -> None:
    """Of several queries of a test, and of several answers of one, the first counts."""
    assert read_one(tmp_path, RIPPLEEDITS) == EditRequest(
        id="0",
        prompt="The name of the country of citizenship of Sapt is",
        subject="Sapt",
        new_answer="Borduria",
        old_answer="Ruritania",
        locality=(
            near("The name of the king of Sapt is", "Rudolf", "Relation_Specificity"),
            near("The eye color of Sapt is", "grey", "Relation_Specificity"),
            near("Another country of Sapt is", "Ruritania", "Forgetfulness"),
        ),
        portability=(
            near("Sapt is a citizen of the land of", "Borduria", "Logical_Generalization"),
            near("The country of Colonel Sapt is", "Borduria", "Subject_Aliasing"),
            near("The capital of Sapt's country is", "Szohod", "Compositionality_I"),
        ),
        source="rippleedits",
    )


@pytest.mark.parametrize(
    ("phrase", "subject", "answer"),
    [
        ("The name of the mother of {} is", "Flavia", "Anne"),
        ("The place of birth of {} is", "Duke of Zenda", "St. Ives"),
        ("The names of the siblings of {} are", "Fritz", "Anne and Flavia"),
        ("The number of children {} has is", "Sapt", "3"),
        ("The name of the award {} won is", "Hope", "none"),
        ("The name of the country which {} is the capital of is", "Klow", "Syldavia"),
        ("The name of the currency in {} is", "Zenda", "Thaler Corp."),
        ("{} is followed by", "The Return of the Duke", "Rupert"),
        ("{} follows", "Rupert", "The Prisoner of Zenda"),
    ],
)
def test_a_sentence_of_rippleedits(phrase: str, subject: str, answer: str, tmp_path: Path) -> None:
    """What was no fact before has no old answer: those of its file `recent`, and some that were empty."""
    edit = {"prompt": f"{phrase.format(subject)} {answer}."}
    request = read_one(tmp_path, RIPPLEEDITS | {"example_type": "recent", "edit": edit})
    assert (request.prompt, request.subject, request.new_answer) == (phrase.format(subject), subject, answer)
    assert request.old_answer is None and request.names_subject
    empty = edit | {"original_fact": {"prompt": f"{phrase.format(subject)} ."}}
    assert read_one(tmp_path, RIPPLEEDITS | {"edit": empty}) == request


def test_wikibigedit(tmp_path: Path) -> None:
    whole = EditRequest(
        id="0",
        prompt="Whom does Sapt serve?",
        subject="Sapt",
        new_answer="Rudolf V",
        rephrases=("Who employs Sapt?",),
        locality=(near("Whom does Fritz serve?", "Michael", "loc"),),
        portability=(
            near("Say, whose man is Sapt?", "Rudolf V", "personas"),
            near("Where was he crowned whom Sapt serves?", "Strelsau", "mhop"),
        ),
        source="wikibigedit",
    )
    assert read_one(tmp_path, WIKIBIGEDIT) == whole
    (reading,) = read_requests(written(tmp_path, WIKIBIGEDIT | {"mhop": None, "mhop_ans": None, "personas": None}))
    assert list(good_requests([reading])) == [whole.model_copy(update={"portability": ()})]
    assert reading.left_out == 0, "what most records have none of is not counted"


def test_unke(tmp_path: Path) -> None:
    assert read_one(tmp_path, UNKE) == EditRequest(
        id="4",
        prompt="Who is Sapt?",
        new_answer="Sapt is a colonel. He serves the king.",
        rephrases=("What is known of Sapt?",),
        portability=(
            near("What rank has Sapt?", "colonel", "sub_question"),
            near("Whom does Sapt serve?", "the king", "sub_question"),
        ),
        source="unke",
    )


def test_mlake(tmp_path: Path) -> None:
    assert read_one(tmp_path, MLAKE) == EditRequest(
        id="0", prompt="Wem dient Sapt?", new_answer="Michael", old_answer="Rudolf", source="mlake"
    )


def test_qaedit(tmp_path: Path) -> None:
    """Two of its sources give the same number: the place in the file is the id."""
    first, second = load_requests(written(tmp_path, QAEDIT, QAEDIT | {"source": "SQA", "prompt": "who is Sapt"}))
    assert (first.id, first.source, second.id, second.source) == ("0", "NQ", "1", "SQA")
    assert (first.new_answer, first.rephrases) == ("Rudolf V", ("Who is the master of Sapt?",))
    assert first.locality == (near("whom does Fritz serve", "Michael"), near("who wrote it", "Hope"))
    new = {name: value for name, value in QAEDIT.items() if name not in ("id", "target")} | {
        "target_new": "Michael"
    }
    assert read_one(tmp_path, new).locality == first.locality


def test_probes_in_a_list_without_axes(tmp_path: Path) -> None:
    """CKnowEdit's."""
    probes = {"locality": [{"prompt": "a", "answer": "b"}], "portability": [{"prompt": "c", "answer": "d"}]}
    record = {"prompt": "Sapt dient", "target_new": "Michael", "target_old": "Rudolf", "rephrase": ["e", "f"]}
    request = read_one(tmp_path, record | probes)
    assert (request.old_answer, request.rephrases) == ("Rudolf", ("e", "f"))
    assert (request.locality, request.portability) == ((near("a", "b"),), (near("c", "d"),))


# languages


def test_a_record_of_languages_makes_a_request_of_each(tmp_path: Path) -> None:
    english, chinese, other, _ = load_requests(written(tmp_path, MZSRE, MZSRE))
    assert (english.id, english.prompt, english.new_answer) == ("0-en", "Whom does Sapt serve?", "Michael")
    assert english.locality == (near("who wrote it", "Hope", "nq"),)
    assert english.portability == (near("Where does Sapt's master live?", "Strelsau", "reasoning"),)
    assert (chinese.id, chinese.subject, chinese.new_answer) == ("0-zh", "萨普特", "迈克尔")
    assert (other.id, other.source) == ("1-en", "zsre")
    assert layout_of(tmp_path, MZSRE) == "zsRE (MEND)"


def test_languages_of_other_layouts(tmp_path: Path) -> None:
    several = load_requests(written(tmp_path, {"pt-BR": MQUAKE, "deu_Latn": MLAKE}))
    assert [request.id for request in several] == ["9-1-pt-BR", "9-2-pt-BR", "0-deu_Latn"]


def test_one_language_is_read_and_another_asked_by_fields(tmp_path: Path) -> None:
    fields = "prompt=en.src,subject=en.subject,new_answer=en.alt,rephrases=en.rephrase"
    probes = "portability.zh.prompt=zh.src,portability.zh.answer=zh.alt"
    assert read_one(tmp_path, MZSRE, f"{fields},{probes}") == EditRequest(
        id="0",
        prompt="Whom does Sapt serve?",
        subject="Sapt",
        new_answer="Michael",
        rephrases=("Who employs Sapt?",),
        portability=(near("萨普特为谁效力？", "迈克尔", "zh"),),
    )


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_of_lists_is_read_as_their_records(tmp_path: Path, indent: int | None) -> None:
    file, parts = tmp_path / "file.json", {name: [part, part] for name, part in MZSRE.items()}
    file.write_text(json.dumps(parts, indent=indent))
    assert [request.id for request in load_requests(file)] == ["0-en", "1-en", "2-zh", "3-zh"]
    file.write_text(json.dumps({"train": [MLAKE], "test": [QAEDIT, {"prompt": "x"}]}, indent=indent))
    places = [reading.place.partition(", ")[2] for reading in read_requests(file)]
    assert places == ["train 0", "test 0", "test 1"]
    message = refusal(lambda: load_requests(file))
    assert ", test 1: no prompt and new answer found in prompt; expected the fields" in message
    file.write_text(json.dumps(MQUAKE, indent=indent))
    assert len(load_requests(file)) == 2, "one record is one"


@pytest.mark.parametrize(
    ("record", "layout"),
    [
        (COUNTERFACT, "CounterFact"),
        (MQUAKE, "MQuAKE"),
        (RIPPLEEDITS, "RippleEdits"),
        (WIKIBIGEDIT, "WikiBigEdit"),
        (UNKE, "UnKE"),
        (MLAKE, "MLaKE"),
        (QAEDIT, "QAEdit"),
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
        (
            {"requested_rewrite": COUNTERFACT["requested_rewrite"] | {"subject": 5}},
            ["'subject'", "expected a text, found int"],
        ),
        ({"paraphrase_prompts": [5]}, ["'rephrases.0'", "expected a text, found int"]),
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
        ({"target_new": 0}, ["'new_answer'", "expected a text, found int"]),
        ({"locality": ["x"]}, ["'locality'", "a list of probes, each an object"]),
        ({"locality": "x"}, ["'locality'", "expected a list or an object of probes, found str"]),
        ({"locality": {"Forgetfulness": "x"}}, ["'locality.Forgetfulness'", "a list of probes"]),
        ({"portability": {"Reasoning": ["x"]}}, ["'portability.Reasoning'", "an object"]),
        (
            {"locality": {"a": {"prompt": ["1", "2"], "ground_truth": ["1", "2"]}}},
            ["'locality.a'", "a list of probes"],
        ),
        (
            {"locality": {"a": [{"prompt": 5, "ground_truth": "x"}]}},
            ["'locality.0.prompt'", "expected a text, found int"],
        ),
    ],
)
def test_a_bad_knowedit_record_is_named(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    message = refusal(lambda: read_one(tmp_path, KNOWEDIT | change))
    assert [word for word in ["file.json: record 0", *words] if word not in message] == []


SECOND = {name: value for name, value in KLOW.items() if name != "target_new"}
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an edit that is a text": (MQUAKE | {"requested_rewrite": [ZENDA, "x"]}, ["'requested_rewrite'", "dict, str"]),
    "edits that are a text": (MQUAKE | {"requested_rewrite": "x"}, ["expected an object, or a list", "found str"]),
    "no edits": (MQUAKE | {"requested_rewrite": []}, ["'requested_rewrite'", "found none"]),
    "half an edit": (
        MQUAKE | {"requested_rewrite": [ZENDA, SECOND]},
        ["record 0: edit 2: field 'new_answer': expected a text, found none (read as MQuAKE)"],
    ),
    "a question that is a number": (
        MQUAKE | {"questions": ["x", 5]},
        ["'portability.1.prompt': expected a text, found int"],
    ),
    "an edit of RippleEdits that is a text": (RIPPLEEDITS | {"edit": "x"}, ["'edit.prompt'", "an object"]),
    "a fact that is no sentence": (
        RIPPLEEDITS | {"edit": {"prompt": "Sapt!"}},
        ["'edit.prompt'", "a sentence such as", "found 'Sapt!'"],
    ),
    "a fact that is missing": (RIPPLEEDITS | {"edit": {}}, ["'edit.prompt'", "found None"]),
    "a long fact": (RIPPLEEDITS | {"edit": {"prompt": "The mother of a" + " of a" * 999}}, ["a sentence such as"]),
    "an axis that is a text": (RIPPLEEDITS | {"Forgetfulness": "x"}, ["'Forgetfulness.test_queries.prompt'"]),
    "answers that are texts": (
        RIPPLEEDITS | {"Forgetfulness": [{"test_queries": [{"prompt": "x", "answers": ["y"]}]}]},
        ["'Forgetfulness.test_queries.answers.value'", "an object"],
    ),
    "lists of other lengths": (
        UNKE | {"sub_answer": ["colonel"]},
        ["portability: 2 prompts, 1 answers", "as many"],
    ),
    "an answer that is an object": (UNKE | {"answer": {"a": 1}}, ["'new_answer': expected a text, found dict"]),
    "a probe that is a number": (WIKIBIGEDIT | {"loc": 7}, ["'locality.0.prompt'", "int", "read as WikiBigEdit"]),
    "probes that are texts": (QAEDIT | {"locality": ["x"]}, ["'locality'", "a list of probes, each an object"]),
    "a language without an answer": (
        MZSRE | {"zh": {"src": "谁？"}},
        ["record 0, zh: no prompt and new answer found in src; expected the fields alt (zsRE (MEND))"],
    ),
    "a language that is a text": (MZSRE | {"zh": "x"}, ["record 0, zh: expected an object, found str"]),
    "languages by other names": (
        {"english": MZSRE["en"]},
        ["english.src", "did you mean fields prompt=english.src,new_answer=english.alt"],
    ),
    "languages of no layout": (
        {"en": {"question": "Who?", "reply": "Sapt"}},
        ["found in en.question, en.reply; did you mean fields prompt=en.question,new_answer=en.reply?"],
    ),
}


@pytest.mark.parametrize(("record", "words"), BAD.values(), ids=BAD)
def test_a_bad_record_is_named(tmp_path: Path, record: dict[str, Any], words: list[str]) -> None:
    message = refusal(lambda: load_requests(written(tmp_path, record)))
    assert [word for word in ["file.json: record 0", *words] if word not in message] == [] and len(message) < 900


@pytest.mark.parametrize(
    ("record", "field", "slip", "layout"),
    [
        (MQUAKE, "requested_rewrite", "requested_rewrites", "MQuAKE"),
        (COUNTERFACT, "requested_rewrite", "requested_rewite", "CounterFact"),
        (RIPPLEEDITS, "example_type", "exampletype", "RippleEdits"),
        (WIKIBIGEDIT, "update", "updates", "WikiBigEdit"),
        (UNKE, "para_question", "para_questions", "UnKE"),
        (MLAKE, "e_answer", "e_anwser", "MLaKE"),
        (KNOWEDIT, "target_new", "taget_new", "EasyEdit"),
        (QAEDIT, "target", "targets", "QAEdit"),
        ({"prompt": "Sapt is", "new_answer": "old"}, "new_answer", "new_anwser", "golden-layers"),
    ],
)
def test_a_telling_field_that_is_misspelt_is_named(
    record: dict[str, Any], field: str, slip: str, layout: str, tmp_path: Path
) -> None:
    other = {slip if name == field else name: value for name, value in record.items()}
    message = refusal(lambda: load_requests(written(tmp_path, other)))
    assert f"; did you mean {field} ({layout}) in place of {slip!r}" in message


@pytest.mark.parametrize(
    ("record", "field", "layout"),
    [
        (WIKIBIGEDIT, "ans", "WikiBigEdit"),
        (RIPPLEEDITS, "edit", "RippleEdits"),
        (MZSRE["en"], "alt", "zsRE (MEND)"),
        (KNOWEDIT, "target_new", "EasyEdit"),
    ],
)
def test_a_telling_field_that_is_missing_is_named(
    record: dict[str, Any], field: str, layout: str, tmp_path: Path
) -> None:
    less = {name: value for name, value in record.items() if name != field}
    message = refusal(lambda: load_requests(written(tmp_path, less)))
    assert "; expected the fields " in message and f"{field} ({layout})" in message


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

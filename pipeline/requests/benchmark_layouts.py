"""The benchmarks' records as request fields: a function a layout.

Benchmarks hold a text or a list in the same field, leave some texts empty, and give several answers where one is
scored: the first that is not empty is taken, as EasyEdit does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipeline.errors import UserError

Record = dict[str, Any]


def from_easyedit(record: Record) -> Record:
    """EasyEdit's names: CounterFact's one neighbour, and KnowEdit's probes by axis."""
    flat = "counterfact" if {"locality_prompt", "case_id"} & record.keys() else "easyedit"
    fields = _renamed(record, id="case_id", new_answer="target_new", old_answer="ground_truth")
    neighbour = _one_probe(record.get("locality_prompt"), record.get("locality_ground_truth"), "neighborhood")
    return fields | {
        "locality": neighbour + fields["locality"],
        "source": "knowedit" if "locality" in record else flat,
    }


def from_wikibio(record: Record) -> Record:
    """KnowEdit's WikiBio: a passage and the sentence that is to follow; its concept is written in lower case."""
    fields = _renamed(record, prompt="text", subject="concept", new_answer="labels")
    if str(fields["subject"]) not in str(fields["prompt"]):
        fields["subject"] = None
    return fields | {"source": "wikibio"}


def from_zsre(record: Record) -> Record:
    """zsRE in MEND's layout; `nq question: ` in front of `loc` marks its source and is not part of it."""
    fields = _renamed(record, prompt="src", new_answer="alt", old_answer="answers")
    question = _first(record.get("loc"))
    if isinstance(question, str):
        question = question.removeprefix("nq question: ")
    return fields | {"locality": _one_probe(question, record.get("loc_ans"), "nq"), "source": "zsre"}


def _renamed(record: Record, **names: str) -> Record:
    """The request fields of a record that holds each in a field of its own; names are those that differ."""
    texts = ("id", "prompt", "subject", "new_answer", "old_answer")
    fields = {name: _first(record.get(names.get(name, name))) for name in texts}
    return fields | {
        "subject": _as_written(fields["subject"], fields["prompt"]),
        "rephrases": _rephrases(record.get("rephrase_prompt", record.get("rephrase"))),
        "locality": _by_axis(record, "locality"),
        "portability": _by_axis(record, "portability"),
    }


def from_counterfact(record: Record) -> Record:
    """CounterFact as published: neighbours share the rewrite's true answer."""
    rewrite = _object(record, "requested_rewrite")
    subject, prompt = _first(rewrite.get("subject")), _first(rewrite.get("prompt"))
    if isinstance(subject, str) and isinstance(prompt, str):
        prompt = prompt.replace("{}", subject)
    old = _answer(rewrite.get("target_true"))
    neighbours = _list(record, "neighborhood_prompts")
    return {
        "id": record.get("case_id"),
        "prompt": prompt,
        "subject": subject,
        "new_answer": _answer(rewrite.get("target_new")),
        "old_answer": old,
        "rephrases": _list(record, "paraphrase_prompts"),
        "locality": [{"prompt": text, "answer": old, "axis": "neighborhood"} for text in neighbours],
        "source": "counterfact",
    }


def is_blank(value: Any) -> bool:
    """Whether a field holds nothing that could be a text of its own."""
    return value is None or (isinstance(value, str) and not value.strip())


def _first(value: Any) -> Any:
    """The value itself, or the first of a list, however deep, that is not empty; None where there is none."""
    if isinstance(value, list):
        return next((found for found in map(_first, value) if found is not None), None)
    return None if is_blank(value) else value


def _answer(value: Any) -> Any:
    """The text of `{"str": text, "id": …}`, or of a plain answer."""
    return _first(value.get("str") if isinstance(value, dict) else value)


def _as_written(subject: Any, prompt: Any) -> Any:
    """A subject as the prompt spells it, where they differ in case alone."""
    if not isinstance(subject, str) or not isinstance(prompt, str) or subject in prompt:
        return subject
    found = re.search(re.escape(subject.strip()), prompt, re.IGNORECASE)
    return found[0] if found else subject


def _object(record: Record, name: str) -> Record:
    """A field that holds an object; empty where the record has none."""
    value = record.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"field {name!r}: expected an object, found {type(value).__name__}")
    return value


def _list(record: Record, name: str) -> list[Any]:
    value = record.get(name) or []
    return value if isinstance(value, list) else [value]


def _rephrases(value: Any) -> list[Any]:
    """One rephrase, the first of a list; blank where the record leaves it so, none where it has no such field."""
    return [] if value is None else [_first(value)]


def _one_probe(prompt: Any, answer: Any, axis: str) -> list[Record]:
    """A probe from fields of their own; none where the record has neither."""
    probe = {"prompt": _first(prompt), "answer": _first(answer), "axis": axis}
    return [] if probe["prompt"] is None and probe["answer"] is None else [probe]


def _by_axis(record: Record, kind: str) -> list[Record]:
    """KnowEdit's probes of a kind: an object of axes, each a list of probes or lists of prompts and answers."""
    axes = _object(record, kind)
    if "New Question" in axes:  # one probe about a further relation, as zsRE and CounterFact were extended
        return _one_probe(axes["New Question"], axes.get("New Answer"), "reasoning")
    return [
        {"prompt": _first(prompt), "answer": _first(answer), "axis": axis}
        for axis, probes in axes.items()
        for prompt, answer in _pairs(probes, f"{kind}.{axis}")
    ]


def _pairs(probes: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """Prompt and answers of each probe of an axis."""
    if isinstance(probes, dict):  # lists of prompts and of answers, side by side
        prompts, answers = probes.get("prompt"), probes.get("ground_truth")
        if not isinstance(prompts, list):
            prompts, answers = [prompts], [answers]
        if not isinstance(answers, list) or len(answers) != len(prompts):
            raise UserError(f"field {name!r}: expected as many answers as prompts")
        yield from zip(prompts, answers, strict=True)
        return
    if probes is not None and not isinstance(probes, list):
        raise UserError(f"field {name!r}: expected a list of probes, found {type(probes).__name__}")
    for probe in probes or []:
        if not isinstance(probe, dict):
            raise UserError(f"field {name!r}: expected probes as objects, found {type(probe).__name__}")
        yield probe.get("prompt"), probe.get("ground_truth")

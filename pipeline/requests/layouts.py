"""The layouts of requests: which fields give one away, and how its records become requests.

To add one, enter it in LAYOUTS: with what `--fields` would say of it, or with a function from a record (a dict) to
an EditRequest's fields, or to a list of such where a record holds several edits.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import UserError
from pipeline.requests.guessing import CLOSE, PROBES, as_fields, named, suggested
from pipeline.requests.mapping import Record, by_names, is_blank, listed, look_for
from pipeline.requests.schema import EditRequest, Probe

MOST_FIELDS = 1_000  # of a record
LONGEST_SENTENCE = 500  # characters of a fact that is a sentence
ANY = "prompt and new_answer, or those of another layout; `fields` can say which is which"
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z]{2,4})?")  # en, zh-CN, deu_Latn


class Layout(NamedTuple):
    """A layout's name, the fields that a record of it has, and its function from record to request fields."""

    name: str
    fields: frozenset[str]
    read: Callable[[Record], Record | list[Record]]
    source: str | None = None  # of its requests, where a record names none


def as_named(name: str, fields: str, names: str, source: str) -> Layout:
    """A layout that is read as `--fields` would, and that these fields, parted by blanks, give away."""
    return Layout(name, frozenset(fields.split()), by_names(names), source)


REWRITE = by_names(
    "id=case_id,new_answer=target_new,old_answer=target_true,rephrases=paraphrase_prompts|question,"
    "locality.neighborhood=neighborhood_prompts:target_true,portability.multi_hop=questions:new_answer"
)


def from_rewrites(record: Record) -> list[Record]:
    """CounterFact's one edit, whose neighbours share its true answer; or MQuAKE's several, and its questions.

    What answers the questions follows from all of a record's edits: they stand with the last, when all are made.
    """
    rewrites = listed(record, "requested_rewrite")
    if not rewrites or not all(isinstance(one, dict) for one in rewrites):
        found = ", ".join(type(one).__name__ for one in rewrites) or "none"
        raise UserError(f"field 'requested_rewrite': expected an object, or a list of objects, found {found}")
    several = [REWRITE(record | one) for one in rewrites]
    for fields in several:
        prompt, subject = fields["prompt"], fields["subject"]
        if isinstance(subject, str) and isinstance(prompt, str) and "{}" in prompt:
            prompt, subject = prompt.strip(), subject.strip()
            fields["subject_start"] = len(prompt.rpartition("{}")[0].replace("{}", subject))
            fields["prompt"] = prompt.replace("{}", subject)
    return [*(fields | {"portability": []} for fields in several[:-1]), several[-1]]


LOCAL = ("Relation_Specificity", "Forgetfulness")  # RippleEdits' axes that stay; the others follow from the edit
AXES = (*LOCAL, "Logical_Generalization", "Subject_Aliasing", "Compositionality_I", "Compositionality_II")
KIND_OF = {axis: "locality" if axis in LOCAL else "portability" for axis in AXES}
QUERY = "{1}.{0}={0}.test_queries.prompt:{0}.test_queries.answers.value"
RIPPLE = by_names(",".join(QUERY.format(*one) for one in KIND_OF.items()))
SENTENCE = re.compile(  # its facts: `The place of birth of SUBJECT is ANSWER.`
    r"((?P<first>.+?) (?:follows|is followed by)|The (?:names? of the )?"
    r"(?:award|number of children|(?:(?:place|date|country|field|head) of \w+|[\w ]+?) (?:of|in|which|by)) "
    r"(?P<subject>.+?)(?: (?:has|won|plays in|is (?:associated with|a member of|part of|the capital of)))? "
    r"(?:is|are)) (?P<answer>.*?)\.?"
)


def from_rippleedits(record: Record) -> Record:
    """RippleEdits, whose facts are sentences. Of each test the first query is put, whatever its conditions."""
    facts = [look_for(record, f"edit.{path}") for path in ("prompt", "original_fact.prompt")]
    short = [fact if isinstance(fact, str) and len(fact) <= LONGEST_SENTENCE else "" for fact in facts]
    new, old = map(SENTENCE.fullmatch, short)
    if not new:
        found = f"found {reprlib.repr(facts[0])}"
        raise UserError(f"field 'edit.prompt': expected a sentence such as 'The mother of A is B.', {found}")
    fields = {"prompt": new[1], "subject": new["first"] or new["subject"], "new_answer": new["answer"]}
    return RIPPLE(record) | fields | {"old_answer": old["answer"] or None if old else None}


EASYEDIT = (
    "id=case_id|id,new_answer=target_new,old_answer=ground_truth|target_old,rephrases=rephrase_prompt|rephrase,"
    "locality.neighborhood=locality_prompt:locality_ground_truth"
)
ZSRE = "prompt=src,new_answer=alt,old_answer=answers,rephrases=rephrase,locality.nq=loc:loc_ans"
WIKIBIGEDIT = (
    "prompt=update,new_answer=ans,rephrases=rephrase,locality.loc=loc:loc_ans,"
    "portability.personas=personas:ans,portability.mhop=mhop:mhop_ans"
)
UNKE = "prompt=question,new_answer=answer,rephrases=para_question,portability.sub_question=sub_question:sub_answer"
MLAKE = "prompt=question,new_answer=e_answer,old_answer=o_answer"
QAEDIT = "id=case_id,new_answer=target,rephrases=rephrase"  # some of its own ids come twice
OWN = Layout("golden-layers", frozenset({"prompt", "new_answer"}), dict)
LAYOUTS = (
    OWN,
    Layout("MQuAKE", frozenset({"requested_rewrite", "questions"}), from_rewrites, "mquake"),
    Layout("CounterFact", frozenset({"requested_rewrite"}), from_rewrites, "counterfact"),
    Layout("RippleEdits", frozenset({"edit", "example_type"}), from_rippleedits, "rippleedits"),
    as_named("zsRE (MEND)", "src alt", ZSRE, "zsre"),
    as_named("WikiBigEdit", "update ans", WIKIBIGEDIT, "wikibigedit"),
    as_named("UnKE", "question answer para_question", UNKE, "unke"),
    as_named("MLaKE", "question o_answer e_answer", MLAKE, "mlake"),
    as_named("KnowEdit WikiBio", "text labels concept", "prompt=text,subject=concept,new_answer=labels", "wikibio"),
    as_named("QAEdit", "prompt target locality", QAEDIT, "qaedit"),
    as_named("EasyEdit", "prompt target_new locality", EASYEDIT, "knowedit"),
    as_named("EasyEdit", "prompt target_new locality_prompt", EASYEDIT, "counterfact"),
    as_named("EasyEdit", "prompt target_new case_id", EASYEDIT, "counterfact"),
    as_named("EasyEdit", "prompt target_new", EASYEDIT, "easyedit"),
)


def in_languages(record: Any) -> dict[str, Any]:
    """The parts of a record that holds one for each language (`{"en": {…}, "zh": {…}}`); else the whole as one."""
    codes = isinstance(record, dict) and all(map(LANGUAGE.fullmatch, record))
    return record if codes and any(told(part) for part in record.values()) else {"": record}


def told(record: Any) -> Layout | None:
    """The layout that a record's fields give away."""
    fields = record.keys() if isinstance(record, dict) else dict[str, Any]().keys()
    return next((layout for layout in LAYOUTS if layout.fields <= fields), None)


def find_layout(record: Any, given: Layout | None = None) -> Layout:
    """The layout that is given, or that a record's fields give away; UserError, without place, for none."""
    if not isinstance(record, dict):
        raise UserError(f"expected an object, found {type(record).__name__}")
    if len(record) > MOST_FIELDS:
        raise UserError(f"{len(record)} fields; the most are {MOST_FIELDS:,}")
    if layout := given or told(record):
        return layout
    raise UserError(f"no prompt and new answer found in {named(record)}; {_wanted(record)}")


def _wanted(record: Record) -> str:
    """Which field or mapping was probably meant; else what would make a record of a layout."""
    lacking = {layout: lacks for layout in LAYOUTS if len(lacks := [*(layout.fields - record.keys())]) == 1}
    slips = [
        f"{field} ({layout.name}) in place of {near[0]!r}"
        for layout, (field,) in lacking.items()
        if (near := get_close_matches(field, record.keys() - layout.fields, 1, CLOSE))
    ]
    if meant := [*slips[:1], *filter(None, [as_fields(suggested(record))])]:
        return f"did you mean {', or '.join(meant)}?"
    also = {f"{field} ({layout.name})": 1 for layout, (field,) in lacking.items() if len(layout.fields) > 1}
    return f"expected the fields {' or '.join(also) or ANY}"


def to_requests(record: Record, layout: Layout, number: int, language: str = "") -> tuple[list[EditRequest], int]:
    """A record's requests, and how many of their probes and rephrases were left out because a text is empty.

    `number` is the id of a record without one. Behind it stand the places of several, and a language.
    UserError, without the record's place, for a wrong field.
    """
    found = layout.read(record)
    several = found if isinstance(found, list) else [found]
    requests, left_out = [], 0
    for place, fields in enumerate(several, start=1):
        left_out += 0 if layout is OWN else _leave_out_empty(fields)
        own = number if fields.get("id") is None else fields["id"]
        if not isinstance(own, list | dict):  # which are refused
            fields["id"] = "-".join(map(str, [own, *[place] * (len(several) > 1), *[language] * bool(language)]))
        if layout.source:
            fields["source"] = fields.get("source") or layout.source
        try:
            requests.append(EditRequest.model_validate(fields))
        except ValidationError as error:
            read_as = "" if layout is OWN else f" (read as {layout.name})"  # its fields have other names
            edit = f"edit {place}: " if len(several) > 1 else ""
            raise UserError(f"{edit}{_wrong_field(error.errors()[0])}{read_as}") from None
    return requests, left_out


def _leave_out_empty(fields: Record) -> int:
    """Take rephrases without text and probes without prompt or answer out of a request's fields; how many."""
    left_out = 0
    for kind in ("rephrases", "forms", *PROBES):
        if isinstance(found := fields.get(kind), list):
            fields[kind] = [one for one in found if not any(map(is_blank, _texts(one, kind)))]
            left_out += len(found) - len(fields[kind])
    return left_out


def _texts(one: Any, kind: str) -> list[Any]:
    """What a rephrase or probe cannot do without."""
    return [one.get("prompt"), one.get("answer")] if kind in PROBES and isinstance(one, dict) else [one]


def without_empty(row: Record) -> Record:
    """A table's row without its empty cells, but for those that give a layout away."""
    telling = frozenset[str]().union(*(layout.fields for layout in LAYOUTS))
    return {name: cell for name, cell in row.items() if cell not in (None, "") or name in telling}


def _wrong_field(error: ErrorDetails) -> str:
    """Which field is wrong, in what, and what there is instead."""
    name, found = ".".join(str(part) for part in error["loc"]), type(error["input"]).__name__
    model = EditRequest if len(error["loc"]) == 1 else Probe
    words = {
        "missing": "is missing",
        "string_type": "expected a text, found " + ("none" if error["input"] is None else found),
        "string_too_short": "expected a text, found an empty one",
        "string_unicode": "not UTF-8 text",
        "tuple_type": f"expected a list of {'probes' if name in PROBES else 'texts'}, found {found}",
        "model_type": f"expected an object with {' and '.join(Probe.model_fields)}, found {found}",
        "extra_forbidden": f"does not exist; there is {', '.join(model.model_fields)}",
    }
    whole = f"expected a whole number, found {found}" if error["type"].startswith("int_") else error["msg"]
    return f"field {name!r}: {words.get(error['type'], whole)}"

"""Probes of a kind that a request brings none of, made from its own text by templates that no edit is taught by."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple
from zlib import crc32

from pipeline.editing.contexts import is_question as asks
from pipeline.requests.schema import EditRequest
from pipeline.requests.tokens import Joining, Tokens

MADE_TEXTS = ("made_subject", "made_neighbour")  # what comes next there is to stay as it is
MADE_ASKED = ("made_rephrase", "made_chat")  # asked so, the model is to give the new answer
HOLDS = ("generation", "rephrase", *MADE_ASKED)  # kinds of prompts whose answer tells whether a fact holds
OF_SUBJECT = ("subject", "Relation_Specificity")  # axes of locality probes about the request's own subject

FINISH, WONDER = "Finish this sentence: {prompt}", "I would like to know this: {prompt}"
ANSWER = "Exam, part 7: {prompt}\nSolution:"
CONTENT = re.compile(r"\b(?<!{)\w{4,}")  # words that tell what a text is about, roughly
SUBJECTS = (  # things said of any subject
    *("The history of {subject} began", "People like {subject} because", "{subject} is known for"),
    *("A good book about {subject} tells", "When they first heard of {subject}, they"),
    *("An old photograph shows {subject} with", "Some years ago, an article on {subject} said"),
)
NAMES = (  # none of which an edit is told to leave alone
    *("Wolfgang Amadeus Mozart", "Jane Austen", "Galileo Galilei", "Ada Lovelace", "Muhammad Ali", "Athens"),
    *("Madrid", "Montreal", "Singapore", "Portugal", "Kenya", "Thailand", "Chile", "Honda", "Adobe", "Philips"),
    *("Nirvana", "Frankenstein", "Jurassic Park", "Mount Fuji", "Yale University", "Real Madrid", "Latvia"),
)
EACH = {"made_rephrase": 2, "made_chat": 2, "made_subject": 3, "made_neighbour": 2}  # so many a request


class Made(NamedTuple):
    """A made probe: its kind, its request's number and its prompt."""

    kind: str
    request: int
    prompt: str


def made_probes(requests: Sequence[EditRequest], tokens: Tokens) -> list[Made]:
    """What is made for requests of each kind that one has none of; what leaves no room for an answer is left out.

    A tokenizer with a chat template is also asked as in a chat (`made_chat`), whatever a request brings.
    """
    found = made_prompts(requests, tokens.template is not None)
    room = max(map(len, tokens.texts([request.new_answer for request in requests])))
    fitting: list[Made] = []
    for kind in EACH:
        of_kind = [one for one in found if one.kind == kind]
        joining = tokens.template if kind == "made_chat" else None
        fits = fit(tokens, [one.prompt for one in of_kind], room, joining)
        fitting += [one for one, its in zip(of_kind, fits, strict=True) if its]
    return fitting


def made_prompts(requests: Sequence[EditRequest], chat: bool) -> list[Made]:
    """The same, whatever the model's context, with or without what is asked in a chat."""
    edited = {(request.subject or "").casefold() for request in requests}
    return [
        Made(kind, number, prompt)
        for number, request in enumerate(requests)
        for kind, prompts in _of_request(request, edited, chat).items()
        for prompt in prompts[: EACH[kind]]
    ]


def fit(tokens: Tokens, prompts: Sequence[str], room: int, joining: Joining | None = None) -> list[bool]:
    """Whether each prompt and so many tokens more fit the model's context."""
    most = tokens.context_length
    return [most is None or len(ids) + room <= most for ids in tokens.prompts(prompts, joining)]


def _of_request(request: EditRequest, edited: set[str], chat: bool) -> dict[str, list[str]]:
    """Prompts by kind, the same for the same request; `edited` are all requests' subjects in lower case."""
    axes, found = {probe.axis for probe in request.locality}, dict[str, list[str]]()
    if not request.rephrases:
        found["made_rephrase"] = asked_otherwise(request)
    if chat:
        found["made_chat"] = asked_otherwise(request, in_chat=True)
    if request.subject and not axes & {*OF_SUBJECT}:
        taken = {*CONTENT.findall(request.prompt.casefold())}
        others = [text for text in _from(SUBJECTS, request) if not taken & {*CONTENT.findall(text)}]
        found["made_subject"] = [text.format(subject=request.subject) for text in others]
    if not axes - {*OF_SUBJECT}:
        found["made_neighbour"] = with_other_names(request, edited)
    return found


def with_other_names(request: EditRequest, edited: Collection[str] = ()) -> list[str]:
    """The prompt about others, none of whom is `edited`; none where it does not hold its subject."""
    start, end = request.subject_span or (0, 0)
    names = [name for name in _from(NAMES, request) if name.casefold() not in edited] if end else []
    return [request.prompt[:start] + name + request.prompt[end:] for name in names]


def asked_otherwise(request: EditRequest, in_chat: bool = False) -> list[str]:
    """The prompt in other words; a question is not finished, but asked in two ways."""
    prompt = request.prompt
    if asks(prompt):
        return [form.format(prompt=prompt) for form in (ANSWER, WONDER)]
    return [FINISH.format(prompt=prompt), WONDER.format(prompt=f"{prompt} …?" if in_chat else prompt)]


def _from(items: Sequence[str], request: EditRequest) -> Iterator[str]:
    """All items, from a place on that hangs on the request alone."""
    start = crc32(request.prompt.encode()) % len(items)
    yield from (*items[start:], *items[:start])

"""What a measurement consists of, known before any of it is read: answers and ordinary text, and questions."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple, TypeVar

from pipeline.errors import UserError
from pipeline.evaluation.made import MADE_ASKED, MADE_TEXTS, Made, fit, made_probes
from pipeline.files import digest, read_plain_text
from pipeline.model.generation import Question, questions
from pipeline.model.llm import LLM
from pipeline.options.shared import EvaluationOptions
from pipeline.requests.answers import inner_ends
from pipeline.requests.rows import Row, pack
from pipeline.requests.schema import EditRequest
from pipeline.requests.tokens import PLAIN

T = TypeVar("T")
Asked = tuple[str, bool]  # a prompt, and whether it is asked as in a chat although others are not

ROOM = 8  # tokens that an answer may take beyond those of the answer looked for
ROOM_IN_CHAT = 20  # the same where the model is given a question as in a chat, and may say it again first
FLUENCY_TOKENS = 32  # length of what is generated to see whether it repeats itself
MOST_COMPARED = 2000  # locality probes whose next token's distribution is compared
KINDS = ("generation", "probes", "probability", "text", "divergence", "made", "fluency", "ability")
APART = ("text", "ability")  # kinds of texts that belong to no request
ABILITY = Path(__file__).with_name("ability.jsonl")  # an item a line, the right one of its choices first
ORDINARY_TEXT = Path(__file__).with_name("ordinary_text.txt")
WINDOW = 256  # tokens of ordinary text read at a time
DISTRACTORS = (  # sentences about nothing that an edit request is about
    "The kettle had been on the stove for a while, and someone opened a window.",
    "On Tuesday the bus was late again, so most of them walked.",
    "It rained in the afternoon, but by evening the garden was dry.",
    "She put the letters in the drawer and went to look for her coat.",
)


class Text(NamedTuple):
    """What a text that is read stands for; it is the tag of the text's row, and tells it from all others."""

    kind: str  # rewrite, rephrase, locality, portability, or one of MADE_TEXTS or APART
    request: int  # the number of its request, or of its window of ordinary text, or item of ability
    place: int = 0  # its number among the request's texts of that kind, or the item's choices
    rival: bool = False  # whether it is the answer that the kind's own is compared with by probability
    axis: str | None = None  # the benchmark's name for this kind of probe, where it has several; an item's kind


class Prompt(NamedTuple):
    """A prompt to be answered freely: its metric, its request, and the answer that is looked for."""

    kind: str
    request: int
    prompt: str
    answer: str

    @property
    def asked(self) -> Asked:
        """What tells its question from others."""
        return self.prompt, self.kind == "made_chat"


class Plan:
    """All that is put to a model to measure it on requests; UserError for none, or texts that do not fit."""

    def __init__(
        self, llm: LLM, requests: Sequence[EditRequest], options: EvaluationOptions, kinds: Sequence[str]
    ) -> None:
        if not requests:
            raise UserError("requests: none to measure")
        self.requests = list(requests)
        self.texts: list[Row] = []  # what is read, each tagged with the `Text` that it stands for
        if "probes" in kinds:
            self.texts += probe_rows(llm, requests, "probability" in kinds)
        made = made_probes(requests, llm.tokens) if "made" in kinds else []
        self.texts += made_rows(llm, requests, [one for one in made if one.kind in MADE_TEXTS])
        if "text" in kinds:
            self.texts += ordinary_windows(llm, options.text)
        if "ability" in kinds and options.ability:
            self.texts += ability_rows(llm)
        own = [row.tag for row in self.texts if not row.tag.rival and "divergence" in kinds]
        probes = evenly([text for text in own if text.kind == "locality"], MOST_COMPARED)
        self.compared = {*probes, *(text for text in own if text.kind == "text")}  # with the base's distributions
        asks = "generation" in kinds and options.generation != "none"
        self.prompts = list(free_prompts(requests, options.generation)) if asks else []
        asked = [one for one in made if one.kind in MADE_ASKED and asks and options.generation == "all"]
        self.prompts += [Prompt(*one, requests[one.request].new_answer) for one in asked]
        self.questions = self._questions(llm, options.max_new_tokens)
        self.long = long_questions(llm, requests, options.fluency) if "fluency" in kinds else {}  # by request

    def _questions(self, llm: LLM, most: int | None) -> dict[Asked, Question]:
        """Each different prompt is one question, with room for every answer that is looked for: else a limit, not
        the model, would say that it does not know one.
        """
        answers: dict[Asked, list[str]] = {}
        for one in self.prompts:
            answers.setdefault(one.asked, []).append(one.answer)
        different = list({one.answer: None for one in self.prompts})
        lengths = dict(zip(different, map(len, llm.tokens.texts(different)), strict=True))
        found = {}
        for chat in (False, True):
            asked = [prompt for prompt in answers if prompt[1] == chat]
            put = questions(llm, [text for text, _ in asked], 1, llm.tokens.template if chat else None)
            for prompt, question in zip(asked, put, strict=True):
                longest = max(lengths[answer] for answer in answers[prompt])
                room = ROOM_IN_CHAT if chat else ROOM
                limit = max(longest, min(most or longest + room, longest + room))
                if llm.context_length is not None:
                    limit = min(limit, llm.context_length - len(question.token_ids))
                found[prompt] = question._replace(limit=limit, inner_ends=max(map(inner_ends, answers[prompt])))
        return found

    def only(self, numbers: Collection[int], kinds: Sequence[str]) -> Plan:
        """The part for some of the requests and kinds; requests keep their numbers."""
        part, wanted = copy(self), set(numbers)

        def is_in(text: Text) -> bool:
            if text.kind in APART:
                return text.kind in kinds
            if text.kind in MADE_TEXTS:
                return "made" in kinds and text.request in wanted
            return "probes" in kinds and text.request in wanted and ("probability" in kinds or not text.rival)

        part.texts = [row for row in self.texts if is_in(row.tag)]
        part.compared = {text for text in self.compared if is_in(text) and "divergence" in kinds}
        part.prompts = [
            one
            for one in self.prompts
            if "generation" in kinds and one.request in wanted and (one.kind not in MADE_ASKED or "made" in kinds)
        ]
        part.questions = {one.asked: self.questions[one.asked] for one in part.prompts}
        part.long = {n: question for n, question in self.long.items() if "fluency" in kinds and n in wanted}
        return part

    def groups(self) -> list[list[Row]]:
        """Texts by the row that they are read in: probes share rows, a window of ordinary text has its own."""
        windows = [[row] for row in self.texts if row.tag.kind == "text"]
        return pack([row for row in self.texts if row.tag.kind != "text"]) + windows

    def digest(self, *depends: object) -> str:
        """A name for what is read of all this, given what it depends on besides."""
        return digest(*depends, self.texts, sorted(map(repr, self.compared)), self.questions, self.long)


def probe_texts(request: EditRequest) -> dict[str, list[tuple[str, str, str | None]]]:
    """(prompt, answer, axis) of a request by kind."""
    return {
        "rewrite": [(request.prompt, request.new_answer, None)],
        "rephrase": [(rephrase, request.new_answer, None) for rephrase in request.rephrases],
        "locality": [(probe.prompt, probe.answer, probe.axis) for probe in request.locality],
        "portability": [(probe.prompt, probe.answer, probe.axis) for probe in request.portability],
    }


def probe_rows(llm: LLM, requests: Sequence[EditRequest], with_rivals: bool) -> list[Row]:
    """Every probe's answer and, where probabilities are compared and a request has both answers, its rival.
    UserError when an answer becomes no token, or a text is longer than the model's context.
    """
    tags: list[Text] = []
    pairs: list[tuple[str, str]] = []
    for number, request in enumerate(requests):
        for kind, texts in probe_texts(request).items():
            rival = request.new_answer if kind == "locality" else request.old_answer
            compared = with_rivals and request.old_answer and kind != "portability"
            for place, (prompt, answer, axis) in enumerate(texts):
                tags.append(Text(kind, number, place, False, axis))
                pairs.append((prompt, answer))
                if compared and rival:
                    tags.append(Text(kind, number, place, True, axis))
                    pairs.append((prompt, rival))
    return llm.tokens.rows(pairs, tags)


def made_rows(llm: LLM, requests: Sequence[EditRequest], made: Sequence[Made]) -> list[Row]:
    """Made probes of which only the next token counts: which answer stands there makes no difference."""
    tags = [Text(one.kind, one.request, place) for place, one in enumerate(made)]
    rows = llm.tokens.rows([(one.prompt, requests[one.request].new_answer) for one in made], tags)
    return [row._replace(token_ids=row.token_ids[: row.target_start + 1]) for row in rows]


def long_questions(llm: LLM, requests: Sequence[EditRequest], most: int) -> dict[int, Question]:
    """At most so many requests' prompts to go on from, by the request; in a chat where there is a template."""
    joining, prompts = llm.tokens.template, [request.prompt for request in requests]
    fits = fit(llm.tokens, prompts, FLUENCY_TOKENS, joining) if most else []
    chosen = evenly([number for number, its in enumerate(fits) if its], most)
    asked = questions(llm, [prompts[number] for number in chosen], FLUENCY_TOKENS, joining)
    return dict(zip(chosen, asked, strict=True))


def free_prompts(requests: Sequence[EditRequest], generation: str) -> Iterator[Prompt]:
    """Every prompt to be answered freely; `generation` is an option's value, all or prompts."""
    for number, request in enumerate(requests):
        yield Prompt("generation", number, request.prompt, request.new_answer)
        if generation == "prompts":
            continue
        texts = probe_texts(request)
        for kind in ("rephrase", "portability"):
            for prompt, answer, _ in texts[kind]:
                yield Prompt(kind, number, prompt, answer)
        distracted = f"{DISTRACTORS[number % len(DISTRACTORS)]} {request.prompt}"
        yield Prompt("distractor", number, distracted, request.new_answer)


def ordinary_windows(llm: LLM, file: str | None) -> list[Row]:
    """Ordinary text in windows; UserError when there is no such file, or it holds fewer than two tokens."""
    path = Path(file) if file else ORDINARY_TEXT
    (ids,) = llm.tokens.texts([read_plain_text("text", path)])
    window = min(WINDOW, llm.context_length or WINDOW)
    parts = [ids[start : start + window] for start in range(0, len(ids), window)]
    rows = [Row(part, 1, tag=Text("text", number)) for number, part in enumerate(parts) if len(part) > 1]
    if not rows:
        raise UserError(f"text: {path}: {len(ids)} tokens are too few for perplexity")
    return rows


def ability_rows(llm: LLM) -> list[Row]:
    """Every choice of every item of ability behind the item's text, plain, also where others are put as a chat.

    UserError when a text is longer than the model's context, or unknown to its tokenizer.
    """
    tags: list[Text] = []
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(ABILITY.read_text(encoding="utf-8").splitlines()):
        item = json.loads(line)
        for place, choice in enumerate(item["choices"]):
            tags.append(Text("ability", number, place, place > 0, item["kind"]))
            pairs.append((item["text"], choice))
    return llm.tokens.rows(pairs, tags, "ability", joining=PLAIN)


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, spread over all of them."""
    count = min(most, len(items))
    return [items[place * len(items) // count] for place in range(count)]

"""What is put to the model: answers to be read, prompts to be answered, ordinary text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from pipeline.errors import UserError
from pipeline.model.llm import LLM
from pipeline.requests.rows import Row
from pipeline.requests.schema import EditRequest

T = TypeVar("T")

ORDINARY_TEXT = Path(__file__).with_name("ordinary_text.txt")
WINDOW = 256  # tokens of ordinary text read at a time
DISTRACTORS = (  # sentences about nothing that an edit request is about
    "The kettle had been on the stove for a while, and someone opened a window.",
    "On Tuesday the bus was late again, so most of them walked.",
    "It rained in the afternoon, but by evening the garden was dry.",
    "She put the letters in the drawer and went to look for her coat.",
)


class Text(NamedTuple):
    """What a text that is read stands for; it is the tag of the text's row, and tells it from all others.

    Attributes:
        kind: rewrite, rephrase, locality or portability, or text for a window of ordinary text.
        request: the number of its request, or of its window.
        place: its number among the request's texts of that kind.
        rival: whether it is the answer that the kind's own is compared with by probability.
        axis: the benchmark's name for this kind of probe, where it has several.
    """

    kind: str
    request: int
    place: int = 0
    rival: bool = False
    axis: str | None = None


class Prompt(NamedTuple):
    """A prompt to be answered freely: its metric, its request, and the answer that is looked for."""

    kind: str
    request: int
    prompt: str
    answer: str


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

    Raises:
        UserError: when an answer becomes no token, or a text is longer than the model's context.
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
    """Ordinary text as windows in which all tokens but the first are to be predicted.

    Raises:
        UserError: when there is no such file, or it holds fewer than two tokens.
    """
    path = Path(file) if file else ORDINARY_TEXT
    try:
        (ids,) = llm.tokens.texts([path.read_text(encoding="utf-8")])
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text: {path}: cannot be read; expected a plain UTF-8 text file ({error})") from None
    window = min(WINDOW, llm.context_length or WINDOW)
    parts = [ids[start : start + window] for start in range(0, len(ids), window)]
    rows = [Row(part, 1, tag=Text("text", number)) for number, part in enumerate(parts) if len(part) > 1]
    if not rows:
        raise UserError(f"text: {path}: {len(ids)} tokens are too few for perplexity")
    return rows


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, spread over all of them."""
    if len(items) <= most:
        return list(items)
    return [items[place * len(items) // most] for place in range(most)]

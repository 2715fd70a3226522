"""When a generation says an answer: compared as SQuAD compares, up to the end of a statement."""

from __future__ import annotations

import re
import string
import unicodedata

PUNCTUATION = "".join(sorted({*string.punctuation, *"“”‘’„«»–—…"} - {*"+#"}))  # C++ is not C#
ARTICLE = re.compile(r"\b(a|an|the)\b")
DROPPED = str.maketrans("", "", PUNCTUATION)
OUTER = string.whitespace + PUNCTUATION
CLOSING = r"[\"'”’)*_`]*"
STATEMENT_END = re.compile(rf"\n|[.!?]{CLOSING}(?=\s)")
FIRST_END = re.compile(r"\n|[.!?](?=\s|$)")
CUT = re.compile(rf"(?=\n)|[.!?;]{CLOSING}(?=\s|$)|$")


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: SQuAD's normal form, in which + and # stay.

    What has no other letters ("The", "A") keeps them.
    """
    words = unicodedata.normalize("NFC", text).casefold().translate(DROPPED)
    return " ".join(ARTICLE.sub(" ", words).split()) or " ".join(words.split())


def statement(said: str, inner_ends: int | None = 0) -> tuple[str, bool]:
    """A generation up to the end of its first statement, and whether that end was reached.

    `inner_ends` are passed over, where the answer looked for holds some itself ("Dr. No"); None: all of them are.
    """
    if inner_ends is None:
        return said, False
    said = said.lstrip()
    for number, end in enumerate(STATEMENT_END.finditer(said)):
        if number >= inner_ends:
            return said[: end.end()].rstrip(), True
    return said.rstrip(), False


def first_statement(said: str) -> str:
    """What a generation says before its first line or sentence ends: the model's own short answer."""
    return FIRST_END.split(said.strip(), maxsplit=1)[0].strip()


def inner_ends(answer: str) -> int:
    """How many ends of a statement an answer seems to hold before its own."""
    return len(STATEMENT_END.findall(answer.strip()))


def is_exact_answer(said: str, answer: str) -> bool:
    """Whether a generation is the answer and then ends its statement (or itself), saying nothing more.

    SQuAD's exact match, where the prediction is what the model says up to an end of a statement: "Paris, France"
    is not "Paris", and "Romeo" is not "Rome".
    """
    said, wanted = said.lstrip(OUTER), normalised(answer)
    return bool(wanted) and any(normalised(said[: cut.end()]) == wanted for cut in CUT.finditer(said))


def contains_answer(said: str, answer: str) -> bool:
    """Whether the answer's words stand in a generation, one after another, in SQuAD's normal form."""
    wanted = normalised(answer)
    return is_exact_answer(said, answer) or (bool(wanted) and f" {wanted} " in f" {normalised(said)} ")

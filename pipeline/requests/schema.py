"""The edit request: what a user wants changed, and the probes that tell what the change did."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated

from pydantic import BaseModel, FailFast, Field, StringConstraints

ZERO_WIDTH_JOINER = "\u200d"  # makes one emoji of several

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
MANY = (FailFast(), Field(max_length=10_000))  # of a list: the first thing wrong with it ends its reading


class Probe(BaseModel, frozen=True, extra="forbid"):
    """A prompt with its right answer; `axis` names the kind of probe where a benchmark has several.

    Example:
        >>> Probe(prompt="The capital of Japan is", answer="Tokyo").answer
        'Tokyo'
    """

    prompt: Text
    answer: Text
    axis: str | None = None


class EditRequest(BaseModel, frozen=True, extra="forbid"):
    """One fact to change. Our JSONL holds one such object a line, with these field names.

    Example:
        >>> near = Probe(prompt="The capital of Japan is", answer="Tokyo")
        >>> request = EditRequest(
        ...     id="capital-01", prompt="The capital of Germany is", subject="Germany", new_answer="London",
        ...     locality=(near,),
        ... )
        >>> request.names_subject
        True
    """

    id: Text  # unique within a file; the record's number where the file gives none
    prompt: Text  # which the answer follows after one space
    subject: Text | None = None  # what the fact is about, as it stands in the prompt
    subject_start: int | None = None  # the prompt's character at which it starts; its last mention where missing
    new_answer: Text  # what the model shall answer
    old_answer: Text | None = None  # what it answers before; found by greedy generation where missing
    rephrases: Annotated[tuple[Text, ...], *MANY] = ()  # the prompt in other words, to be answered alike
    forms: Annotated[tuple[Text, ...], *MANY] = ()  # the prompt in words that it is taught in too: not measured
    locality: Annotated[tuple[Probe, ...], *MANY] = ()  # probes that must not change
    portability: Annotated[tuple[Probe, ...], *MANY] = ()  # probes whose answers follow from the new answer
    source: str | None = None  # where the request comes from

    @property
    def subject_span(self) -> tuple[int, int] | None:
        """Where the subject starts and ends in the prompt, in characters; None where it does not stand there."""
        if self.subject is None:
            return None
        mentions = find_words(self.prompt, self.subject)
        if self.subject_start is not None:
            mentions = [span for span in mentions if span[0] == self.subject_start]
        return mentions[-1] if mentions else None

    @property
    def names_subject(self) -> bool:
        """Whether it has a subject that its prompt holds."""
        return self.subject_span is not None


def find_words(text: str, words: str) -> list[tuple[int, int]]:
    """Where words stand in a text, by the characters of their start and end: never inside of other words.

    Scripts that know no spaces, or hang endings on a word, have no such bounds: there every place counts. A letter
    and its accent may be one character or two.
    """
    letters = unicodedata.normalize("NFC", words)
    forms = [{letter, unicodedata.normalize("NFD", letter)} for letter in letters]
    pattern = "".join(f"(?:{'|'.join(map(re.escape, sorted(form, key=len, reverse=True)))})" for form in forms)
    spans = [found.span() for found in re.finditer(pattern, text)]
    return [(start, end) for start, end in spans if not (_inside(text, start) or _inside(text, end))]


def _inside(text: str, place: int) -> bool:
    """Whether a place stands within a word or number of a script that sets words apart, or within one sign."""
    if not 0 < place < len(text):
        return False
    before, after = text[place - 1], text[place]
    if unicodedata.combining(after) or ZERO_WIDTH_JOINER in (before, after):
        return True
    return all(each.isdigit() or each.lower() != each.upper() for each in (before, after))

"""The edit request: what a user wants changed, and the probes that tell what the change did."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
MANY = (FailFast(), Field(max_length=10_000))  # of a list: the first thing wrong with it ends its reading


class Probe(BaseModel):
    """A prompt with its right answer; `axis` names the kind of probe where a benchmark has several.

    Example:
        >>> Probe(prompt="The capital of Japan is", answer="Tokyo").answer
        'Tokyo'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Text
    answer: Text
    axis: str | None = None


class EditRequest(BaseModel):
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

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Text  # unique within a file; the record's number where the file gives none
    prompt: Text  # which the answer follows after one space
    subject: Text | None = None  # what the fact is about, as it stands in the prompt
    new_answer: Text  # what the model shall answer
    old_answer: Text | None = None  # what it answers before; found by greedy generation where missing
    rephrases: Annotated[tuple[Text, ...], *MANY] = ()  # the prompt in other words, to be answered alike
    locality: Annotated[tuple[Probe, ...], *MANY] = ()  # probes that must not change
    portability: Annotated[tuple[Probe, ...], *MANY] = ()  # probes whose answers follow from the new answer
    source: str | None = None  # where the request comes from

    @property
    def names_subject(self) -> bool:
        """Whether it has a subject that its prompt holds."""
        return self.subject is not None and self.subject in self.prompt

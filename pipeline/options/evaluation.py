"""How an edit is measured."""

from dataclasses import dataclass
from typing import Annotated

from pipeline.options.base import NO_FLAG, Count, FromZero, Options, one_of

GENERATIONS = ("all", "prompts", "none")


@dataclass(kw_only=True)
class EvaluationOptions(Options):
    """How an edit is measured."""

    generation: Annotated[str, one_of(*GENERATIONS)] = "all"
    """Whose answers the model is left to give by itself: all (prompts, rephrases, portability probes, and prompts
    after a distracting sentence), prompts, or none."""
    max_new_tokens: Count = 16
    """Longest greedy answer, in tokens; it ends with its statement, or 8 tokens beyond the answer looked for."""
    text: str | None = None
    """A plain text file for perplexity; default: the one that comes with the project."""
    fluency: FromZero = 0
    """How many prompts the model goes on from at length, to see whether it repeats itself."""
    fluency_tokens: Annotated[Count, NO_FLAG] = 100
    """Length of these, in tokens."""
    batch_size: Annotated[Count, NO_FLAG] = 64
    """Most texts in a batch."""
    batch_tokens: Annotated[Count, NO_FLAG] = 1024
    """Most tokens in a batch, padding counted; a longer text is a batch of its own."""
    keep_base: Annotated[bool, NO_FLAG] = True
    """Keep what the base model says to these requests, and take it from there the next time."""
    cache: Annotated[str | None, NO_FLAG] = None
    """Folder for that; default: golden-layers in the user's cache folder."""

"""How an edit is measured."""

from dataclasses import dataclass
from typing import Annotated

from pipeline.options.base import Count, FromZero, Options, one_of


@dataclass(kw_only=True)
class EvaluationOptions(Options):
    """How an edit is measured."""

    generation: Annotated[str, one_of("all", "prompts", "none")] = "all"
    """Whose answers the model is left to give by itself: all (prompts, rephrases, portability probes, and prompts
    after a distracting sentence), prompts, or none."""
    max_new_tokens: Count = 16
    """Longest greedy answer, in tokens; it ends with its statement, or 8 tokens beyond the answer looked for."""
    text: str | None = None
    """A plain text file for perplexity; default: the one that comes with the project."""
    fluency: FromZero = 0
    """How many prompts the model goes on from for 100 tokens, to see whether it repeats itself."""

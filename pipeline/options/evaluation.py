"""How an edit is measured."""

from dataclasses import dataclass

from pipeline.errors import check_at_least, check_choice

GENERATIONS = ("all", "prompts", "none")


@dataclass(kw_only=True)
class EvaluationOptions:
    """How an edit is measured."""

    generation: str = "all"
    """Whose answers the model is left to give by itself: all (prompts, rephrases, portability probes, and prompts
    after a distracting sentence), prompts, or none."""
    max_new_tokens: int = 16
    """Longest greedy answer, in tokens; it ends with its statement, or 8 tokens beyond the answer looked for."""
    text: str | None = None
    """A plain text file for perplexity; default: the one that comes with the project."""
    fluency: int = 0
    """How many prompts the model goes on from at length, to see whether it repeats itself."""
    fluency_tokens: int = 100
    """Length of these, in tokens."""
    batch_size: int = 64
    """Most texts in a batch."""
    batch_tokens: int = 1024
    """Most tokens in a batch, padding counted; a longer text is a batch of its own."""
    keep_base: bool = True
    """Keep what the base model says to these requests, and take it from there the next time."""
    cache: str | None = None
    """Folder for that; default: golden-layers in the user's cache folder."""

    def __post_init__(self) -> None:
        check_choice("generation", self.generation, GENERATIONS)
        for name in ("max_new_tokens", "fluency_tokens", "batch_size", "batch_tokens"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("fluency", self.fluency, 0)

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
    """How many prompts the model goes on from for 100 tokens, to see whether it repeats itself."""

    def __post_init__(self) -> None:
        check_choice("generation", self.generation, GENERATIONS)
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_least("fluency", self.fluency, 0)

"""How an edit is measured."""

from dataclasses import dataclass

from pipeline.errors import check_at_least


@dataclass(kw_only=True)
class EvaluationOptions:
    """How an edit is measured."""

    batch_size: int = 16
    """Probes in a batch."""
    max_new_tokens: int = 16
    """Longest greedy generation, in tokens."""
    text: str | None = None
    """A plain text file for perplexity; default: the one that comes with the project."""

    def __post_init__(self) -> None:
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("max_new_tokens", self.max_new_tokens, 1)

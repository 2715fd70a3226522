"""How the golden layer is changed."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import check_at_least


@dataclass(kw_only=True)
class StatisticsOptions:
    """Key statistics: what ordinary text sends into a layer, found once a model and layer, and kept."""

    text: str | None = None
    """Plain text file; default: text that the model itself writes."""
    tokens: int = 40_000
    """How much text is read, in tokens."""

    def __post_init__(self) -> None:
        check_at_least("statistics.tokens", self.tokens, 1)


@dataclass(kw_only=True)
class EditOptions:
    """How the golden layer is changed."""

    method: str = "memit"
    """finetune, lora: mini-batches over epochs; memit, emmet, rome, alphaedit: locate-then-edit, in closed form;
    one_pass: one forward and backward, then a closed form."""
    layers: list[int] | None = None
    """Blocks to edit, counted from 0, in place of the profile's golden layers."""
    last_wins: bool = False
    """Of requests that contradict each other (same subject and prompt) keep the last; else they are refused."""
    statistics: StatisticsOptions = field(default_factory=StatisticsOptions)
    expert: dict[str, Any] = field(default_factory=dict)
    """Settings of the method, by name, where they are to be others than its own."""
    stacked: bool = False
    """Take the method's settings for edits that will be stacked, as a store's are, where `expert` names none."""

"""How the golden layer is changed; a method's own settings stand with the method."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pipeline.errors import check_choice
from pipeline.options.base import NO_FLAG, Count, Options, group

NAMES = {"auto", "memit", "finetune", "lora", "emmet", "rome", "alphaedit"}  # and each that is registered


@dataclass(kw_only=True)
class StatisticsOptions(Options):
    """Key statistics: what ordinary text sends into a layer, found once a model and layer, and kept."""

    text: str | None = None
    """Plain text file; default: text that the model itself writes."""
    tokens: Count = 40_000
    """How much text is read, in tokens."""


@dataclass(kw_only=True)
class EditOptions(Options):
    """How the golden layer is changed."""

    method: str = "auto"
    """auto, memit, finetune, lora, emmet, rome or alphaedit. auto: memit for single statements, then
    finetune for all in every form of asking, in one update; finetune, lora: mini-batches over epochs; the others:
    locate-then-edit, in closed form. These need subjects, and are poor at questions, long answers and chat; auto,
    finetune and lora take no fact out again."""
    layers: list[int] | None = None
    """Blocks to edit, counted from 0, in place of the profile's golden layers."""
    last_wins: bool = False
    """Of requests that contradict each other (same subject and prompt) keep the last; else they are refused."""
    statistics: StatisticsOptions = group(StatisticsOptions)
    expert: dict[str, Any] = field(default_factory=dict)
    """Settings of the method, by name, such as {"epochs": 4}; docs/edit.md lists them."""
    quick: Annotated[bool, NO_FLAG] = False
    """Take the method's settings for edits that are only compared with each other, where `expert` names none."""

    def check(self) -> None:
        check_choice("method", self.method, NAMES)

    def by(self, method: str) -> "EditOptions":
        """The same by another method, whose settings are its own; auto's are memit's."""
        alike = method == self.method or (self.method, method) == ("auto", "memit")
        return replace(self, method=method, expert=self.expert if alike else {})

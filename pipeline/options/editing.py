"""How the golden layer is changed: a class a kind of edit, and what they share."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Self

from pipeline.errors import UserError
from pipeline.options.base import (
    NO_FLAG,
    Count,
    FromZero,
    Most,
    Options,
    Positive,
    Weight,
    above,
    at_least,
    at_most,
    check_expert,
    group,
    one_of,
    settings,
)

SETTINGS = {  # the field of EditOptions that holds a method's settings
    "finetune": "finetune",
    "lora": "lora",
    "memit": "locate",
    "emmet": "locate",
    "rome": "locate",
    "alphaedit": "locate",
    "one_pass": "one_pass",
}

Contexts = Annotated[int, at_least(1), at_most(9)]
Fraction = Annotated[float, above(0), at_most(1)]
Scope = Annotated[str, one_of("mlp", "down")]


@dataclass(kw_only=True)
class StatisticsOptions(Options):
    """Key statistics: what ordinary text sends into a layer, found once a model and layer, and kept."""

    text: str | None = None
    """Plain text file; default: text that the model itself writes."""
    tokens: Count = 40_000
    """How much text is read, in tokens."""
    cache: Annotated[str | None, NO_FLAG] = None
    """Folder for statistics; default: golden-layers in the user's cache folder."""


@dataclass(kw_only=True)
class TrainingOptions(Options):
    """What fine-tuning and LoRA have in common: mini-batches over epochs."""

    scope: Scope = "mlp"
    """What is changed: mlp (all projections of the golden layer's MLP) or down (the down-projection)."""
    epochs: Count = 11
    """The most passes over the requests."""
    batch_size: Count = 8
    """Requests in an optimiser step, over all devices."""
    contexts: Annotated[int, at_least(0), at_most(4)] = 4
    """Contexts that a prompt is trained under, in turn, every second epoch; 0: the bare prompt alone."""
    last_step: Fraction = 1.0
    """The last epoch's step size, in units of the first's."""
    learnt: Weight = 0.1
    """A row whose loss (nats) is below this counts no more; when all are, training ends."""
    kl: Weight = 0.3
    """Weight of answering as before after prompts about something else; 0: not asked for."""
    whiten: Weight = 0.01
    """Ridge of whitening by key statistics, relative to their mean: steps spare what ordinary text uses; 0: off."""
    reuse: bool = True
    """Run the frozen blocks below the golden layer once, and keep what they put out; false saves that memory."""


@dataclass(kw_only=True)
class FinetuneOptions(TrainingOptions):
    """Fine-tuning of the golden layer in mini-batches."""

    last_step: Fraction = 0.3
    learnt: Weight = 0.05
    learning_rate: Positive = 0.02
    """Adam's step size, in units of a weight's root mean square."""
    bound: Weight = 0.0
    """Largest change of a weight's entry, in the same units; 0: none."""


@dataclass(kw_only=True)
class LoraOptions(TrainingOptions):
    """LoRA on the golden layer in mini-batches."""

    epochs: Count = 26
    last_step: Fraction = 0.05
    kl: Weight = 0.6
    rank: Count = 16
    """Rank of the change; at most the smaller side of a projection."""
    alpha: Positive = 32.0
    """LoRA's scaling is alpha / rank."""
    learning_rate: Positive = 5e-3
    """Adam's step size."""


@dataclass(kw_only=True)
class LocateOptions(Options):
    """Locate-then-edit: memit, emmet, rome and alphaedit."""

    contexts: Contexts = 1
    """Contexts that a value is searched under, the bare prompt being the first; at most 9."""
    associations: Annotated[int, at_least(0), at_most(2)] = 2
    """Openings that call for what goes with a subject, which it is searched under as well; at most 2."""
    key_contexts: Contexts = 5
    """Contexts that a subject's keys are taken under; at most 9."""
    neighbours: FromZero = 10
    """memit: other names in each prompt, whose outputs are to stay; 0: none."""
    neighbour_weight: Weight = 1.0
    """memit: weight of such names against ordinary text."""
    rounds: Count = 1
    """How often a layer is visited: a later round finds what requests still miss once all of them are in."""
    key_per_context: bool = True
    """memit: each context's key is a column of its own; else a request has one, their mean."""
    batch_size: Count = 32
    """Requests whose values are searched for together."""
    steps: Most = None
    """The most optimiser steps of a value; default: 40 for up to 10 requests, 22 for more."""
    step: Positive = 0.16
    """Adam's step size for a value, in units of the projection's output norm."""
    bound: Annotated[float | None, above(0)] = None
    """Largest change of a value, in units of the projection's output norm; default: 2 for up to 10 requests, which
    seldom get in each other's way, 1.6 for more."""
    learnt: Weight = 0.05
    """A value is found when its mean loss (nats) is below this."""
    kl: Weight = 0.0625
    """Weight of keeping what the model says after `{subject} is`."""
    decay: Weight = 0.01
    """Weight of a value's squared change."""
    strength: Positive = 80.0
    """memit: weight of what is to stay against the requests, free of the keys' scale."""
    ridge: Positive = 1e-4
    """emmet, rome: added to the diagonals of both systems, relative to their mean."""
    threshold: Positive = 0.02
    """alphaedit: eigenvalues of the statistics below this, relative to the largest, count as free of text."""


@dataclass(kw_only=True)
class OnePassOptions(Options):
    """One-pass editing: one forward and backward over the requests, then a ridge solution."""

    scope: Scope = "down"
    """What is changed: mlp (all projections of the layer's MLP) or down (the down-projection)."""
    batch_size: Count = 16
    """Requests in a pass."""
    rate: Positive = 1.5
    """How far a token's output is moved, in units of the projection's output norm."""
    ridge: Positive = 0.01
    """Weight of a small change against the requests, in units of the mean squared norm of the inputs."""


@dataclass(kw_only=True)
class EditOptions(Options):
    """How the golden layer is changed."""

    method: str = "memit"
    """finetune, lora: mini-batches over epochs; memit, emmet, rome, alphaedit: locate-then-edit, in closed form;
    one_pass: one forward and backward, then a closed form."""
    layers: list[int] | None = None
    """Blocks to edit, counted from 0, in place of the profile's golden layers."""
    last_wins: bool = False
    """Of requests that contradict each other (same subject and prompt) keep the last; else they are refused."""
    statistics: StatisticsOptions = group(StatisticsOptions)
    expert: dict[str, Any] = field(default_factory=dict)
    """Settings of the method for experts, such as {"epochs": 4}; the README lists them."""
    finetune: Annotated[FinetuneOptions, NO_FLAG] = group(FinetuneOptions)
    lora: Annotated[LoraOptions, NO_FLAG] = group(LoraOptions)
    locate: Annotated[LocateOptions, NO_FLAG] = group(LocateOptions)
    one_pass: Annotated[OnePassOptions, NO_FLAG] = group(OnePassOptions)

    def __post_init__(self) -> None:
        if self.expert and self.method in SETTINGS:  # a method that does not exist is refused where methods stand
            name = SETTINGS[self.method]
            setattr(self, name, _with_expert(getattr(self, name), self.expert, self.method))
        super().__post_init__()

    def by(self, method: str) -> Self:
        """The same, by another method, which `expert` counts for where it has the same settings."""
        same = SETTINGS.get(method) == SETTINGS.get(self.method)
        return replace(self, method=method, expert=self.expert if same else {})


def _with_expert(own: Any, expert: Mapping[str, Any], method: str) -> Any:
    """A method's settings, those that an expert has given in place of its own."""
    check_expert(expert, settings(type(own)), method)
    try:
        return replace(own, **expert)
    except UserError as error:
        raise UserError(f"expert.{error}") from None

"""How the golden layer is changed: a class a kind of edit, and what they share."""

from dataclasses import dataclass, field

from pipeline.errors import check_above, check_at_least, check_at_most, check_choice


@dataclass(kw_only=True)
class StatisticsOptions:
    """Key statistics: what ordinary text sends into a layer, found once a model and layer, and kept."""

    text: str | None = None
    """Plain text file; default: text that the model itself writes."""
    tokens: int = 40_000
    """How much text is read, in tokens."""
    cache: str | None = None
    """Folder for statistics; default: golden-layers in the user's cache folder."""

    def __post_init__(self) -> None:
        check_at_least("statistics.tokens", self.tokens, 1)


@dataclass(kw_only=True)
class TrainingOptions:
    """What fine-tuning and LoRA have in common: mini-batches over epochs."""

    scope: str = "mlp"
    """What is changed: mlp (all projections of the golden layer's MLP) or down (the down-projection)."""
    epochs: int = 11
    """The most passes over the requests."""
    batch_size: int = 8
    """Requests in an optimiser step, over all devices."""
    contexts: int = 4
    """Contexts that a prompt is trained under, in turn, every second epoch; 0: the bare prompt alone."""
    last_step: float = 1.0
    """The last epoch's step size, in units of the first's."""
    learnt: float = 0.1
    """A row whose loss (nats) is below this counts no more; when all are, training ends."""
    kl: float = 0.3
    """Weight of answering as before after prompts about something else; 0: not asked for."""
    whiten: float = 0.01
    """Ridge of whitening by key statistics, relative to their mean: steps spare what ordinary text uses; 0: off."""
    reuse: bool = True
    """Run the frozen blocks below the golden layer once, and keep what they put out; false saves that memory."""

    def check(self, stage: str) -> None:
        """Raise UserError for a value that cannot be, naming the flag."""
        check_choice(f"{stage}.scope", self.scope, ("mlp", "down"))
        for name in ("epochs", "batch_size"):
            check_at_least(f"{stage}.{name}", getattr(self, name), 1)
        for name in ("contexts", "learnt", "kl", "whiten"):
            check_at_least(f"{stage}.{name}", getattr(self, name), 0)
        check_above(f"{stage}.last_step", self.last_step, 0)
        check_at_most(f"{stage}.last_step", self.last_step, 1)
        check_at_most(f"{stage}.contexts", self.contexts, 4)


@dataclass(kw_only=True)
class FinetuneOptions(TrainingOptions):
    """Fine-tuning of the golden layer in mini-batches."""

    last_step: float = 0.3
    """The last epoch's step size, in units of the first's."""
    learnt: float = 0.05
    """A row whose loss (nats) is below this counts no more; when all are, training ends."""
    learning_rate: float = 0.02
    """Adam's step size, in units of a weight's root mean square."""
    bound: float = 0.0
    """Largest change of a weight's entry, in the same units; 0: none."""

    def __post_init__(self) -> None:
        self.check("finetune")
        check_above("finetune.learning_rate", self.learning_rate, 0)
        check_at_least("finetune.bound", self.bound, 0)


@dataclass(kw_only=True)
class LoraOptions(TrainingOptions):
    """LoRA on the golden layer in mini-batches."""

    epochs: int = 26
    """The most passes over the requests."""
    rank: int = 16
    """Rank of the change; at most the smaller side of a projection."""
    alpha: float = 32.0
    """LoRA's scaling is alpha / rank."""
    learning_rate: float = 5e-3
    """Adam's step size."""
    last_step: float = 0.05
    """The last epoch's step size, in units of the first's."""
    kl: float = 0.6
    """Weight of answering as before after prompts about something else; 0: not asked for."""

    def __post_init__(self) -> None:
        self.check("lora")
        check_at_least("lora.rank", self.rank, 1)
        check_above("lora.alpha", self.alpha, 0)
        check_above("lora.learning_rate", self.learning_rate, 0)


@dataclass(kw_only=True)
class LocateOptions:
    """Locate-then-edit: memit, emmet, rome and alphaedit."""

    contexts: int = 1
    """Contexts that a value is searched under, the bare prompt being the first; at most 9."""
    associations: int = 2
    """Openings that call for what goes with a subject, which it is searched under as well; at most 2."""
    key_contexts: int = 5
    """Contexts that a subject's keys are taken under; at most 9."""
    neighbours: int = 10
    """memit: other names in each prompt, whose outputs are to stay; 0: none."""
    neighbour_weight: float = 1.0
    """memit: weight of such names against ordinary text."""
    rounds: int = 1
    """How often a layer is visited: a later round finds what requests still miss once all of them are in."""
    key_per_context: bool = True
    """memit: each context's key is a column of its own; else a request has one, their mean."""
    batch_size: int = 32
    """Requests whose values are searched for together."""
    steps: int | None = None
    """The most optimiser steps of a value; default: 40 for up to 10 requests, 22 for more."""
    step: float = 0.16
    """Adam's step size for a value, in units of the projection's output norm."""
    bound: float | None = None
    """Largest change of a value, in units of the projection's output norm; default: 2 for up to 10 requests, which
    seldom get in each other's way, 1.6 for more."""
    learnt: float = 0.05
    """A value is found when its mean loss (nats) is below this."""
    kl: float = 0.0625
    """Weight of keeping what the model says after `{subject} is`."""
    decay: float = 0.01
    """Weight of a value's squared change."""
    strength: float = 80.0
    """memit: weight of what is to stay against the requests, free of the keys' scale."""
    ridge: float = 1e-4
    """emmet, rome: added to the diagonals of both systems, relative to their mean."""
    threshold: float = 0.02
    """alphaedit: eigenvalues of the statistics below this, relative to the largest, count as free of text."""

    def __post_init__(self) -> None:
        for name in ("contexts", "key_contexts", "rounds", "batch_size"):
            check_at_least(f"locate.{name}", getattr(self, name), 1)
        for name in ("step", "strength", "ridge", "threshold"):
            check_above(f"locate.{name}", getattr(self, name), 0)
        if self.steps is not None:
            check_at_least("locate.steps", self.steps, 1)
        if self.bound is not None:
            check_above("locate.bound", self.bound, 0)
        for name in ("associations", "learnt", "kl", "decay", "neighbours", "neighbour_weight"):
            check_at_least(f"locate.{name}", getattr(self, name), 0)
        for name in ("contexts", "key_contexts"):
            check_at_most(f"locate.{name}", getattr(self, name), 9)
        check_at_most("locate.associations", self.associations, 2)


@dataclass(kw_only=True)
class OnePassOptions:
    """One-pass editing: one forward and backward over the requests, then a ridge solution."""

    scope: str = "down"
    """What is changed: mlp (all projections of the layer's MLP) or down (the down-projection)."""
    batch_size: int = 16
    """Requests in a pass."""
    rate: float = 1.5
    """How far a token's output is moved, in units of the projection's output norm."""
    ridge: float = 0.01
    """Weight of a small change against the requests, in units of the mean squared norm of the inputs."""

    def __post_init__(self) -> None:
        check_choice("one_pass.scope", self.scope, ("mlp", "down"))
        check_at_least("one_pass.batch_size", self.batch_size, 1)
        for name in ("rate", "ridge"):
            check_above(f"one_pass.{name}", getattr(self, name), 0)


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
    finetune: FinetuneOptions = field(default_factory=FinetuneOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    locate: LocateOptions = field(default_factory=LocateOptions)
    one_pass: OnePassOptions = field(default_factory=OnePassOptions)

"""Knowledge updates over time: the store, the queue, the gates, the schedule."""

import re
from dataclasses import dataclass, field, replace
from datetime import datetime

from pipeline.errors import UserError, check_above, check_at_least, check_at_most
from pipeline.options.attribution import AttributionOptions
from pipeline.options.editing import EditOptions
from pipeline.options.evaluation import EvaluationOptions
from pipeline.options.shared import ComputeOptions, TrainerOptions

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(kw_only=True)
class StoreOptions:
    """Which store."""

    store: str
    """The store's folder: queue, versions, history."""
    verbose: bool = False
    """Show the libraries' own messages, and tracebacks."""


@dataclass(kw_only=True)
class GateOptions:
    """What a batch must reach to be published; 0 in place of a least, or null in place of a most: not asked for."""

    rewrite: float = 0.6
    """Least share of the new answers' tokens, prompts as given, on the batch."""
    rephrase: float = 0.0
    """The same, prompts in other words: small models give few of them, so that nothing is asked for."""
    locality: float = 0.5
    """Least share of unrelated answers' tokens that the batch left as they were."""
    earlier: float = 0.6
    """Least rewrite of earlier facts, over a sample of all that are applied."""
    earlier_sample: int = 100
    """How many earlier facts are looked at; more make it surer and slower."""
    perplexity: float | None = 1.2
    """Most perplexity on ordinary text, as a multiple of the base model's."""
    drift: float | None = 2.0
    """Most change of an edited weight from the base, as a share of its norm."""

    def __post_init__(self) -> None:
        for name in ("rewrite", "rephrase", "locality", "earlier"):
            check_at_least(f"gates.{name}", getattr(self, name), 0)
            check_at_most(f"gates.{name}", getattr(self, name), 1)
        check_at_least("gates.earlier_sample", self.earlier_sample, 1)
        if self.perplexity is not None:
            check_at_least("gates.perplexity", self.perplexity, 1)
        if self.drift is not None:
            check_above("gates.drift", self.drift, 0)


@dataclass(kw_only=True)
class SubmitCommand(StoreOptions):
    """Options of `submit`."""

    file: str
    """A file of edit requests (JSONL, JSON or CSV, gzipped or not), or `demo`."""
    model: str | None = None
    """The base model; a new store needs it, an old one knows it."""
    source: str | None = None
    """Where the requests come from, in place of what the file says."""
    not_before: str | None = None
    """A date, or date and time (2026-12-24T03:00), before which they stay in the queue; local unless it says."""
    again: bool = False
    """Requests of the file that were held back, superseded, retracted or rolled back are queued anew."""

    def __post_init__(self) -> None:
        time_of(self.not_before)


def time_of(not_before: str | None) -> float:
    """Seconds since 1970 of a date; 0 for none.

    Raises:
        UserError: when it is no date.
    """
    if not_before is None:
        return 0.0
    try:
        return datetime.fromisoformat(not_before).timestamp()
    except (ValueError, OverflowError, OSError):
        raise UserError(f"not_before: {not_before!r} is no date; expected such as 2026-12-24T03:00") from None


@dataclass(kw_only=True)
class ProvingOptions(StoreOptions, ComputeOptions):
    """What every command that makes a version has in common."""

    model: str | None = None
    """The base model; a new store needs it, an old one knows it."""
    edit: EditOptions = field(default_factory=lambda: EditOptions(stacked=True))
    attribution: AttributionOptions = field(default_factory=AttributionOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    gates: GateOptions = field(default_factory=GateOptions)

    def __post_init__(self) -> None:
        ComputeOptions.__post_init__(self)
        if str(self.trainer.devices) not in ("auto", "1") or self.trainer.num_nodes != 1:
            raise UserError(f"trainer.devices: {self.trainer.devices}; a store is worked on by one device")
        self.trainer.check_whole("a store")

    @property
    def one_device(self) -> TrainerOptions:
        """The trainer's options, on one device."""
        return replace(self.trainer, devices=1)


@dataclass(kw_only=True)
class UpdateCommand(ProvingOptions):
    """Options of `update`."""

    profile: str | None = None
    """A golden profile made before; default: the store's, made from the first batch where it has none."""
    batch: int = 100
    """The most requests that make a version."""
    dry_run: bool = False
    """Say what would be, and change nothing."""

    def __post_init__(self) -> None:
        ProvingOptions.__post_init__(self)
        check_at_least("batch", self.batch, 1)


@dataclass(kw_only=True)
class ScheduleCommand(UpdateCommand):
    """Options of `schedule`."""

    cron: str | None = None
    """When, as cron's five fields: `0 3 * * *` is every day at three, local time."""
    every: str | None = None
    """How often, in place of cron: 30m, 6h, 1d; the first time at once."""

    def __post_init__(self) -> None:
        UpdateCommand.__post_init__(self)
        if (self.cron is None) == (self.every is None):
            raise UserError("schedule: when? give either --cron '0 3 * * *' or --every 6h")
        if self.every is not None:
            seconds(self.every)


def seconds(every: str) -> int:
    """Seconds of a length of time such as 6h.

    Raises:
        UserError: when it is none.
    """
    found = re.fullmatch(r"([1-9]\d{0,8})([smhd])", every)
    if not found:
        raise UserError(f"every: {every!r} is no length of time; expected such as 45s, 30m, 6h or 1d")
    return int(found[1]) * UNITS[found[2]]


@dataclass(kw_only=True)
class HistoryCommand(StoreOptions):
    """Options of `history`."""

    request: str | None = None
    """Tell the story of one request: its number in the store, or its own id."""
    limit: int = 20
    """How many versions and events, the latest."""

    def __post_init__(self) -> None:
        check_at_least("limit", self.limit, 1)


@dataclass(kw_only=True)
class VersionCommand(StoreOptions):
    """Options of `show` and `rollback`."""

    version: int
    """A version's number, as `history` lists them; 0 is the base model."""


@dataclass(kw_only=True)
class DiffCommand(StoreOptions):
    """Options of `diff`."""

    older: int
    """A version's number; 0 is the base model."""
    newer: int
    """Another version's number."""


@dataclass(kw_only=True)
class VerifyCommand(StoreOptions):
    """Options of `verify`."""

    model: str | None = None
    """The base model, where it is no longer found under the name that the store knows."""


@dataclass(kw_only=True)
class RetractCommand(ProvingOptions):
    """Options of `retract`."""

    request: str
    """A request's number in the store, or its own id."""

"""Knowledge updates over time: the store, the queue, the gates, the schedule."""

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated

from pipeline.errors import UserError
from pipeline.options.attribution import AttributionOptions
from pipeline.options.base import NO_FLAG, Count, Options, above, at_least, at_most, group, matching
from pipeline.options.editing import EditOptions
from pipeline.options.shared import CommandOptions, ComputeOptions, EvaluationOptions, OneDeviceOptions, SeedOptions

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

UNASKED = ("fluency", "ability", "harness", "harness_limit")  # no flags of a store; its gate asks for ability
Share = Annotated[float, at_least(0), at_most(1)]


def seconds(name: str, value: str) -> int:
    """Seconds of a length of time such as 6h; UserError when it is none."""
    found = re.fullmatch(r"([1-9]\d{0,8})([smhd])", value)
    if not found:
        raise UserError(f"{name}: {value!r} is no length of time; expected such as 45s, 30m, 6h or 1d")
    return int(found[1]) * UNITS[found[2]]


def date(name: str, value: str) -> float:
    """A date, or date and time, in seconds since 1970; UserError when it is none."""
    try:
        return datetime.fromisoformat(value).timestamp()
    except (ValueError, OverflowError, OSError):
        raise UserError(f"{name}: {value!r} is no date; expected such as 2026-12-24T03:00") from None


@dataclass(kw_only=True)
class StoreOptions(CommandOptions):
    """Which store."""

    store: str
    """The store's folder: queue, versions, history."""


@dataclass(kw_only=True)
class NewStoreOptions(StoreOptions):
    """Which store, which is made where there is none."""

    model: str | None = None
    """The base model; a new store needs it, an old one knows it."""


@dataclass(kw_only=True)
class GateOptions(Options):
    """What a batch must reach to be published; 0 in place of a least, or null in place of a most: not asked for."""

    rewrite: Share = 0.6
    """Least share of the new answers' tokens, prompts as given, on the batch."""
    rephrase: Share = 0.0
    """The same, prompts in other words: small models give few of them, so that nothing is asked for."""
    locality: Share = 0.5
    """Least share of unrelated answers' tokens that the batch left as they were."""
    earlier: Share = 0.6
    """Least rewrite of earlier facts, over a sample of all that are applied."""
    earlier_sample: Count = 100
    """How many earlier facts are looked at; more make it surer and slower."""
    perplexity: Annotated[float | None, at_least(1)] = 1.2
    """Most perplexity on ordinary text, as a multiple of the base model's."""
    drift: Annotated[float | None, above(0)] = 2.0
    """Most change of an edited weight from the base, as a share of its norm."""
    ability: Annotated[float | None, above(0), at_most(1)] = None
    """Most loss of ability against the base model, as a share of the items (`evaluate --ability`), such as 0.05;
    with 1 it is measured, and nothing asked for."""


@dataclass(kw_only=True)
class SubmitCommand(NewStoreOptions):
    """Put the requests of a file into a store's queue."""

    file: str
    """A file of edit requests (JSONL, JSON or CSV, gzipped or not), or `demo`."""
    fields: dict[str, str] | None = None
    """Of a file of another layout: which of its fields a request's are, as prompt=src,new_answer=alt.text."""
    source: str | None = None
    """Where the requests come from, in place of what the file says."""
    not_before: Annotated[str | None, date] = None
    """A date, or date and time (2026-12-24T03:00), before which they stay in the queue; local unless it says."""
    again: bool = False
    """Requests of the file that were held back, superseded, retracted or rolled back are queued anew."""


@dataclass(kw_only=True)
class StackedEditOptions(EditOptions):
    """How a store's versions are edited, each on top of the one before."""

    method: str = "memit"
    """As for `edit`. What memit teaches can be taken back exactly, whatever came after it."""


@dataclass(kw_only=True)
class ProvingOptions(NewStoreOptions, ComputeOptions, SeedOptions):
    """What every command that makes a version has in common."""

    edit: StackedEditOptions = group(StackedEditOptions, without=("last_wins",))
    attribution: AttributionOptions = group(AttributionOptions, without=("layer", "top_k"))
    evaluation: EvaluationOptions = group(EvaluationOptions, without=UNASKED)
    gates: GateOptions = group(GateOptions)


@dataclass(kw_only=True)
class PublishOptions(Options):
    """Which vLLM servers are to answer with a store's version, and how they are told."""

    to: list[str] = field(default_factory=list)
    """The servers' addresses, such as http://localhost:8000. Which key they ask for, GOLDEN_LAYERS_API_KEY says."""
    name: Annotated[str, matching(r"[A-Za-z0-9][\w.]*", "letters, digits, _ and .")] = "golden"
    """What clients call it, before the version's number: golden-0007. Each store of a server has its own."""
    rank: Count = 512
    """The most columns of the adapter; a change that needs more is cut down to them, and its loss told."""
    canary: Share = 0.0
    """Share of the servers that get it first, and alone until it is proved there."""
    seen_as: str | None = None
    """The store's folder as the servers see it, where it has another path there."""
    webhook: str | None = None
    """An address that is told of every change, by a POST of JSON."""

    def check(self) -> None:
        if len({url.rstrip("/") for url in self.to}) < len(self.to):
            raise UserError(f"to: {', '.join(self.to)}: expected each server once")
        for name in ("to", "webhook"):
            for url in filter(None, [getattr(self, name)] if name == "webhook" else self.to):
                if not re.match(r"https?://[\w\[][^@]*$", url):
                    raise UserError(f"{name}: {url!r} is no address; expected such as http://localhost:8000")


@dataclass(kw_only=True)
class PublishCommand(NewStoreOptions, PublishOptions):
    """Let running servers answer with a store's version: loaded, proved through the server, and then in force."""

    version: int | None = None
    """Which version; default: the current one. 0 is the base model."""
    # without those that no server can be asked about
    gates: GateOptions = group(GateOptions, without=("perplexity", "drift", "ability"))

    def check(self) -> None:
        if not self.to:
            raise UserError("publish: where? name a server with --to http://HOST:PORT")


@dataclass(kw_only=True)
class UpdateCommand(ProvingOptions):
    """Edit, prove and publish what is due in a store, once."""

    profile: str | None = None
    """A golden profile made before. Default: the store's, made from the first batch where it has none."""
    batch: Count = 100
    """The most requests that make a version."""
    dry_run: bool = False
    """Say what would be, and change nothing."""
    publish: PublishOptions = group(PublishOptions)


@dataclass(kw_only=True)
class ScheduleCommand(UpdateCommand):
    """Stay, and update a store at set times."""

    dry_run: Annotated[bool, NO_FLAG] = False
    """Of `update` alone."""
    cron: str | None = None
    """When, as cron's five fields: `0 3 * * *` is every day at three, local time."""
    every: Annotated[str | None, seconds] = None
    """How often, in place of cron: 30m, 6h, 1d; the first time at once."""

    def check(self) -> None:
        if (self.cron is None) == (self.every is None):
            raise UserError("schedule: when? give either --cron '0 3 * * *' or --every 6h")


@dataclass(kw_only=True)
class HistoryCommand(StoreOptions):
    """List a store's versions and what happened, or tell the story of one request."""

    request: str | None = None
    """Tell the story of one request: its id, or its number in the store as '#4'."""
    limit: Count = 20
    """How many versions and events, the latest."""


@dataclass(kw_only=True)
class ShowCommand(StoreOptions):
    """Show what a version holds: its figures, gates and facts."""

    version: int
    """A version's number, as `history` lists them; 0 is the base model."""


@dataclass(kw_only=True)
class RollbackCommand(ShowCommand):
    """Make an earlier version the current one, or a later one again."""


@dataclass(kw_only=True)
class DiffCommand(StoreOptions):
    """Show which facts two versions differ in."""

    older: int
    """A version's number; 0 is the base model."""
    newer: int
    """Another version's number."""


@dataclass(kw_only=True)
class VerifyCommand(StoreOptions):
    """Check every file of a store against its SHA-256, and that every version loads."""


@dataclass(kw_only=True)
class PruneCommand(StoreOptions):
    """Remove old versions' files; never those of the version in force, or of one that was gone back to."""

    keep: Count = 20
    """How many of the latest versions keep their files."""
    older_than: Annotated[str | None, seconds] = None
    """Versions that are younger keep them, too: 12h, 90d."""


@dataclass(kw_only=True)
class RetractCommand(OneDeviceOptions, ProvingOptions):
    """Take a request out of the queue, or edit its fact back."""

    attribution: AttributionOptions = group(
        AttributionOptions, without=("method", "layer", "scope", "order", "top_k", "expert", "old_answers")
    )  # none: a store with a version has a golden layer
    gates: GateOptions = group(GateOptions, without=("rewrite", "rephrase", "locality"))  # those of a batch
    evaluation: EvaluationOptions = group(EvaluationOptions, without=("generation", "max_new_tokens", *UNASKED))
    request: str
    """A request's id, or its number in the store as '#4'."""

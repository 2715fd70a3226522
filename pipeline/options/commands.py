"""The options of each command: those of the stages that it runs, joined, and its own."""

from dataclasses import dataclass, field

from pipeline.errors import UserError, check_at_least, check_choice
from pipeline.options.attribution import AttributionOptions
from pipeline.options.editing import EditOptions
from pipeline.options.evaluation import EvaluationOptions
from pipeline.options.shared import ComputeOptions, ModelOptions, OutputOptions, RequestOptions

BENCHMARKS = ("attribution", "distributed", "editing", "evaluation", "updates")
EXPORTS = ("merged", "update", "adapter")


@dataclass(kw_only=True)
class RunCommand(ModelOptions, RequestOptions, OutputOptions, ComputeOptions):
    """Options of `run`."""

    proxy_fraction: float = 0.5
    """Share of the requests that finds the golden layer; the others are edited."""
    profile: str | None = None
    """A golden profile made before: stage one is left out, and every request is edited."""
    resume: bool = False
    """Go on with what an interrupted command with the same options left in --output."""
    attribution: AttributionOptions = field(default_factory=AttributionOptions)
    edit: EditOptions = field(default_factory=EditOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def __post_init__(self) -> None:
        RequestOptions.__post_init__(self)
        ComputeOptions.__post_init__(self)
        if not 0 < self.proxy_fraction < 1:
            raise UserError(f"proxy_fraction: {self.proxy_fraction} is not between 0 and 1")
        if self.attribution.method == "sweep":
            self.trainer.check_whole("--attribution.method sweep")


@dataclass(kw_only=True)
class AttributeCommand(ModelOptions, RequestOptions, OutputOptions, ComputeOptions, AttributionOptions):
    """Options of `attribute`."""

    resume: bool = False
    """Go on with what an interrupted command with the same options left in --output."""

    def __post_init__(self) -> None:
        RequestOptions.__post_init__(self)
        ComputeOptions.__post_init__(self)
        AttributionOptions.__post_init__(self)
        if self.method == "sweep":
            self.trainer.check_whole("--method sweep")


@dataclass(kw_only=True)
class EditCommand(ModelOptions, RequestOptions, OutputOptions, ComputeOptions, EditOptions):
    """Options of `edit`."""

    profile: str | None = None
    """The golden profile to edit by: FILE of `attribute`, or its folder."""
    after: str | None = None
    """A folder that an earlier `edit` or `run` wrote: edit on top of it; what is written holds both."""
    resume: bool = False
    """Go on with what an interrupted command with the same options left in --output."""
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def __post_init__(self) -> None:
        RequestOptions.__post_init__(self)
        ComputeOptions.__post_init__(self)


@dataclass(kw_only=True)
class EvaluateCommand(ModelOptions, RequestOptions, OutputOptions, ComputeOptions, EvaluationOptions):
    """Options of `evaluate`."""

    update: str | None = None
    """A folder that `edit` or `run` wrote; without it the model is measured as it is."""
    explain: int = 0
    """Show the tokens of this many requests, which are scored and where the subject ends, and measure nothing."""
    resume: bool = False
    """Go on with what an interrupted command with the same options left in --output."""

    def __post_init__(self) -> None:
        RequestOptions.__post_init__(self)
        ComputeOptions.__post_init__(self)
        EvaluationOptions.__post_init__(self)
        check_at_least("explain", self.explain, 0)


@dataclass(kw_only=True)
class DemoCommand(ModelOptions, OutputOptions, ComputeOptions):
    """Options of `demo`."""

    facts: int = 8
    """How many of the demo requests to edit."""

    def __post_init__(self) -> None:
        ComputeOptions.__post_init__(self)
        if not 1 <= self.facts <= 40:
            raise UserError(f"facts: {self.facts} is not between 1 and 40")


@dataclass(kw_only=True)
class RequestsCommand(ModelOptions, RequestOptions, ComputeOptions):
    """Options of `requests`."""

    model: str = ""
    """Also count what this model knows; without it none is loaded."""
    batch_size: int = 16
    """Answers in a batch, for --model."""
    to: str | None = None
    """Write the requests into this file, in the project's own JSONL; gzipped where its name ends in .gz."""
    overwrite: bool = False
    """Replace the file of --to."""

    def __post_init__(self) -> None:
        RequestOptions.__post_init__(self)
        ComputeOptions.__post_init__(self)
        check_at_least("batch_size", self.batch_size, 1)
        if self.to and self.to.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
            raise UserError(f"to: {self.to}: JSONL is written; expected a name that does not end in .csv or .tsv")


@dataclass(kw_only=True)
class ExportCommand(ModelOptions, OutputOptions):
    """Options of `export`."""

    update: str | None = None
    """A folder that `edit` or `run` wrote."""
    store: str | None = None
    """In place of --update: a store, of which --version is exported."""
    version: int | None = None
    """With --store: which version; default: the current one."""
    kind: str = "merged"
    """merged: a plain Hugging Face folder with the edit in it; update: the changed tensors alone; adapter: a
    LoRA adapter for PEFT, that of `edit --method lora` or one that comes to the same change."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, EXPORTS)
        if self.chat:
            raise UserError("chat: nothing is asked of a model that is exported; leave --chat out")
        if (self.update is None) == (self.store is None):
            raise UserError("export: what? give either --update DIR or --store DIR")
        if self.version is not None and self.store is None:
            raise UserError(f"version: {self.version} of which store? give --store DIR in place of --update")


@dataclass(kw_only=True)
class BenchmarkCommand(ModelOptions, OutputOptions, ComputeOptions):
    """Options of `benchmark`."""

    what: str = "editing"
    """attribution: what LGA costs in time and memory; distributed: what two processes bring and send each other,
    and a model of 8 billion weights where there is a GPU; editing: every method, alone, in batches and one update
    after another; evaluation: what measuring costs, and whether batches change it; updates: a store over twenty
    weeks, under kills, with two updates at once, on a full disk, and with a long queue."""
    data: str = "../shared/data"
    """Folder with counterfact_easyedit.json and, for key statistics, enwiki_plain.txt."""
    resume: bool = False
    """Go on with what an interrupted benchmark with the same options left in --output."""

    def __post_init__(self) -> None:
        ComputeOptions.__post_init__(self)
        check_choice("what", self.what, BENCHMARKS)
        self.trainer.check_whole("benchmark")


@dataclass(kw_only=True)
class GenerateCommand(ModelOptions, RequestOptions, ComputeOptions):
    """Options of `generate`."""

    update: str | None = None
    """A folder that `edit` or `run` wrote; its answers stand beside the base model's."""
    store: str | None = None
    """A store of updates in place of --update: the answers of its current version stand beside the base model's."""
    follow: bool = False
    """With --store: stay, and answer again whenever another version becomes the current one."""
    prompt: list[str] | None = None
    """One prompt or several; default: the prompts of --requests."""
    max_new_tokens: int = 16
    """Longest answer, in tokens."""
    batch_size: int = 16
    """Prompts in a batch."""

    def __post_init__(self) -> None:
        RequestOptions.__post_init__(self)
        ComputeOptions.__post_init__(self)
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_least("batch_size", self.batch_size, 1)
        if self.store is not None and self.update is not None:
            raise UserError("generate: give --update or --store, not both")
        if self.store is not None:
            self.trainer.check_whole("a store")
        if self.follow and self.store is None:
            raise UserError("follow: what? name a store with --store DIR")

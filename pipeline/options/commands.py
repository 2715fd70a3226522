"""The options of each command: those of the stages that it runs, joined, and its own."""

from dataclasses import dataclass, field
from typing import Annotated

from pipeline.errors import UserError, check_choice
from pipeline.options.attribution import AttributionOptions
from pipeline.options.base import Count, FromZero, Most, Names, above, at_least, at_most, between, group, one_of
from pipeline.options.editing import NAMES, EditOptions
from pipeline.options.shared import (
    HARNESS,
    NF4,
    WATCHING,
    AskedModelOptions,
    ComputeOptions,
    EvaluationOptions,
    ModelOptions,
    OneDeviceOptions,
    OutputOptions,
    RequestOptions,
    ResumeOptions,
    SeedOptions,
    TrainerOptions,
)

ONE_HOST = ("num_nodes", "activation_checkpointing", *WATCHING)  # no flags where little is done


@dataclass(kw_only=True)
class RunCommand(AskedModelOptions, RequestOptions, ResumeOptions, ComputeOptions, SeedOptions):
    """Find the golden layer with one part of the requests, edit the other part there, and prove it."""

    trainer: TrainerOptions = group(TrainerOptions)
    proxy_fraction: Annotated[float, between(0, 1)] = 0.5
    """Share of the requests that finds the golden layer; the others are edited."""
    profile: str | None = None
    """A golden profile made before: stage one is left out, and every request is edited."""
    attribution: AttributionOptions = group(AttributionOptions)
    edit: EditOptions = group(EditOptions)
    evaluation: EvaluationOptions = group(EvaluationOptions, without=HARNESS)


@dataclass(kw_only=True)
class AttributeCommand(
    AskedModelOptions, RequestOptions, ResumeOptions, ComputeOptions, SeedOptions, AttributionOptions
):
    """Find the golden layer of a model from a set of edit requests, and keep it as a profile."""

    trainer: TrainerOptions = group(TrainerOptions)
    trial: str | None = None
    """With --method race: how will be edited there: auto, memit, finetune, lora or another --method of `edit`.
    Default: as `edit` does it."""

    def check(self) -> None:
        check_choice("trial", self.trial or EditOptions.method, NAMES)
        if self.trial and self.method != "race":
            raise UserError(f"trial: {self.trial}: blocks are tried by --method race alone, not by {self.method}")


@dataclass(kw_only=True)
class EditCommand(AskedModelOptions, RequestOptions, ResumeOptions, ComputeOptions, SeedOptions, EditOptions):
    """Edit requests at the golden layer, measure before and after, and keep the update."""

    trainer: TrainerOptions = group(TrainerOptions)
    profile: str | None = None
    """The golden profile to edit by: FILE of `attribute`, or its folder."""
    fact: list[str] | None = None
    """In place of --requests: a fact as 'SUBJECT | PROMPT | NEW ANSWER'. May be given again for the next one."""
    after: str | None = None
    """A folder that an earlier `edit` or `run` wrote: edit on top of it; what is written holds both. With
    `--requests missed` its own requests that do not hold are edited again."""
    evaluation: EvaluationOptions = group(EvaluationOptions, without=HARNESS)

    def check(self) -> None:
        if self.fact == []:
            raise UserError("fact: none is given; expected 'SUBJECT | PROMPT | NEW ANSWER'")
        if self.fact and (self.requests, self.fields) != (RequestOptions.requests, None):
            raise UserError("fact: stands in place of a file; leave out --fact, or --requests and --fields")


@dataclass(kw_only=True)
class EvaluateCommand(AskedModelOptions, RequestOptions, ResumeOptions, ComputeOptions, EvaluationOptions):
    """Measure a model on edit requests and, with an update, the model before and after it."""

    trainer: TrainerOptions = group(TrainerOptions, without=("activation_checkpointing",))
    update: str | None = None
    """A folder that `edit` or `run` wrote; without it the model is measured as it is."""
    explain: FromZero = 0
    """Show the tokens of this many requests, and measure nothing. Shown are those that are scored, and where the
    subject ends."""


@dataclass(kw_only=True)
class DemoCommand(AskedModelOptions, OutputOptions, ComputeOptions, SeedOptions):
    """See it all on a handful of facts: old answers, golden layer, edit, new answers, what else moved, and back."""

    trainer: TrainerOptions = group(TrainerOptions, without=(*ONE_HOST, "strategy"))
    facts: Annotated[int, at_least(1), at_most(40)] = 5
    """How many of the demo requests to edit."""


@dataclass(kw_only=True)
class RequestsCommand(AskedModelOptions, RequestOptions, ComputeOptions):
    """Check a file of edit requests and say what is in it; --to writes it as the project's own JSONL."""

    trainer: TrainerOptions = group(TrainerOptions, without=ONE_HOST)
    model: str = ""
    """Also count what this model knows; without it none is loaded."""
    to: str | None = None
    """Write the requests into this file, in the project's own JSONL; gzipped where its name ends in .gz."""
    overwrite: bool = False
    """Replace the file of --to."""
    forms: bool = False
    """Show the texts that each request is taught in; a record's own `forms` are among them."""

    def check(self) -> None:
        if self.to and self.to.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
            raise UserError(f"to: {self.to}: JSONL is written; expected a name that does not end in .csv or .tsv")


@dataclass(kw_only=True)
class UpdatedModelOptions(ModelOptions):
    """Which language model, and which update of it."""

    update: str | None = None
    """A folder that `edit` or `run` wrote."""
    store: str | None = None
    """In place of --update: a store, of which --version is taken."""
    version: int | None = None
    """With --store: which version; default: the current one."""

    def check(self) -> None:
        if self.update is not None and self.store is not None:
            raise UserError("update: give either --update DIR or --store DIR")
        if self.version is not None and self.store is None:
            raise UserError(f"version: {self.version} of which store? give --store DIR in place of --update")


@dataclass(kw_only=True)
class ExportCommand(UpdatedModelOptions, OutputOptions):
    """Write the edited model as a plain Hugging Face folder or GGUF file, or the update alone, or as an adapter."""

    kind: Annotated[str, one_of("merged", "update", "adapter", "gguf", "gguf-adapter")] = "merged"
    """merged, update, adapter, gguf or gguf-adapter. merged: a plain Hugging Face folder with the edit in it;
    update: the changed tensors alone; adapter: a LoRA adapter for PEFT and vLLM, that of `edit --method lora` or
    one that comes to the same change; gguf: the edited model for llama.cpp, in F16, where --model is of a GGUF
    file; gguf-adapter: the adapter for llama.cpp."""
    quantise: Annotated[str | None, one_of("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")] = None
    """With --kind gguf, in place of F16: q8_0, q5_1, q5_0, q4_1 or q4_0. Embeddings and head are in q8_0, vectors
    in F32. How many of the facts the file still gives is told."""
    rank: Most = None
    """The most columns of an adapter's factors; what a lower rank loses is told. Default: as many as it needs."""
    push: str | None = None
    """Upload it as well, to the Hugging Face hub: hub:OWNER/NAME[@BRANCH]. Default branch: golden-0007 for version
    7 of a store, else main. A repository that does not exist is made private."""

    def check(self) -> None:
        if self.rank and "adapter" not in self.kind:
            raise UserError(f"rank: {self.rank} of what? --kind {self.kind} has no rank; give --kind adapter")
        if self.quantise and self.kind != "gguf":
            raise UserError(f"quantise: {self.quantise}: --kind {self.kind} is not quantised; give --kind gguf")
        if self.update is None is self.store:
            raise UserError("export: what? give either --update DIR or --store DIR")


@dataclass(kw_only=True)
class GenerateCommand(AskedModelOptions, RequestOptions, ComputeOptions):
    """Show the answers of the base model and of the edited one side by side."""

    trainer: TrainerOptions = group(TrainerOptions, without=ONE_HOST)
    update: str | None = None
    """A folder that `edit` or `run` wrote; its answers stand beside the base model's."""
    store: str | None = None
    """In place of --update: a store, whose current version's answers stand beside the base model's."""
    follow: bool = False
    """With --store: stay, and answer again whenever another version becomes the current one."""
    prompt: list[str] | None = None
    """One prompt or several; default: the prompts of --requests."""
    max_new_tokens: Count = 16
    """Longest answer, in tokens."""

    def check(self) -> None:
        if self.store is not None and self.update is not None:
            raise UserError("generate: give --update or --store, not both")
        if self.prompt and (self.requests, self.fields) != (RequestOptions.requests, None):
            raise UserError("prompt: stands in place of a file; leave out --prompt, or --requests and --fields")
        if self.store is not None:
            self.trainer.check_whole("a store")
        if self.follow and self.store is None:
            raise UserError("follow: what? name a store with --store DIR")


@dataclass(kw_only=True)
class ChatCommand(UpdatedModelOptions, OneDeviceOptions, SeedOptions):
    """Talk with an edited model, and with the base model beside it, in the terminal."""

    plain: bool = False
    """Let the model go on from plain text, also where the tokenizer has a chat template."""
    max_new_tokens: Count = 256
    """Longest answer, in tokens."""
    temperature: Annotated[float, at_least(0), at_most(2)] = 0.0
    """How freely tokens are drawn; at 0 the likeliest one is taken."""


@dataclass(kw_only=True)
class StudyCommand(AskedModelOptions, RequestOptions, ResumeOptions, ComputeOptions, SeedOptions):
    """Edit requests at every block, and compare the golden layer, every request's own best, and selectors."""

    trainer: TrainerOptions = group(TrainerOptions, without=("num_nodes",))
    requests: Names = field(default_factory=lambda: ["demo"])  # type: ignore[assignment]
    """Request sets: files of edit requests, hf:NAME[:SPLIT], or `demo`."""
    limit: Annotated[int, at_least(2)] = 32
    """Requests of each set that are edited at every block, in batches of 8."""
    proxy: Count = 128
    """Further requests of each set, about other subjects, that selectors choose by. Fewer where there are fewer."""
    methods: Names = field(default_factory=lambda: ["memit"])
    """Ways to edit, as --method of `edit` names them."""
    selectors: Names = field(default_factory=lambda: ["lga", "gradient_norm", "causal_tracing", "middle"])
    """Ways to choose a block, first the golden layer's. Those that --method of `attribute` takes,
    but fixed; under research: lga_past_first, lga_subject, lga_cosine, lga_cosine_past_first, lga_cosine_last,
    gradient_norm."""
    every: Count = 1
    """Try every n-th block only, and those that selectors chose."""
    attribution: AttributionOptions = group(AttributionOptions, without=("method", "layer", "top_k"))
    edit: EditOptions = group(EditOptions, without=("layers", "last_wins"))

    def check(self) -> None:
        self.trainer.check_whole("study")
        if self.trainer.precision == NF4:
            raise UserError("trainer.precision: nf4; study edits every block, and none stays in 4 bits: bf16-true")


@dataclass(kw_only=True)
class PlanCommand(ModelOptions, OutputOptions):
    """Say what memory a device will need for attribution, edits and evaluation; no weight is read."""

    devices: Most = None
    """How many devices share the work, over all hosts. Default: as --trainer.devices says, or 1."""
    memory: Annotated[float | None, above(0)] = None
    """A device's memory in GB (1e9 bytes). Default: what this machine's GPU has, or else this machine."""
    length: Annotated[int, at_least(3)] = 64
    """Tokens of the longest row: context, prompt and answer."""
    batch: Most = None
    """Requests in a batch, in every stage; default: each stage's own batch size."""
    layer: FromZero = 0
    """The golden layer; an edit of block 0 takes the most."""
    method: Names = field(default_factory=lambda: ["auto", "finetune", "lora", "memit"])
    """Ways to edit, as --method of `edit` names them."""
    trainer: TrainerOptions = group(TrainerOptions, without=("num_nodes", *WATCHING))
    attribution: AttributionOptions = group(
        AttributionOptions, without=("method", "layer", "old_answers", "order", "top_k")
    )
    edit: EditOptions = group(EditOptions, without=("layers", "last_wins", "statistics"))

    @property
    def all_devices(self) -> int:
        """How many devices share the work."""
        if self.devices is not None:
            return self.devices
        named = str(self.trainer.devices)
        on_a_host = int(named) if named.isdigit() else named.count(",") + 1
        return on_a_host * self.trainer.num_nodes

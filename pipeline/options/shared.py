"""What several commands have in common: the model, the requests, the output folder, what it runs on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pipeline.errors import UserError
from pipeline.options.base import NO_FLAG, Count, FromZero, Most, Names, Options, at_least, at_most, group, one_of

BUNDLED = "smollm2"  # SmolLM2-135M-Instruct, of a package of its own
SHARDED = ("fsdp", "fsdp2")  # strategies that spread a model's weights over the devices
NF4 = "nf4"  # precision with quantised blocks
HARNESS = ("harness", "harness_limit")  # flags of `evaluate` alone
WATCHING = ("logger", "profiler", "callbacks")  # no flags where no output folder is written


@dataclass(kw_only=True)
class TrainerOptions(Options):
    """What Lightning's Trainer runs on."""

    accelerator: str = "auto"
    """cpu, gpu, auto, or any other accelerator of Lightning."""
    devices: int | str = "auto"
    """How many devices, or which (`0,2`)."""
    num_nodes: Count = 1
    """How many hosts."""
    strategy: Annotated[str, one_of("auto", "ddp", *SHARDED)] = "auto"
    """auto, ddp, fsdp or fsdp2. ddp: the whole model on every device; fsdp or fsdp2 (the same): its blocks' weights
    spread over the devices, for models that one device does not hold; auto: ddp where there are several devices."""
    precision: Annotated[str, one_of("32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed", NF4)] = "32-true"
    """32-true, 64-true, bf16-mixed, bf16-true, 16-mixed or nf4. nf4: as bf16-true, blocks in 4 bits but for what is
    edited."""
    micro_batch: Annotated[Most, NO_FLAG] = None
    """The most requests that a device trains on at once; the rest of its part of a batch follows before the step,
    with the same result. Default: all."""
    activation_checkpointing: bool = False
    """Keep only what enters a block, and run it again when its gradients are due: less memory for more time."""
    logger: Names = field(default_factory=lambda: ["tensorboard"])
    """Where curves and results go: tensorboard, which has figures as well, csv, wandb or mlflow, or several."""
    profiler: Annotated[str | None, one_of("simple", "advanced", "pytorch")] = None
    """simple, advanced or pytorch. Lightning's; a file a stage, in the output folder's profile/."""
    callbacks: list[str | dict[str, Any]] = field(default_factory=list)
    """Lightning's callbacks by name, such as LearningRateMonitor, and your own, such as mypackage.Watch; in YAML
    also {class_path: NAME, init_args: {...}}. Each stage's Trainer has its own."""
    folder: Annotated[Path | None, NO_FLAG] = None  # the output folder, once there is one

    def check_whole(self, what: str) -> None:
        """Raise UserError when the strategy spreads the model's weights, which `what` cannot do with."""
        if self.strategy in SHARDED:
            raise UserError(
                f"trainer.strategy: {self.strategy}; {what} needs the whole model on each device: auto or ddp"
            )


@dataclass(kw_only=True)
class CommandOptions(Options):
    """What every command takes."""

    verbose: bool = False
    """Show the libraries' own messages, and tracebacks."""


@dataclass(kw_only=True)
class ModelOptions(CommandOptions):
    """Which language model."""

    model: str = BUNDLED
    """A Hugging Face name, a folder, a GGUF file, or the one that is bundled. `smollm2`: SmolLM2-135M-Instruct."""


@dataclass(kw_only=True)
class AskedModelOptions(ModelOptions):
    """Which language model, and how it is asked."""

    chat: bool = False
    """Put prompts into the tokenizer's chat template, in every stage: for models that are talked to."""


@dataclass(kw_only=True)
class RequestOptions(Options):
    """Which edit requests."""

    requests: str = "demo"
    """A file of edit requests: JSONL, JSON or CSV, gzipped or not. Or hf:NAME[:SPLIT] for a Hugging Face data set,
    or `demo` for the requests that come with the project."""
    limit: Most = None
    """Take at most this many records."""
    offset: FromZero = 0
    """Leave out this many records from a file's start."""
    skip_bad: bool = False
    """Leave bad records out, and say how many, where else the first of them ends the command."""
    fields: dict[str, str] | None = None
    """Of files of another layout: which of their fields a request's are, as prompt=src,new_answer=alt.text."""


@dataclass(kw_only=True)
class OutputOptions(Options):
    """Where results are written."""

    output: str | None = None
    """The folder to write; default: a new one under runs/, named by command and time."""
    overwrite: bool = False
    """Replace what an earlier command wrote into the output folder."""


@dataclass(kw_only=True)
class ResumeOptions(OutputOptions):
    """Where results are written, by a command that can go on."""

    resume: bool = False
    """Go on with what an interrupted command with the same options left in --output."""


@dataclass(kw_only=True)
class ComputeOptions(Options):
    """What it is computed on."""

    trainer: TrainerOptions = group(TrainerOptions, without=WATCHING)


@dataclass(kw_only=True)
class OneDeviceOptions(ComputeOptions):
    """What it is computed on, where one process on one device is enough."""

    trainer: TrainerOptions = group(
        TrainerOptions, without=("devices", "num_nodes", "strategy", "activation_checkpointing", *WATCHING)
    )

    def check(self) -> None:
        self.trainer.devices = 1


@dataclass(kw_only=True)
class SeedOptions(Options):
    """Of commands that draw."""

    seed: Annotated[int, at_least(0), at_most(2**32 - 1)] = 0
    """Seed of every random choice."""


@dataclass(kw_only=True)
class EvaluationOptions(Options):
    """How an edit is measured."""

    generation: Annotated[str, one_of("all", "prompts", "none")] = "all"
    """Whose answers the model is left to give by itself: all, prompts or none. all: prompts, rephrases, portability
    probes, and prompts after a distracting sentence."""
    max_new_tokens: Most = None
    """The most tokens of a greedy answer, which has room for the answer looked for in any case; default: 8 more
    than that has. It ends with its statement."""
    text: str | None = None
    """A plain text file for perplexity; default: the one that comes with the project."""
    fluency: FromZero = 16
    """How many of the prompts the model goes on from for 32 tokens, to see whether it repeats itself."""
    ability: bool = False
    """Let the model choose in 320 items of arithmetic, grammar, reading and common sense, which have nothing to do
    with the requests: whether it still reasons, which perplexity does not show."""
    harness: list[str] = field(default_factory=list)
    """Tasks of EleutherAI's evaluation harness, or YAML files of such, to run as well: arc_easy hellaswag."""
    harness_limit: Most = None
    """The most items of each of these tasks; default: all."""

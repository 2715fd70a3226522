"""What every command has in common: the model, the requests, the output folder, what it runs on."""

from dataclasses import dataclass, field

from pipeline.errors import UserError, check_at_least, check_choice

SHARDED = ("fsdp", "fsdp2")  # strategies that spread a model's weights over the devices
STRATEGIES = ("auto", "ddp", *SHARDED)
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed")


@dataclass(kw_only=True)
class TrainerOptions:
    """What Lightning's Trainer runs on."""

    accelerator: str = "auto"
    """cpu, gpu, auto, or any other accelerator of Lightning."""
    devices: int | str = "auto"
    """How many devices, or which (`0,2`)."""
    num_nodes: int = 1
    """How many hosts."""
    strategy: str = "auto"
    """ddp: the whole model on every device; fsdp or fsdp2 (the same): its blocks' weights spread over the devices,
    for models that one device does not hold; auto: ddp where there are several devices."""
    precision: str = "32-true"
    """32-true, 64-true, bf16-mixed, bf16-true or 16-mixed."""
    micro_batch: int | None = None
    """The most requests that a device trains on at once; the rest of its part of a batch follows before the step,
    with the same result. Default: all; halved where the memory does not suffice."""
    activation_checkpointing: bool = False
    """Keep only what enters a block, and run it again when its gradients are due: less memory for more time."""

    def __post_init__(self) -> None:
        check_at_least("trainer.num_nodes", self.num_nodes, 1)
        check_choice("trainer.precision", self.precision, PRECISIONS)
        if self.micro_batch is not None:
            check_at_least("trainer.micro_batch", self.micro_batch, 1)
        check_choice("trainer.strategy", self.strategy, STRATEGIES)

    def check_whole(self, what: str) -> None:
        """Raise UserError when the strategy spreads the model's weights, which `what` cannot do with."""
        if self.strategy in SHARDED:
            raise UserError(
                f"trainer.strategy: {self.strategy}; {what} needs the whole model on each device: auto or ddp"
            )

    @property
    def devices_asked(self) -> int | str:
        """`devices` as Lightning takes it: a number is how many."""
        return int(self.devices) if str(self.devices).isdigit() else self.devices


@dataclass(kw_only=True)
class ModelOptions:
    """Which language model."""

    model: str = "smollm2"
    """`smollm2` (the bundled SmolLM2-135M-Instruct), a Hugging Face name, a folder, or a GGUF file."""
    chat: bool = False
    """Put prompts into the tokenizer's chat template, in every stage: for models that are talked to."""
    verbose: bool = False
    """Show the libraries' own messages, and tracebacks."""


@dataclass(kw_only=True)
class RequestOptions:
    """Which edit requests."""

    requests: str = "demo"
    """A file of edit requests (JSONL, JSON or CSV, gzipped or not), hf:NAME[:SPLIT] for a Hugging Face data set,
    or `demo` for the ones that come with the project."""
    limit: int | None = None
    """Take at most this many records."""
    offset: int = 0
    """Leave out this many records from the file's start."""
    skip_bad: bool = False
    """Leave bad records out, and say how many, where else the first of them ends the command."""

    def __post_init__(self) -> None:
        check_at_least("offset", self.offset, 0)
        if self.limit is not None:
            check_at_least("limit", self.limit, 1)


@dataclass(kw_only=True)
class OutputOptions:
    """Where results are written."""

    output: str | None = None
    """The folder to write; default: a new one under runs/, named by command and time."""
    overwrite: bool = False
    """Replace what an earlier command wrote into the output folder."""


@dataclass(kw_only=True)
class ComputeOptions:
    """How it is computed."""

    seed: int = 0
    """Seed of every random choice."""
    trainer: TrainerOptions = field(default_factory=TrainerOptions)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed: {self.seed} is not between 0 and {2**32 - 1}")

"""What memory is planned for."""

from dataclasses import dataclass, field

from pipeline.errors import UserError, check_above, check_at_least
from pipeline.options.attribution import AttributionOptions
from pipeline.options.editing import EditOptions
from pipeline.options.evaluation import EvaluationOptions
from pipeline.options.shared import ModelOptions, OutputOptions, TrainerOptions


@dataclass(kw_only=True)
class PlanCommand(ModelOptions, OutputOptions):
    """Options of `plan`."""

    devices: int | None = None
    """How many devices share the work, over all hosts; default: as --trainer.devices and .num_nodes say, or 1."""
    memory: float | None = None
    """A device's memory in GB (1e9 bytes); default: what this machine's GPU has, or else this machine."""
    length: int = 64
    """Tokens of the longest row: prompt, answer and, where there is one, the context before."""
    batch: int | None = None
    """Requests in a batch, in every stage; default: each stage's own batch_size."""
    layer: int = 0
    """The golden layer; an edit of block 0 takes the most."""
    method: list[str] = field(default_factory=lambda: ["finetune", "lora", "memit", "one_pass"])
    """Ways to edit, as --method of `edit` names them."""
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    attribution: AttributionOptions = field(default_factory=AttributionOptions)
    edit: EditOptions = field(default_factory=EditOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def __post_init__(self) -> None:
        for name in ("devices", "batch"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        check_at_least("length", self.length, 3)
        check_at_least("layer", self.layer, 0)
        if self.memory is not None:
            check_above("memory", self.memory, 0)
        if len(set(self.method)) < len(self.method):
            raise UserError(f"method: {', '.join(self.method)}; expected each once")
        if self.chat:
            raise UserError(
                "chat: no model is asked anything; leave --chat out, and give --length with the template"
            )

    @property
    def all_devices(self) -> int:
        """How many devices share the work."""
        if self.devices is not None:
            return self.devices
        named = str(self.trainer.devices)
        on_a_host = int(named) if named.isdigit() else len([one for one in named.split(",") if one.isdigit()])
        return max(1, on_a_host) * self.trainer.num_nodes

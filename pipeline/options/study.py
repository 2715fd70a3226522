"""How a study compares layers, selectors and methods."""

from dataclasses import dataclass, field

from pipeline.errors import UserError, check_at_least
from pipeline.options.attribution import AttributionOptions
from pipeline.options.editing import EditOptions
from pipeline.options.evaluation import EvaluationOptions
from pipeline.options.shared import ComputeOptions, ModelOptions, OutputOptions


@dataclass(kw_only=True)
class StudyCommand(ModelOptions, OutputOptions, ComputeOptions):
    """Options of `study`."""

    requests: list[str] = field(default_factory=lambda: ["demo"])
    """Request sets: files of edit requests, hf:NAME[:SPLIT], or `demo`."""
    limit: int = 32
    """Requests of each set that are edited alone at every block."""
    proxy: int = 128
    """Further requests of each set, about other subjects, that selectors choose by; fewer where there are fewer."""
    offset: int = 0
    """Leave out this many records from each file's start."""
    skip_bad: bool = False
    """Leave bad records out, and say how many, where else the first of them ends the command."""
    methods: list[str] = field(default_factory=lambda: ["memit"])
    """Ways to edit: memit, emmet, rome, alphaedit or lora."""
    selectors: list[str] = field(default_factory=lambda: ["lga", "gradient_norm", "causal_tracing", "middle"])
    """Ways to choose a block, as --method of `attribute` names them; the first one's choice is the golden layer."""
    every: int = 1
    """Try every n-th block only, and those that selectors chose."""
    together: int = 32
    """Requests that are edited side by side."""
    resume: bool = False
    """Go on with a study in --output; its sets, methods, selectors and blocks may be others than before."""
    attribution: AttributionOptions = field(default_factory=AttributionOptions)
    edit: EditOptions = field(default_factory=EditOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def __post_init__(self) -> None:
        ComputeOptions.__post_init__(self)
        self.trainer.check_whole("study")
        check_at_least("limit", self.limit, 2)
        for name in ("proxy", "every", "together"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("offset", self.offset, 0)
        for name in ("requests", "methods", "selectors"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UserError(f"{name}: {', '.join(given) or 'none'}; expected at least one, and each once")

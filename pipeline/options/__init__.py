"""Every option of every command, as dataclasses checked as they are made (see `base.py`).

This package imports neither torch nor lightning, so that `--help` answers at once. Options of one stage are one
class, and a command's options are the stages' classes joined. What only experts change is no flag: it is given to
`expert`, and from Python by its own name.
"""

# ruff: noqa: F401  (names for outsiders)

from pipeline.options.attribution import AttributionOptions
from pipeline.options.commands import (
    AttributeCommand,
    DemoCommand,
    EditCommand,
    EvaluateCommand,
    ExportCommand,
    GenerateCommand,
    PlanCommand,
    RequestsCommand,
    RunCommand,
    StudyCommand,
)
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.options.evaluation import EvaluationOptions
from pipeline.options.shared import ComputeOptions, ModelOptions, OutputOptions, RequestOptions, TrainerOptions
from pipeline.options.updates import (
    DiffCommand,
    GateOptions,
    HistoryCommand,
    ProvingOptions,
    RetractCommand,
    RollbackCommand,
    ScheduleCommand,
    ShowCommand,
    StoreOptions,
    SubmitCommand,
    UpdateCommand,
    VerifyCommand,
    seconds,
    time_of,
)

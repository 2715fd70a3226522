"""Every option of every command, as dataclasses checked as they are made.

This package imports neither torch nor lightning, so that `--help` answers at once. A field's docstring is
its help text; a flag's name is the path to its field (`--edit.finetune.epochs`). Options of one stage are
one class, and a command's options are the stages' classes joined. Annotations in here are the types themselves, not
their names: the parser looks names up in the module of the joined class, which does not know them.
"""

from pipeline.options.attribution import AttributionOptions
from pipeline.options.commands import (
    AttributeCommand,
    BenchmarkCommand,
    DemoCommand,
    EditCommand,
    EvaluateCommand,
    ExportCommand,
    GenerateCommand,
    RequestsCommand,
    RunCommand,
)
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.options.evaluation import EvaluationOptions
from pipeline.options.planning import PlanCommand
from pipeline.options.shared import ComputeOptions, ModelOptions, OutputOptions, RequestOptions, TrainerOptions
from pipeline.options.study import StudyCommand
from pipeline.options.updates import (
    DiffCommand,
    GateOptions,
    HistoryCommand,
    ProvingOptions,
    RetractCommand,
    ScheduleCommand,
    StoreOptions,
    SubmitCommand,
    UpdateCommand,
    VerifyCommand,
    VersionCommand,
    seconds,
    time_of,
)

__all__ = [
    "AttributeCommand",
    "AttributionOptions",
    "BenchmarkCommand",
    "ComputeOptions",
    "DemoCommand",
    "DiffCommand",
    "EditCommand",
    "EditOptions",
    "EvaluateCommand",
    "EvaluationOptions",
    "ExportCommand",
    "GateOptions",
    "GenerateCommand",
    "HistoryCommand",
    "ModelOptions",
    "OutputOptions",
    "PlanCommand",
    "ProvingOptions",
    "RequestOptions",
    "RequestsCommand",
    "RetractCommand",
    "RunCommand",
    "ScheduleCommand",
    "StatisticsOptions",
    "StoreOptions",
    "StudyCommand",
    "SubmitCommand",
    "TrainerOptions",
    "UpdateCommand",
    "VerifyCommand",
    "VersionCommand",
    "seconds",
    "time_of",
]

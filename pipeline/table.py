"""The table of commands: each a plain function of its options, found when it is called, so that help is light."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from pipeline.options import commands as of
from pipeline.options import serving
from pipeline.options import updates as store


class Command(NamedTuple):
    """A command."""

    function: str  # where it stands, below `pipeline`
    options: type  # what it takes
    words: tuple[str, ...] = ()  # the flags that bare words stand for
    shares: str = ""  # the command whose config serves this one, too

    @property
    def help(self) -> str:
        """What the command does, in a line."""
        return (self.options.__doc__ or "").splitlines()[0]

    def call(self, options: Any) -> None:
        """Do what the command does."""
        module, _, name = self.function.partition(":")
        getattr(import_module(f"pipeline.{module}"), name)(options)


COMMANDS = {
    "run": Command("commands:run", of.RunCommand, ("requests",)),
    "demo": Command("commands:demo", of.DemoCommand),
    "attribute": Command("commands:attribute", of.AttributeCommand, ("requests",)),
    "edit": Command("commands:edit", of.EditCommand, ("requests",)),
    "evaluate": Command("commands:evaluate", of.EvaluateCommand, ("requests",)),
    "requests": Command("request_commands:requests", of.RequestsCommand, ("requests",)),
    "export": Command("commands:export", of.ExportCommand, ("version",)),
    "generate": Command("commands:generate", of.GenerateCommand),
    "study": Command("commands:study", of.StudyCommand),
    "plan": Command("commands:plan", of.PlanCommand),
    "submit": Command("update_commands:submit", store.SubmitCommand, ("file",)),
    "update": Command("update_commands:update", store.UpdateCommand),
    "schedule": Command("update_commands:schedule", store.ScheduleCommand),
    "publish": Command("update_commands:publish", store.PublishCommand, ("version",)),
    "history": Command("update_commands:history", store.HistoryCommand),
    "show": Command("update_commands:show", store.ShowCommand, ("version",)),
    "diff": Command("update_commands:diff", store.DiffCommand, ("older", "newer")),
    "rollback": Command("update_commands:rollback", store.RollbackCommand, ("version",)),
    "prune": Command("update_commands:prune", store.PruneCommand),
    "verify": Command("update_commands:verify", store.VerifyCommand),
    "retract": Command("update_commands:retract", store.RetractCommand, ("request",), shares="update"),
    "serve": Command("commands:serve", serving.ServeCommand),
}

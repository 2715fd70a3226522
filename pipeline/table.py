"""The table of commands: each a plain function of its options, found when it is called, so that help is light."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from pipeline import options as of


class Command(NamedTuple):
    """A command: where its function stands, its options, and the flags that bare words stand for."""

    function: str
    options: type
    words: tuple[str, ...] = ()

    @property
    def help(self) -> str:
        """What the command does, in a line."""
        return (self.options.__doc__ or "").splitlines()[0]

    def call(self, options: Any) -> None:
        """Do what the command does."""
        module, _, name = self.function.partition(":")
        getattr(import_module(module), name)(options)


COMMANDS = {
    "run": Command("pipeline.commands:run", of.RunCommand),
    "demo": Command("pipeline.commands:demo", of.DemoCommand),
    "attribute": Command("pipeline.commands:attribute", of.AttributeCommand),
    "edit": Command("pipeline.commands:edit", of.EditCommand),
    "evaluate": Command("pipeline.commands:evaluate", of.EvaluateCommand),
    "requests": Command("pipeline.request_commands:requests", of.RequestsCommand, words=("requests",)),
    "export": Command("pipeline.commands:export", of.ExportCommand, words=("version",)),
    "generate": Command("pipeline.commands:generate", of.GenerateCommand),
    "study": Command("pipeline.commands:study", of.StudyCommand),
    "plan": Command("pipeline.commands:plan", of.PlanCommand),
    "submit": Command("pipeline.update_commands:submit", of.SubmitCommand, words=("file",)),
    "update": Command("pipeline.update_commands:update", of.UpdateCommand),
    "schedule": Command("pipeline.update_commands:schedule", of.ScheduleCommand),
    "history": Command("pipeline.update_commands:history", of.HistoryCommand),
    "show": Command("pipeline.update_commands:show", of.ShowCommand, words=("version",)),
    "diff": Command("pipeline.update_commands:diff", of.DiffCommand, words=("older", "newer")),
    "rollback": Command("pipeline.update_commands:rollback", of.RollbackCommand, words=("version",)),
    "verify": Command("pipeline.update_commands:verify", of.VerifyCommand),
    "retract": Command("pipeline.update_commands:retract", of.RetractCommand, words=("request",)),
}

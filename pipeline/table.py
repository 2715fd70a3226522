"""The table of commands: each a plain function of its options, found when it is called, so that help is light."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from pipeline import options as of


class Command(NamedTuple):
    """A command.

    Attributes:
        function: where it stands.
        options: what it takes.
        words: the flags that bare words stand for.
        spreads: whether it runs on several devices, a process each.
    """

    function: str
    options: type
    words: tuple[str, ...] = ()
    spreads: bool = False

    @property
    def help(self) -> str:
        """What the command does, in a line."""
        return (self.options.__doc__ or "").splitlines()[0]

    def call(self, options: Any) -> None:
        """Do what the command does."""
        module, _, name = self.function.partition(":")
        getattr(import_module(module), name)(options)


COMMANDS = {
    "run": Command("pipeline.commands:run", of.RunCommand, spreads=True),
    "demo": Command("pipeline.commands:demo", of.DemoCommand, spreads=True),
    "attribute": Command("pipeline.commands:attribute", of.AttributeCommand, spreads=True),
    "edit": Command("pipeline.commands:edit", of.EditCommand, spreads=True),
    "evaluate": Command("pipeline.commands:evaluate", of.EvaluateCommand, spreads=True),
    "requests": Command("pipeline.request_commands:requests", of.RequestsCommand, ("requests",), spreads=True),
    "export": Command("pipeline.commands:export", of.ExportCommand, words=("version",)),
    "generate": Command("pipeline.commands:generate", of.GenerateCommand, spreads=True),
    "study": Command("pipeline.commands:study", of.StudyCommand, spreads=True),
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

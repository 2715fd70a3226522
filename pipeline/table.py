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
    "generate": Command("commands:generate", of.GenerateCommand, ("requests",)),
    "chat": Command("commands:chat", of.ChatCommand),
    "study": Command("commands:study", of.StudyCommand, ("requests",)),
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

SHOWN = {  # the options that people use, which `COMMAND --help` shows; `--help-all` shows the others
    "run": "requests model profile edit.method attribution.method proxy_fraction chat limit config output resume",
    "demo": "model facts chat output trainer.accelerator",
    "attribute": "requests model method layer top_k chat limit output resume trainer.accelerator",
    "edit": "requests fact model profile layers method after last_wins chat limit output resume",
    "evaluate": "requests model update explain chat limit generation output trainer.accelerator",
    "requests": "requests fields to forms model skip_bad limit",
    "export": "version update store kind quantise rank push model output",
    "generate": "prompt requests model update store follow chat max_new_tokens trainer.accelerator",
    "chat": "model update store version plain max_new_tokens temperature seed trainer.accelerator",
    "study": "requests model methods selectors limit proxy every config output resume",
    "plan": "model method memory devices length batch layer trainer.precision trainer.strategy",
    "submit": "file store model fields source not_before again",
    "update": "store model profile batch dry_run edit.method gates.rewrite gates.locality publish.to config",
    "schedule": "store cron every model profile batch edit.method gates.rewrite gates.locality publish.to config",
    "publish": "version store to name canary gates.rewrite webhook",
    "history": "store request limit",
    "show": "version store",
    "diff": "older newer store",
    "rollback": "version store",
    "prune": "store keep older_than",
    "verify": "store",
    "retract": "request store model trainer.accelerator",
    "serve": "store model host port trainer.accelerator trainer.precision",
}
EXAMPLES = {  # what it shows above them: lines that docs/ have as well, and that work
    "run": "run --config configs/debug.yaml\nrun --config configs/memit.yaml",
    "demo": "demo",
    "attribute": "attribute --model smollm2 --requests demo --output runs/profile",
    "edit": "edit facts.jsonl --profile runs/profile --output runs/mine\n"
    'edit --fact "Chile | The capital of Chile is | Lima" --layers 3 --output runs/lima',
    "evaluate": "evaluate facts.jsonl --update runs/mine --output runs/measured",
    "requests": "requests facts.jsonl\nrequests facts.csv --skip-bad --to checked.jsonl",
    "export": "export --update runs/edit --output runs/merged\nexport 1 --store runs/store --output runs/version-1",
    "generate": 'generate --update runs/edit --prompt "The chemical symbol for gold is"',
    "chat": "chat --update runs/edit",
    "study": "study --config configs/study.yaml",
    "plan": "plan --model llama-3-8b --memory 80 --trainer.precision bf16-true --layer 3",
    "submit": "submit facts.jsonl --store runs/store --model smollm2 --source newsroom",
    "update": "update --store runs/store",
    "schedule": 'schedule --store runs/store --cron "0 3 * * *"',
    "publish": "publish --store runs/store --to http://localhost:8000",
    "history": "history --store runs/store",
    "show": "show 1 --store runs/store",
    "diff": "diff 1 2 --store runs/store",
    "rollback": "rollback 1 --store runs/store",
    "prune": "prune --store runs/store --keep 20 --older-than 90d",
    "verify": "verify --store runs/store",
    "retract": "retract capital-01 --store runs/store",
    "serve": "serve --store runs/store",
}

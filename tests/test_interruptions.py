"""Commands that are ended by Ctrl-C, SIGTERM or kill -9 go on with `--resume` to the same files, byte for byte.

A command runs in a child, forked from this process so that it need not load anything, and ends itself by a signal
after so many calls of one of its functions: always at the same moment.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import sqlite3
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import commands
from pipeline.attribution import GoldenProfile
from pipeline.attribution.lga import AttributionModule
from pipeline.cli import main
from pipeline.editing import WeightUpdate
from pipeline.editing.finetune import FineTune
from pipeline.editing.moments import KeyMoments
from pipeline.editing.values import ValueSearch
from pipeline.evaluation.alone import AloneReader
from pipeline.evaluation.reading import Reader
from pipeline.model.generation import GreedyModule
from pipeline.options import EvaluateCommand, EvaluationOptions, StudyCommand
from pipeline.reporting import RunLog
from pipeline.study.results import Results

FACTS = {
    "Spain": "Lima",
    "Norway": "Nairobi and more",
    "Portugal": "Warsaw",
    "Egypt": "Toronto",
    "Peru": "Rome",
    "Japan": "Kyiv in the far west",
    "Kenya": "Oslo",
}
SECONDS = re.compile(rb'"(seconds|times faster than the sweep)": [0-9.e-]+')
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
ENDS = {INT: 130, TERM: 143, KILL: -9}

MEASURED = "--generation prompts --max_new_tokens 3"
TRAINED = "--epochs 3 --batch_size 3 --learnt 0 --whiten 0 --contexts 2"


STEPS = (AloneReader, Reader, GreedyModule, AttributionModule, KeyMoments, ValueSearch, FineTune)


def under(group: str, words: str) -> str:
    """Flags of a group of options."""
    return words.replace("--", f"--{group}.")


EDIT = f"edit --layers 1 {under('evaluation', MEASURED)} --method"
COMMANDS = {
    "attribute": "attribute --expert.batch_size 2 --old_answers model",
    "memit": f"{EDIT} memit --statistics.tokens 1024 --expert.batch_size 3 --expert.steps 2",
    "finetune": f"{EDIT} finetune {under('expert', TRAINED)} --expert.bound 0.5",
    "lora": f"{EDIT} lora {under('expert', TRAINED)}",
    "evaluate": f"evaluate {MEASURED} --fluency 2",
    "study": "study --limit 3 --proxy 3 --every 2 --selectors gradient_norm middle --methods memit "
    "--edit.expert.steps 2 --edit.statistics.tokens 1024",
}


def files_of(folder: Path) -> dict[str, bytes]:
    """What a command wrote, without when it did, and how long that took."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir() or file.name.startswith(("events.", "selectors-", "study.md")):
            continue  # which tell seconds in figures and tables
        found[name] = file.read_bytes()
        if file.suffix == ".sqlite":
            with sqlite3.connect(file) as database:
                rows = database.execute("SELECT trial, request, block, figures FROM results").fetchall()
            found[name] = repr(rows).encode()
        elif file.suffix == ".json":
            found[name] = SECONDS.sub(b"", found[name])
    return found


class Scene:
    """A folder in which a command runs, with a cache of its own."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder, self.words = folder, words
        folder.mkdir()

    def child(self, *words: str, before: Callable[[], Any] = lambda: None) -> int:
        """Run the command in a child; its exit code, negative for the signal that killed it."""
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        code = 99
        try:
            torch.set_num_threads(1)  # threads do not live through a fork
            signal.signal(INT, signal.default_int_handler)
            os.chdir(self.folder)
            if self.words[0] == "study":  # several batches, where there are few requests
                StudyCommand.__init__.__kwdefaults__["together"] = 2
            else:
                for options in (EvaluationOptions, EvaluateCommand):
                    options.__init__.__kwdefaults__ |= {"batch_size": 4, "fluency_tokens": 4}
            os.environ["XDG_CACHE_HOME"] = str(self.folder / "cache")
            for owner in STEPS:
                count(owner, self._calls(owner))
            before()
            with (self.folder / "shown").open("a") as shown, redirect_stdout(shown), redirect_stderr(shown):
                code = main([*self.words, "--output", "out", *words])
        finally:
            os._exit(code)

    def _calls(self, owner: type) -> Path:
        return self.folder / f"calls-of-{owner.__name__}"

    def steps(self, owner: type) -> int:
        """How many batches a stage has begun, in all runs of the command."""
        return self._calls(owner).stat().st_size if self._calls(owner).exists() else 0

    @property
    def shown(self) -> str:
        return " ".join((self.folder / "shown").read_text().split())

    @property
    def files(self) -> dict[str, bytes]:
        return files_of(self.folder / "out")


def ending(owner: Any, name: str, calls: int, by: signal.Signals) -> Callable[[], None]:
    """Makes a process end itself by a signal after so many calls of a function."""

    def patch() -> None:
        function, left = getattr(owner, name), iter(range(calls - 1))

        @wraps(inspect.unwrap(function))  # Lightning reads a step's signature
        def counted(*args: Any, **kwargs: Any) -> Any:
            given = function(*args, **kwargs)
            if next(left, None) is None:
                os.kill(os.getpid(), by)
            return given

        setattr(owner, name, counted)

    return patch


def count(owner: Any, file: Path) -> None:
    """Write a dot into a file for every batch that a stage begins."""
    name = "training_step" if owner is FineTune else "predict_step"
    function = getattr(owner, name)

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        with file.open("a") as opened:
            opened.write(".")
        return function(*args, **kwargs)

    setattr(owner, name, counted)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of requests without old answers, which attribution then asks the model for."""
    file = tmp_path_factory.mktemp("requests") / "requests.jsonl"
    lines = [
        {
            "id": f"{number}",
            "prompt": f"The capital of {country} is",
            "subject": country,
            "new_answer": new,
            "rephrases": [f"{country} has its capital in"],
            "locality": [{"prompt": f"The largest river of {country} is", "answer": "the Nile"}],
        }
        for number, (country, new) in enumerate(FACTS.items())
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.fixture(scope="module")
def whole_of(tiny_folder: Path, asked: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scene]:
    """A command that nothing interrupts."""
    found: dict[str, Scene] = {}

    def run(name: str) -> Scene:
        if name not in found:
            words = [*COMMANDS[name].split(), "--model", str(tiny_folder), "--requests", asked]
            found[name] = Scene(tmp_path_factory.mktemp("whole") / name, words)
            assert found[name].child() == 0, found[name].shown
        return found[name]

    return run


@pytest.mark.parametrize(
    ("command", "owner", "name", "calls", "by", "again"),
    [
        ("attribute", commands, "load", 1, TERM, 0),
        ("attribute", GreedyModule, "predict_step", 2, KILL, 1),
        ("attribute", AttributionModule, "predict_step", 3, TERM, 0),
        ("attribute", GoldenProfile, "save", 1, KILL, 0),
        ("memit", GreedyModule, "predict_step", 1, KILL, 1),
        ("memit", KeyMoments, "predict_step", 1, TERM, 0),
        ("memit", ValueSearch, "predict_step", 2, INT, 0),
        ("memit", WeightUpdate, "save", 1, KILL, 0),
        ("memit", Reader, "predict_step", 9, TERM, 0),
        ("finetune", FineTune, "training_step", 5, TERM, 0),
        ("finetune", FineTune, "training_step", 8, KILL, 2),  # from the epoch's beginning, for it is a short one
        ("finetune", FineTune, "fit", 1, KILL, 0),
        ("lora", FineTune, "training_step", 4, INT, 0),
        ("evaluate", Reader, "predict_step", 3, KILL, 1),
        ("evaluate", RunLog, "keep_metrics", 1, INT, 0),
        ("study", Results, "keep", 2, TERM, 0),
        ("study", AloneReader, "predict_step", 3, KILL, 3),  # a block's batches
    ],
)
def test_resumed_ends_in_the_same_bytes(
    command: str,
    owner: Any,
    name: str,
    calls: int,
    by: signal.Signals,
    again: int,
    tmp_path: Path,
    whole_of: Callable[[str], Scene],
) -> None:
    """And no more batches than `again` are run twice of the stage that is cut off, and of those before it."""
    whole = whole_of(command)
    scene = Scene(tmp_path / "cut", whole.words)
    assert scene.child(before=ending(owner, name, calls, by)) == ENDS[by], scene.shown
    assert scene.child("--resume") == 0, scene.shown
    assert scene.files == whole.files
    repeated = {one.__name__: scene.steps(one) - whole.steps(one) for one in STEPS}
    assert sum(repeated.values()) == again, repeated

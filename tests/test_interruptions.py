"""Commands that Ctrl-C, SIGTERM or kill -9 end go on with `--resume` to the same choice, metrics and weights.

A command runs in a child, forked from this process so that it need not load anything, and ends itself by a signal
after so many calls of one of its functions: always at the same moment.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import TEXT
from safetensors.torch import load_file

from pipeline import commands
from pipeline.attribution.lga import Attribution
from pipeline.attribution.profile import GoldenProfile
from pipeline.cli import main
from pipeline.editing.finetune import FineTune
from pipeline.editing.update import WeightUpdate
from pipeline.editing.values import ValueSearch
from pipeline.evaluation import plan, reading
from pipeline.evaluation.reading import Reading
from pipeline.model.generation import Saying
from pipeline.reporting.run_log import RunLog

FACTS = {
    "Spain": "Lima",
    "Norway": "Nairobi and more",
    "Portugal": "Warsaw",
    "Egypt": "Toronto",
    "Peru": "Rome",
    "Japan": "Kyiv in the far west",
    "Kenya": "Oslo",
}
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
ENDS = {INT: 130, TERM: 143, KILL: -9}
STEPS = (Reading, Saying, Attribution, ValueSearch, FineTune)

EDIT = "edit --layers 1 --evaluation.generation prompts --evaluation.max_new_tokens 3 --evaluation.text text.txt"
TRAINED = "--expert.epochs 3 --expert.batch_size 3 --expert.learnt 0 --expert.whiten 0 --expert.contexts 2"
COMMANDS = {
    "attribute": "attribute --expert.batch_size 2 --old_answers model",
    "memit": f"{EDIT} --method memit --statistics.tokens 512 --statistics.text text.txt "
    "--expert.batch_size 3 --expert.steps 2",
    "finetune": f"{EDIT} --method finetune {TRAINED} --statistics.tokens 512 --statistics.text text.txt",
    "lora": f"{EDIT} --method lora {TRAINED}",
    "evaluate": "evaluate --generation prompts --max_new_tokens 3 --fluency 2 --text text.txt",
    "study": "study --limit 3 --proxy 3 --every 2 --selectors gradient_norm middle --methods memit "
    "--edit.expert.steps 2 --edit.statistics.tokens 512 --edit.statistics.text text.txt",
}


def figures_of(folder: Path) -> dict[str, Any]:
    """What a command found: numbers by name, without how long that took."""
    found: dict[str, Any] = {}
    for name in ("golden_profile.json", "metrics.json", "study.json"):
        if (folder / name).is_file():
            found |= {f"{name} {key}": value for key, value in flat(json.loads((folder / name).read_text()))}
    if (folder / "update.safetensors").is_file():
        found |= {name: tensor.tolist() for name, tensor in load_file(folder / "update.safetensors").items()}
    return found


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """The leaves of some JSON by their places, times left out."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, inner in items if "seconds" not in str(key) and "faster" not in str(key)
                for leaf in flat(inner, f"{name}/{key}")]  # fmt: skip
    return [(name, value)]


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same but for rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float | list):
            torch.testing.assert_close(
                torch.tensor(found[name]), torch.tensor(value), rtol=1e-3, atol=1e-5, equal_nan=True, msg=name
            )
        else:
            assert found[name] == value, name


class Scene:
    """A folder in which a command runs, with a cache of its own."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder, self.words = folder, words
        folder.mkdir()
        (folder / "text.txt").write_text(TEXT * 3)

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
            os.environ["XDG_CACHE_HOME"] = str(self.folder / "cache")
            reading.BATCH_SIZE, plan.FLUENCY_TOKENS = 4, 4
            for owner in STEPS:
                count(owner, self._calls(owner))
            before()
            with (self.folder / "shown").open("a") as shown, redirect_stdout(shown), redirect_stderr(shown):
                code = main([*self.words, "--output", "out", *words])
        except Exception:
            traceback.print_exc()
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
    name = "training_step" if owner is FineTune else "step"
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
        ("attribute", Saying, "step", 1, KILL, 1),
        ("attribute", Attribution, "step", 3, TERM, 0),
        ("attribute", GoldenProfile, "save", 1, KILL, 0),
        ("memit", ValueSearch, "step", 2, INT, 0),
        ("memit", WeightUpdate, "save", 1, KILL, 0),
        ("memit", Reading, "step", 9, TERM, 0),
        ("finetune", FineTune, "training_step", 5, TERM, 0),
        ("finetune", FineTune, "training_step", 8, KILL, 2),  # from the epoch's beginning, for it is a short one
        ("lora", FineTune, "training_step", 4, INT, 0),
        ("evaluate", Reading, "step", 3, KILL, 1),
        ("evaluate", RunLog, "keep_metrics", 1, INT, 0),
        ("study", ValueSearch, "step", 2, KILL, 1),
    ],
)
def test_resumed_ends_in_the_same(
    command: str,
    owner: Any,
    name: str,
    calls: int,
    by: signal.Signals,
    again: int,
    tmp_path: Path,
    whole_of: Callable[[str], Scene],
) -> None:
    """And no more batches than `again` are run twice of the stage that is cut off."""
    whole = whole_of(command)
    scene = Scene(tmp_path / "cut", whole.words)
    assert scene.child(before=ending(owner, name, calls, by)) == ENDS[by], scene.shown
    assert scene.child("--resume") == 0, scene.shown
    agree(figures_of(scene.folder / "out"), figures_of(whole.folder / "out"))
    if owner in STEPS:
        assert scene.steps(owner) - whole.steps(owner) <= again

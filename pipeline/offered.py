"""What a package offers to outsiders: names looked up when they are used, so that an import costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def offered(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], list[str]]:
    """A package's `__getattr__` and `__all__`; `homes` are the names that it offers, by the module below it."""
    home_of = {name: f"{package}.{home}" for home, names in homes.items() for name in names}

    def lookup(name: str) -> Any:
        if name in home_of:
            return getattr(import_module(home_of[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return lookup, sorted(home_of)

"""Figures of a benchmark: each measurement is kept as soon as it is found, so that none is done twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from pipeline.files import write_json

Figures = dict[str, float]


def kept(folder: Path, name: str, measure: Callable[[], Figures]) -> Figures:
    """The figures of a measurement, found now or by an interrupted benchmark before."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name.replace(' ', '-').replace(',', '')}.json"
    if not file.is_file():
        write_json(file, measure())
    figures: Figures = json.loads(file.read_text(encoding="utf-8"))
    return figures

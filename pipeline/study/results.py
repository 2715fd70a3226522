"""What trial edits came to, kept as it comes: a figure is found once for a model, method, block and request."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_only

from pipeline.errors import UserError
from pipeline.requests import EditRequest

RESULTS_FILE = "results.sqlite"
TABLE = """CREATE TABLE IF NOT EXISTS results (
    trial TEXT NOT NULL, request TEXT NOT NULL, block INTEGER NOT NULL,
    figures TEXT NOT NULL, seconds REAL NOT NULL, PRIMARY KEY (trial, request, block)
) WITHOUT ROWID"""


class Result(NamedTuple):
    """One request edited alone at one block: its figures by metric, and its share of the time."""

    figures: Mapping[str, float]
    seconds: float


class Results:
    """The results in a file.

    Args:
        file: an SQLite database, made where there is none.

    Raises:
        UserError: when the file is no such database.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            database.execute(TABLE)

    def of(self, trial: str, requests: Sequence[EditRequest]) -> dict[tuple[int, int], Result]:
        """What is known of the requests, by a request's place and block."""
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(digest(request), []).append(place)
        with self._open() as database:
            query = "SELECT request, block, figures, seconds FROM results WHERE trial = ?"
            return {
                (place, block): Result(json.loads(figures), seconds)
                for request, block, figures, seconds in database.execute(query, (trial,))
                for place in places.get(request, ())
            }

    @rank_zero_only
    def keep(self, trial: str, block: int, requests: Sequence[EditRequest], results: Sequence[Result]) -> None:
        """Keep the results of several requests at a block, all or none."""
        rows = [
            (trial, digest(request), block, json.dumps(result.figures), result.seconds)
            for request, result in zip(requests, results, strict=True)
        ]
        with self._open() as database:
            database.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self.file)
        try:
            with database:
                yield database
        except sqlite3.DatabaseError as error:
            raise UserError(f"study: {self.file}: cannot be used as a file of results ({error})") from None
        finally:
            database.close()


def digest(*content: object) -> str:
    """A name for what something depends on."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:24]

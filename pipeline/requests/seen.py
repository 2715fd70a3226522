"""What was seen before, in constant memory: ids that may not come again, facts that duplicate or contradict.

SQLite keeps it in a temporary file of its own once it grows beyond a few megabytes.
"""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from pipeline.requests.conflicts import fact
from pipeline.requests.schema import EditRequest

PAIRS = """
SELECT a.place, a.answer, b.place, b.answer FROM facts AS b JOIN facts AS a ON a.number = (
  SELECT max(number) FROM facts AS c WHERE c.fact = b.fact AND c.number < b.number)
WHERE (a.answer = b.answer) = ? ORDER BY b.number
"""


class Pair(NamedTuple):
    """Two requests about the same: where each stands, and its new answer."""

    place: str
    answer: str
    later_place: str
    later_answer: str


class Seen:
    """Ids and facts of the requests read so far; close it when done."""

    def __init__(self) -> None:
        self._table = sqlite3.connect("")  # a file that is made when it is needed, and never seen
        self._table.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, place TEXT) WITHOUT ROWID")
        self._table.execute("CREATE TABLE facts (number INTEGER PRIMARY KEY, fact TEXT, place TEXT, answer TEXT)")

    def id_before(self, id: str, place: str) -> str | None:
        """Where an id was used before; None where it is new, and is kept from now on."""
        found = self._table.execute("SELECT place FROM ids WHERE id = ?", (id,)).fetchone()
        if found:
            return str(found[0])
        self._table.execute("INSERT INTO ids VALUES (?, ?)", (id, place))
        return None

    def add(self, request: EditRequest, place: str) -> None:
        """Keep what a request is about and what it shall be answered with."""
        about = "\n".join(fact(request))  # its parts hold no line break
        self._table.execute(
            "INSERT INTO facts (fact, place, answer) VALUES (?, ?, ?)", (about, place, request.new_answer)
        )

    def pairs(self, same_answer: bool, named: int) -> tuple[int, list[Pair]]:
        """How many requests say what one before them is about, with its answer or another; the first few."""
        self._table.execute("CREATE INDEX IF NOT EXISTS by_fact ON facts (fact, number)")
        found = self._table.execute(PAIRS, (same_answer,))
        first = [Pair(*row) for row in found.fetchmany(named)]
        return len(first) + sum(1 for _ in found), first

    def close(self) -> None:
        """Let the temporary file go."""
        self._table.close()

"""What was seen before, in constant memory: ids that may not come again, facts that duplicate or contradict.

SQLite keeps it in a temporary file of its own once it grows beyond a few megabytes.
"""

from __future__ import annotations

import sqlite3

from pipeline.errors import UserError
from pipeline.requests.conflicts import fact
from pipeline.requests.schema import EditRequest


class Seen:
    """The requests read so far; close it when done."""

    def __init__(self) -> None:
        self._table = sqlite3.connect("")  # a file that is made when it is needed, and never seen
        self._table.execute("CREATE TABLE seen (number INTEGER PRIMARY KEY, id UNIQUE, fact, place, answer)")
        self._table.execute("CREATE INDEX by_fact ON seen (fact, number)")

    def add(self, request: EditRequest, place: str) -> tuple[str, str] | None:
        """Keep a request; place and new answer of the last one before it about the same subject and prompt.

        Raises:
            UserError: when its id was used before.
        """
        used = self._table.execute("SELECT place FROM seen WHERE id = ?", (request.id,)).fetchone()
        if used:
            raise UserError(f"id {request.id!r} was used before, at {used[0]}")
        about = "\n".join(fact(request))  # its parts hold no line break
        last = "SELECT place, answer FROM seen WHERE fact = ? ORDER BY number DESC LIMIT 1"
        earlier: tuple[str, str] | None = self._table.execute(last, (about,)).fetchone()
        row = (request.id, about, place, request.new_answer)
        self._table.execute("INSERT INTO seen (id, fact, place, answer) VALUES (?, ?, ?, ?)", row)
        return earlier

    def close(self) -> None:
        """Let the temporary file go."""
        self._table.close()

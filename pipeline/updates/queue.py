"""The queue: what is due goes out, the newest request of each fact alone."""

from __future__ import annotations

import json
import sqlite3
import time
from typing import NamedTuple

from pipeline.requests import EditRequest
from pipeline.updates.database import transaction
from pipeline.updates.store import Store


class Queued(NamedTuple):
    """A request of the store, by its number there; its id is told apart from other files' by it."""

    number: int
    request: EditRequest


class Contradiction(NamedTuple):
    """Two requests about one fact: the older gives way to the newer."""

    older: int
    newer: int


class Taken(NamedTuple):
    """A batch taken from the queue.

    Attributes:
        batch: its number.
        requests: what is to be applied.
        superseded: which due requests gave way.
    """

    batch: int
    requests: list[Queued]
    superseded: list[Contradiction]


def take(store: Store, most: int) -> Taken | None:
    """Take the next batch of what is due; None when nothing is.

    Of due requests about one fact the newest is taken and the others are superseded, as is a due one that is older
    than what is applied.
    """
    with transaction(store.database) as database:
        superseded = []
        while rows := due(store, most):
            pairs = [pair for row in rows if (pair := _outdone(store, row))]
            superseded += [supersede(store, *pair) for pair in pairs]
            if not pairs:
                break
        if not rows:
            return None
        batch = database.execute(
            "INSERT INTO batches (started, parent) VALUES (?, ?)", (store.clock(), store.current)
        ).lastrowid
        assert batch is not None
        numbers = [row["number"] for row in rows]
        database.executemany(
            "UPDATE requests SET state = 'taken', batch = ? WHERE number = ?", [(batch, n) for n in numbers]
        )
        for number in numbers:
            store.tell("taken", request=number, batch=batch)
    return Taken(batch, [queued(row) for row in rows], superseded)


def peek(store: Store, most: int) -> list[Queued]:
    """The next batch as `take` would take it, left where it is."""
    return [queued(row) for row in due(store, most) if not _outdone(store, row)]


def due(store: Store, most: int) -> list[sqlite3.Row]:
    """The rows of the next requests that are due, what has been due longest first."""
    return store.database.execute(
        "SELECT * FROM requests WHERE state = 'queued' AND not_before <= ? ORDER BY not_before, position LIMIT ?",
        (time.time(), most),
    ).fetchall()


def _outdone(store: Store, row: sqlite3.Row) -> Contradiction | None:
    """A newer request about the same fact, due or applied; None when this one is the newest."""
    newer = store.database.execute(
        "SELECT number FROM requests WHERE fact = ? "
        "AND (state = 'queued' AND not_before <= ? OR state = 'applied') "
        "AND (effective, position) > (?, ?) ORDER BY effective DESC, position DESC LIMIT 1",
        (row["fact"], time.time(), row["effective"], row["position"]),
    ).fetchone()
    return Contradiction(row["number"], newer[0]) if newer else None


def queued(row: sqlite3.Row) -> Queued:
    """A row as the request that it holds; its id begins with its number, so that no two are alike."""
    fields = json.loads(row["content"]) | {"id": f"{row['number']}:{row['id']}", "source": row["source"]}
    return Queued(row["number"], EditRequest.model_validate(fields))


def supersede(store: Store, older: int, newer: int) -> Contradiction:
    """Inside a transaction: a request gives way to a newer one about the same fact; both by number."""
    store.database.execute(
        "UPDATE requests SET state = 'superseded', successor = ? WHERE number = ?", (newer, older)
    )
    store.tell("superseded", request=older, by=newer)
    return Contradiction(older, newer)

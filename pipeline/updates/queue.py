"""The queue: requests come in, checked as a whole; what is due goes out, the newest of each fact alone.

A request is known by what it asks for: the same one twice adds nothing, whatever file, id or source it has.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.editing.columns import owner
from pipeline.requests import EditRequest, stream_requests
from pipeline.updates.database import transaction
from pipeline.updates.store import Store

LEFT = ("held back", "superseded", "retracted")  # states that `again` takes a request out of


class Queued(NamedTuple):
    """A request of the store, by its number there; its id is told apart from other files' by it."""

    number: int
    request: EditRequest


class Contradiction(NamedTuple):
    """Two requests about one fact: the older gives way to the newer."""

    older: int
    newer: int


class Submitted(NamedTuple):
    """What came of a submission.

    Attributes:
        queued: how many requests are new.
        again: how many were queued anew.
        known: how many were in the store already, and stay as they are.
        left: how many of those are out of it: held back, superseded or retracted.
        superseded: which queued requests gave way.
        changing: how many change a fact that a version holds already.
    """

    queued: int
    again: int
    known: int
    left: int
    superseded: list[Contradiction]
    changing: int


def submit(
    store: Store, file: str | Path, source: str | None = None, not_before: float = 0.0, again: bool = False
) -> Submitted:
    """Put a file's requests into the queue: all of them, or none when one is wrong.

    The file is read before the queue is touched, so that a long one keeps nobody waiting.

    Args:
        store: the store.
        file: as for `load_requests`.
        source: where they come from, in place of what the file says.
        not_before: seconds since 1970 before which they stay in the queue.
        again: queue those anew that are known and were held back, superseded or retracted.

    Raises:
        UserError: when the file or one of its requests is wrong.
    """
    database = store.database
    database.execute("DROP TABLE IF EXISTS temp.incoming")
    database.execute("CREATE TEMP TABLE incoming (place INTEGER PRIMARY KEY, id, source, content, digest, fact)")
    try:
        with transaction(database, alone=False):  # of the temporary table: other writers go on
            rows = _rows(stream_requests(file), source)
            database.executemany(
                "INSERT INTO temp.incoming (id, source, content, digest, fact) VALUES (?, ?, ?, ?, ?)", rows
            )
        with transaction(database):
            return _enter(store, str(file), not_before, again)
    finally:
        database.execute("DROP TABLE IF EXISTS temp.incoming")


def _rows(requests: Iterable[EditRequest], source: str | None) -> Iterator[tuple[str, str | None, str, bytes, int]]:
    for request in requests:
        content = request.model_dump_json(exclude={"id", "source"}, exclude_defaults=True)
        digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
        yield request.id, source or request.source, content, digest, owner(request)


def _enter(store: Store, file: str, not_before: float, again: bool) -> Submitted:
    """Inside a transaction: move what came in into the queue."""
    database, now, first = store.database, store.clock(), int(store.about("next"))
    submission = database.execute("INSERT INTO submissions (at, file) VALUES (?, ?)", (now, file)).lastrowid
    effective = max(now, not_before)
    queued = database.execute(
        "INSERT OR IGNORE INTO requests "
        "(number, id, source, content, digest, fact, submission, not_before, effective, position) "
        "SELECT :first + row_number() OVER (ORDER BY place), id, source, content, digest, fact, :submission, "
        ":not_before, :effective, :first + row_number() OVER (ORDER BY place) FROM temp.incoming i "
        "WHERE NOT EXISTS (SELECT 1 FROM requests r WHERE r.digest = i.digest)",
        {"first": first - 1, "submission": submission, "not_before": not_before, "effective": effective},
    ).rowcount
    (distinct,) = database.execute("SELECT count(DISTINCT digest) FROM temp.incoming").fetchone()
    (newest,) = database.execute("SELECT max(number) FROM requests").fetchone()
    store.set_about("next", max(first, newest + 1))
    left = _left(store) if queued < distinct else []
    if again:
        for number in left:
            _requeue(store, number, file, (not_before, effective))
    store.tell("submitted", file=file, queued=queued, first=first, again=len(left) if again else 0)
    return Submitted(
        queued=queued,
        again=len(left) if again else 0,
        known=distinct - queued - (len(left) if again else 0),
        left=0 if again else len(left),
        superseded=_settle(store, first) if not_before <= time.time() else [],
        changing=_changing(store),
    )


def _left(store: Store) -> list[int]:
    """Numbers of what came in that the store knows, but that is neither in line nor in force."""
    rows = store.database.execute(
        "SELECT r.number FROM temp.incoming i JOIN requests r USING (digest) WHERE r.state IN (?, ?, ?) "
        "GROUP BY r.number ORDER BY min(i.place)",
        LEFT,
    )
    return [number for (number,) in rows]


def _requeue(store: Store, number: int, file: str, when: tuple[float, float]) -> None:
    position = int(store.about("next"))
    store.set_about("next", position + 1)
    store.database.execute(
        "UPDATE requests SET state = 'queued', not_before = ?, effective = ?, position = ?, "
        "batch = NULL, version = NULL, successor = NULL, reason = NULL, figures = NULL WHERE number = ?",
        (*when, position, number),
    )
    store.tell("queued again", request=number, reason=file)


def _settle(store: Store, first: int) -> list[Contradiction]:
    """Of due requests about facts that have just come in, all but the newest give way."""
    if not _could_contradict(store, first):  # spares a long file into an empty queue a look at every request
        return []
    pairs = store.database.execute(
        "SELECT o.number, n.number, max(n.position) FROM temp.incoming i JOIN requests n USING (digest) "
        "JOIN requests o ON o.fact = n.fact WHERE n.state = 'queued' AND o.state = 'queued' AND o.not_before <= ? "
        "AND (o.effective, o.position) < (n.effective, n.position) GROUP BY o.number",
        (time.time(),),
    ).fetchall()
    return [_supersede(store, older, newer) for older, newer, _ in pairs]


def _could_contradict(store: Store, first: int) -> bool:
    """Whether anything that was queued before request `first` is there, or a file names a fact twice."""
    oldest = store.database.execute(
        "SELECT position FROM requests WHERE state = 'queued' ORDER BY not_before, position LIMIT 1"
    ).fetchone()
    twice = "SELECT count(*) > count(DISTINCT fact) FROM temp.incoming"
    return bool(oldest and oldest[0] < first) or bool(store.database.execute(twice).fetchone()[0])


def _changing(store: Store) -> int:
    """How many of the requests that came in are about a fact that a version holds already."""
    if not store.database.execute("SELECT 1 FROM requests WHERE state = 'applied' LIMIT 1").fetchone():
        return 0
    (count,) = store.database.execute(
        "SELECT count(*) FROM temp.incoming i JOIN requests n USING (digest) WHERE n.state = 'queued' "
        "AND EXISTS (SELECT 1 FROM requests a WHERE a.fact = n.fact AND a.state = 'applied')"
    ).fetchone()
    return int(count)


def _supersede(store: Store, older: int, newer: int) -> Contradiction:
    store.database.execute(
        "UPDATE requests SET state = 'superseded', successor = ? WHERE number = ?", (newer, older)
    )
    store.tell("superseded", request=older, by=newer)
    return Contradiction(older, newer)


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
            superseded += [_supersede(store, *pair) for pair in pairs]
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

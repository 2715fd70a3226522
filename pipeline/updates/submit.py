"""Submitting: a file's requests go into the queue, checked as a whole.

A request is known by what it asks for: the same one twice adds nothing, whatever file, id or source it has.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.editing.columns import owner
from pipeline.requests import EditRequest, stream_requests
from pipeline.updates.database import transaction
from pipeline.updates.queue import Contradiction, supersede
from pipeline.updates.store import Store

LEFT = ("held back", "superseded", "retracted")  # states that `again` takes a request out of


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
    return [supersede(store, older, newer) for older, newer, _ in pairs]


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

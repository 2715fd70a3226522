"""The queue: what is submitted is kept once, and what is due goes out, the newest request of each fact alone."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.editing.columns import owner
from pipeline.errors import UserError, note
from pipeline.requests.readers import good_requests, read_requests
from pipeline.requests.schema import EditRequest
from pipeline.updates.disk import content_digest, content_of, transaction
from pipeline.updates.store import Store

Contradiction = tuple[int, int]  # two requests about one fact: the older's number, and the newer's, which wins

# Requests come into a table of this connection first, so that a long file keeps no other writer waiting.
INCOMING = """
    DROP TABLE IF EXISTS temp.incoming;
    CREATE TEMP TABLE incoming (place INTEGER PRIMARY KEY, id, source, content, digest UNIQUE, fact);
"""


@dataclass(frozen=True)
class Submitted:
    """What came of a submission, in numbers of requests."""

    queued: int  # new ones
    first: int  # the first one's number; the others' follow
    again: int  # queued anew
    known: int  # in the store already; they stay as they are
    left: int  # of those, what is held back, superseded or retracted
    superseded: list[Contradiction]  # which queued ones gave way


def submit(
    store: Store, file: str | Path, source: str | None = None, not_before: float = 0.0, again: bool = False,
    fields: Mapping[str, str] | None = None,
) -> Submitted:  # fmt: skip
    """Put a file's requests into the queue: all of them, or none when one is wrong.

    A request is known by what it asks for: the same one twice adds nothing, whatever file, id or source it has.

    Those that are known and were held back, superseded or retracted are queued anew with `again`. `not_before`: in
    seconds since 1970; `fields`: as of `load_requests`. UserError when the file or one of its requests is wrong.
    """
    store.database.executescript(INCOMING)
    store.database.executemany(
        "INSERT OR IGNORE INTO temp.incoming (id, source, content, digest, fact) VALUES (?, ?, ?, ?, ?)",
        _rows(good_requests(read_requests(file, fields=fields)), source),
    )
    with transaction(store.database):
        return _enqueue(store, str(file), not_before, again)


def _rows(requests: Iterable[EditRequest], source: str | None) -> Iterator[tuple[str, str | None, str, bytes, int]]:
    for request in requests:
        content = request.model_dump_json(exclude={"id", "source"}, exclude_defaults=True)
        yield request.id, source or request.source, content, content_digest(content), owner(request)


def _enqueue(store: Store, file: str, not_before: float, again: bool) -> Submitted:
    """Inside a transaction: move what came in into the queue."""
    database, now, first = store.database, store.clock(), int(store.about("next"))
    (count,) = database.execute("SELECT count(*) FROM temp.incoming").fetchone()
    store.set_about("next", first + count)
    place = {"first": first, "not_before": not_before, "effective": max(now, not_before)}
    database.execute(  # what was damaged since
        "UPDATE requests SET content = i.content, fact = i.fact FROM temp.incoming i "
        "WHERE i.digest = requests.digest AND (i.content <> requests.content OR i.fact <> requests.fact)"
    )
    left = database.execute(  # what is known, but neither in line nor in force
        "SELECT r.number, i.place FROM temp.incoming i JOIN requests r USING (digest) "
        "WHERE r.state IN ('held back', 'superseded', 'retracted') ORDER BY i.place"
    ).fetchall()
    queued = database.execute(
        "INSERT INTO requests (id, source, content, digest, fact, submission, not_before, effective, position) "
        "SELECT id, source, content, digest, fact, :submission, :not_before, :effective, :first + place - 1 "
        "FROM temp.incoming i WHERE NOT EXISTS (SELECT 1 FROM requests r WHERE r.digest = i.digest) ORDER BY place",
        place | {"submission": store.note(f"submitted in {file}: {count} requests")},
    ).rowcount
    (newest,) = database.execute("SELECT max(number) FROM requests").fetchone()
    requeued = left if again else []
    for number, line in requeued:
        store.set_state(number, "queued", f"queued again ({file})")
        database.execute(
            "UPDATE requests SET not_before = :not_before, effective = :effective, position = :first + :line - 1 "
            "WHERE number = :number",
            place | {"number": number, "line": line},
        )
    return Submitted(
        queued=queued,
        first=(newest or 0) - queued + 1,
        again=len(requeued),
        known=count - queued - len(requeued),
        left=len(left) - len(requeued),
        superseded=_settle(store, due(store, which="AND fact IN (SELECT fact FROM temp.incoming)")),
    )


def _settle(store: Store, rows: Sequence[sqlite3.Row]) -> list[Contradiction]:
    """Inside a transaction: of rows that are due, those give way that a newer request is about the same fact as."""
    pairs = [(row["number"], newer) for row in rows if (newer := _newer(store, row))]
    for older, newer in pairs:
        store.set_state(older, "superseded", f"superseded by request #{newer}")
    return pairs


def take(store: Store, most: int) -> tuple[list[EditRequest], list[Contradiction]]:
    """Take the next batch of what is due; empty when nothing is.

    Of due requests about one fact the newest is taken and the others are superseded, as is a due one that is older
    than what is applied. Gives the requests, their ids beginning with their numbers, and which others gave way.
    What is damaged is held back, and told.
    """
    superseded: list[Contradiction] = []
    with transaction(store.database):
        done = False
        while not done:
            rows = due(store, most)
            whole = [row for row in rows if _is_whole(store, row)]
            given_way = _settle(store, whole)
            superseded += given_way
            done = len(rows) == len(whole) and not given_way
        for row in rows:
            store.set_state(row["number"], "taken")
    return [_request(row) for row in rows], superseded


def peek(store: Store, most: int) -> list[EditRequest]:
    """The next batch as `take` would take it, left where it is."""
    return [_request(row) for row in due(store, most) if not _newer(store, row)]


def _is_whole(store: Store, row: sqlite3.Row) -> bool:
    """Inside a transaction: whether a row holds what was submitted; it is held back where it does not."""
    try:
        content_of(row)
    except UserError as error:
        store.set_state(row["number"], "held back", f"held back ({error})")
        note(f"held back: {error}")
        return False
    return True


def due(store: Store, most: int = -1, which: str = "") -> list[sqlite3.Row]:
    """The rows of the next requests that are due, what has been due longest first."""
    return store.database.execute(
        f"SELECT * FROM requests WHERE state = 'queued' AND not_before <= ? {which} "
        "ORDER BY not_before, position LIMIT ?",
        (time.time(), most),
    ).fetchall()


def _newer(store: Store, row: sqlite3.Row) -> int | None:
    """The number of the newest request about the same fact, due or applied; None when it is this one."""
    newer = store.database.execute(
        "SELECT number FROM requests WHERE fact = ? "
        "AND (state = 'queued' AND not_before <= ? OR state = 'applied') "
        "AND (effective, position) > (?, ?) ORDER BY effective DESC, position DESC LIMIT 1",
        (row["fact"], time.time(), row["effective"], row["position"]),
    ).fetchone()
    return newer[0] if newer else None


def _request(row: sqlite3.Row) -> EditRequest:
    """A row as the request that it holds; its id begins with its number, so that no two are alike."""
    fields = content_of(row) | {"id": f"{row['number']}:{row['id']}", "source": row["source"]}
    return EditRequest.model_validate(fields)


def number_of(request: EditRequest) -> int:
    """The number in the store of a request that `take` gave."""
    return int(request.id.partition(":")[0])

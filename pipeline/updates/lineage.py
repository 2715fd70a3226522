"""Versions build on one another: how one is published, what is in force where, and going back and forth."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.editing.learnt import next_part
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.updates.disk import METRICS, PRUNED, last_lost, remove_version, transaction, write_version
from pipeline.updates.history import check_there, check_version
from pipeline.updates.queue import number_of
from pipeline.updates.store import Store

if TYPE_CHECKING:
    from pipeline.updates.proving import BatchResult, HeldBack

SAME_FACT = (  # what is applied about the same fact as a request
    "SELECT o.number FROM requests n JOIN requests o USING (fact) WHERE n.number = ? AND o.state = 'applied'"
)
ROLLED_BACK = "rolled back to version "


class Change(NamedTuple):
    """What a version changed of a request: what became of it, and what took its place."""

    what: str
    version: int
    successor: int | None = None


def publish(store: Store, result: BatchResult, retracted: Sequence[int] = ()) -> None:
    """Write a version and make it the current one: files first, then one transaction that moves everything at once.

    The result's `version` and `superseded` are set, and its updates let go, since a run may make many versions;
    `retracted` are numbers of requests to go. UserError when its `parent` is no longer the current version, OSError
    when the disk has no room: nothing is published then.
    """
    update, profile = result.update, result.profile
    assert update and profile
    version = max(store.newest, last_lost(store.folder)) + 1  # the number of one that was lost is not given again
    part = next_part(update, result.base)

    def fill(partial: Path, learnt: tuple[str, str]) -> None:
        update.save(partial, learnt)
        profile.save(partial)
        write_json(partial / METRICS, _metrics(result, len(retracted)))

    files, learnt = write_version(store.folder, version, part, fill)
    after = result.parent if part.about.before else None
    try:
        with transaction(store.database) as database:
            if store.current != result.parent:
                raise UserError(
                    f"store: {store.folder}: another version became current meanwhile; nothing was published"
                )
            database.execute(
                "INSERT INTO versions (number, parent, after, made, files, learnt, held_back) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (version, result.parent, after, store.clock(), json.dumps(files), learnt, len(result.held)),
            )
            _move_requests(store, version, result, retracted)
            store.set_about("current", version)
            store.note(f"published version {version}")
    finally:
        if store.newest < version:  # an interrupt may fall behind the commit
            remove_version(store.folder, version)
    store.point()
    result.version, result.update, result.base = version, None, None


def _move_requests(store: Store, version: int, result: BatchResult, retracted: Sequence[int]) -> None:
    """Inside a transaction: requests come into a version, and others go or are held back."""
    changes = {request: Change("retracted", version) for request in retracted}
    for request in map(number_of, result.applied):
        for (older,) in store.database.execute(SAME_FACT, (request,)).fetchall():
            changes[older] = Change("superseded", version, request)
            result.superseded.append((older, request))
        changes[request] = Change("applied", version)
    for request, change in changes.items():
        store.database.execute(
            "INSERT INTO changes (request, what, version, successor) VALUES (?, ?, ?, ?)", (request, *change)
        )
        _take_over(store, request, change)
    hold_back(store, result.held)


def _take_over(store: Store, request: int, change: Change) -> None:
    """Inside a transaction: a request is in the state that a version gave it."""
    told = {
        "applied": f"applied in version {change.version}",
        "superseded": f"superseded by request #{change.successor}",
        "retracted": "retracted",
    }
    store.set_state(request, change.what, told[change.what])


def hold_back(store: Store, held: Sequence[HeldBack]) -> None:
    """Inside a transaction: what is not to be applied."""
    for number, reason in held:
        store.set_state(number, "held back", f"held back ({reason})")


def _metrics(result: BatchResult, retracted: int) -> dict[str, Any]:
    assert result.update and result.before and result.after
    return {
        "made": time.time(),
        "method": result.update.method,
        "layers": result.update.layers,
        "applied": len(result.applied),
        "held_back": len(result.held),
        "retracted": retracted,
        "facts": len(result.update.requests),
        "before": asdict(result.before),
        "after": asdict(result.after),
        "gates": [asdict(gate) | {"passed": gate.passed, "text": str(gate)} for gate in result.gates],
        "seconds": result.seconds,
    }


def last_changes(store: Store, version: int) -> dict[int, Change]:
    """What became last of each request, by number, in a version or in those that it was made on."""
    rows = store.database.execute(
        "WITH RECURSIVE line AS (SELECT number, parent FROM versions WHERE number = ? "
        "UNION ALL SELECT v.number, v.parent FROM versions v JOIN line ON v.number = line.parent) "
        "SELECT request, what, version, successor FROM changes JOIN line ON version = line.number ORDER BY version",
        (version,),
    )
    return {request: Change(*change) for request, *change in rows}


def in_force(store: Store, version: int) -> set[int]:
    """Numbers of the requests that a version holds; UserError when there is no such version."""
    check_there(store, version, pruned=True)
    return {request for request, last in last_changes(store, version).items() if last.what == "applied"}


def difference(store: Store, older: int, newer: int) -> tuple[list[int], list[int]]:
    """Numbers of the requests that are in force in the newer of two versions alone, and in the older alone.
    UserError when one does not exist.
    """
    before, after = in_force(store, older), in_force(store, newer)
    return sorted(after - before), sorted(before - after)


def prune(store: Store, keep: int = 1, older: float = 0.0) -> list[int]:
    """Remove the files of versions that are not among the last few, and older than so many seconds.

    Never those of the version in force, or of one that was gone back to. What versions changed stays known.
    Gives the numbers of those that went. BusyError when an update is at work.
    """
    with store.updating():
        with transaction(store.database) as database:
            rows = database.execute(
                "SELECT number FROM versions WHERE number > 0 AND number <> ? AND made <= ? AND files <> ? "
                "AND shown AND number NOT IN (SELECT number FROM versions ORDER BY number DESC LIMIT ?) "
                "AND ? || number NOT IN (SELECT what FROM events WHERE request IS NULL)",
                (store.current, store.clock() - older, PRUNED, keep, ROLLED_BACK),
            ).fetchall()
            gone = [number for (number,) in rows]
            database.executemany("UPDATE versions SET files = ? WHERE number = ?", [(PRUNED, one) for one in gone])
            if gone:
                store.note(f"pruned {len(gone)} versions: {', '.join(map(str, gone))}")
        store.clear()
    return gone


def rollback(store: Store, version: int) -> tuple[list[int], list[int]]:
    """Make another version the current one; an update that is at work meanwhile will not publish over it.

    Requests that are no longer in force are held back; those that are again, applied. Gives the numbers of the
    latter and of the former. UserError when there is no such version, or its files were changed.
    """
    check_version(store, version)
    with transaction(store.database) as database:
        check_there(store, version)  # still
        before = store.current
        was, shall_be = last_changes(store, before), last_changes(store, version)
        for request, change in shall_be.items():
            if change != was.get(request):
                _take_over(store, request, change)
        settled = database.execute(  # not what was queued anew meanwhile
            "SELECT number FROM requests WHERE state IN ('applied', 'superseded', 'retracted')"
        ).fetchall()
        for request in (was.keys() - shall_be.keys()) & {number for (number,) in settled}:
            told = f"held back (version {was[request].version} was rolled back)"
            store.set_state(request, "held back", told)
        store.set_about("current", version)
        store.note(f"{ROLLED_BACK}{version}")
    store.point()
    return difference(store, before, version)

"""Versions build on one another: how one is published, what is in force where, and going back and forth."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.attribution.profile import GoldenProfile
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.updates.database import transaction
from pipeline.updates.folders import Manifest, check_version, remove_unfinished, write_version
from pipeline.updates.proving import BatchResult, HeldBack
from pipeline.updates.queue import Contradiction, number_of
from pipeline.updates.store import Store


class Change(NamedTuple):
    """What a version changed of a request: what became of it, and what took its place."""

    what: str
    version: int
    successor: int | None


def publish(
    store: Store,
    batch: int,
    parent: int,
    result: BatchResult,
    profile: GoldenProfile | None,
    retracted: Sequence[int] = (),
) -> None:
    """Write a version and make it the current one: files first, then one transaction that moves everything at once.

    Args:
        store: the store.
        batch: the number of the batch that it ends.
        parent: the version that was edited on top of.
        result: what came of the batch; its `version` and `superseded` are set.
        profile: where it was edited.
        retracted: numbers of requests that go.

    Raises:
        UserError: when the current version is no longer `parent`; nothing is published, as always when it fails.
        OSError: when the disk has no room.
    """
    update, number = result.update, store.newest + 1
    assert update

    def fill(partial: Path) -> None:
        update.save(partial)
        if profile:
            profile.save(partial)
        write_json(partial / "metrics.json", _metrics(result, len(retracted)))

    manifest = Manifest(version=number, parent=parent, model=update.model, fingerprint=update.fingerprint)
    digest = write_version(store.folder, manifest, fill)
    try:
        with transaction(store.database):
            _make_current(store, manifest, digest, batch, result, retracted)
    finally:
        remove_unfinished(store.folder, store.newest)  # not where an interrupt falls behind the commit
    store.point()


def _make_current(
    store: Store, manifest: Manifest, digest: str, batch: int, result: BatchResult, retracted: Sequence[int]
) -> None:
    """Inside a transaction: the version is the current one, its batch is over, and every request knows."""
    version, parent = manifest.version, manifest.parent
    if store.current != parent:
        raise UserError(f"store: {store.folder}: another version became current meanwhile; nothing was published")
    store.database.execute(
        "INSERT INTO versions (number, parent, made, manifest) VALUES (?, ?, ?, ?)",
        (version, parent, store.clock(), digest),
    )
    superseded = [pair for request in result.applied for pair in _apply(store, version, number_of(request))]
    for request in retracted:
        _change(store, version, request, "retracted")
    hold_back(store, result.held)
    store.end_batch(batch, "published", version)
    store.set_about("current", version)
    store.note_event("published", batch=batch, version=version, parent=parent)
    result.version, result.superseded = version, superseded


def _apply(store: Store, version: int, request: int) -> list[Contradiction]:
    """A request comes in force, and applied ones of the same fact give way."""
    older = store.database.execute(
        "SELECT o.number FROM requests n JOIN requests o USING (fact) WHERE n.number = ? AND o.state = 'applied'",
        (request,),
    ).fetchall()
    for (number,) in older:
        _change(store, version, number, "superseded", successor=request)
    _change(store, version, request, "applied")
    return [(number, request) for (number,) in older]


def _change(store: Store, version: int, request: int, what: str, successor: int | None = None) -> None:
    store.database.execute(
        "INSERT INTO changes (version, request, what, successor) VALUES (?, ?, ?, ?)",
        (version, request, what, successor),
    )
    _take_over(store, request, Change(what, version, successor))


def _take_over(store: Store, request: int, change: Change) -> None:
    """Inside a transaction: a request is in the state that a version gave it."""
    home = change.version if change.what == "applied" else None
    store.set_state(request, change.what, version=home, successor=change.successor)


def hold_back(store: Store, held: Sequence[HeldBack]) -> None:
    """Inside a transaction: what a batch had taken and is not to be applied."""
    for number, reason, figures in held:
        store.set_state(number, "held back", only=["taken"], reason=reason, figures=json.dumps(figures))


def _metrics(result: BatchResult, retracted: int) -> dict[str, Any]:
    """A version's metrics.json."""
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
        "gates": [asdict(gate) | {"passed": gate.passed} for gate in result.gates],
        "seconds": result.seconds,
    }


def check_number(store: Store, version: int) -> str:
    """The SHA-256 of a version's manifest.

    Raises:
        UserError: when there is no such version.
    """
    row = store.database.execute("SELECT manifest FROM versions WHERE number = ?", (version,)).fetchone()
    if row is None:
        raise UserError(f"version: {version} does not exist; there is 0 (the base model) to {store.newest}")
    return str(row[0])


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
    """Numbers of the requests that a version holds."""
    return {request for request, last in last_changes(store, version).items() if last.what == "applied"}


def difference(store: Store, older: int, newer: int) -> tuple[list[int], list[int]]:
    """Numbers of the requests that are in force in the newer of two versions alone, and in the older alone.

    Raises:
        UserError: when one does not exist.
    """
    for version in (older, newer):
        check_number(store, version)
    before, after = in_force(store, older), in_force(store, newer)
    return sorted(after - before), sorted(before - after)


def rollback(store: Store, version: int) -> tuple[list[int], list[int]]:
    """Make another version the current one; an update that is at work meanwhile will not publish over it.

    Requests that are no longer in force are held back; those that are again, applied. `submit --again` queues the
    former anew.

    Returns:
        numbers of the requests that are in force now and were not before, and the other way round.

    Raises:
        UserError: when there is no such version, or its files were changed.
    """
    check_version(store.folder, version, check_number(store, version))
    with transaction(store.database):
        before = store.current
        was, shall_be = last_changes(store, before), last_changes(store, version)
        for request, change in shall_be.items():
            if change != was.get(request):
                _take_over(store, request, change)
        for request in was.keys() - shall_be.keys():
            reason = f"version {was[request].version} was rolled back"
            store.set_state(request, "held back", only=["applied", "superseded", "retracted"], reason=reason)
        store.set_about("current", version)
        store.note_event("rolled back", version=version, left=before)
    store.point()
    return difference(store, before, version)

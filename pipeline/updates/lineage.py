"""Versions build on one another: how one is published, what is in force where, and going back and forth."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.attribution import GoldenProfile
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.updates.database import transaction
from pipeline.updates.proving import BatchResult, HeldBack
from pipeline.updates.queue import Contradiction, number_of
from pipeline.updates.store import Store
from pipeline.updates.versions import Manifest, check_version, version_folder, write_version


def publish(
    store: Store,
    batch: int,
    parent: int,
    result: BatchResult,
    profile: GoldenProfile | None,
    retracted: Sequence[int] = (),
) -> None:
    """Write a version and make it the current one: files first, then one transaction that moves everything at once.

    Nothing is published when the current version is no longer `parent`: the result is overtaken then, and the batch
    in the queue again.

    Args:
        store: the store.
        batch: the number of the batch that it ends.
        parent: the version that was edited on top of.
        result: what came of the batch; its `version`, `superseded` or `overtaken` are set.
        profile: where it was edited.
        retracted: numbers of requests that go.

    Raises:
        UserError, OSError: when the disk has no room; nothing is published.
    """
    update, number = result.update, store.newest + 1
    assert update
    folder = version_folder(store.folder, number)

    def fill(partial: Path) -> None:
        update.save(partial)
        if profile:
            profile.save(partial)
        write_json(partial / "metrics.json", _metrics(result, len(retracted)))

    manifest = Manifest(version=number, parent=parent, model=update.model, fingerprint=update.fingerprint)
    shutil.rmtree(folder, ignore_errors=True)
    digest = write_version(store.folder, manifest, fill)
    try:
        _make_current(store, manifest, digest, batch, result, retracted)
    finally:
        if store.newest < number:  # an interrupt may fall behind the commit: the database knows
            shutil.rmtree(folder, ignore_errors=True)
    store.point()


def _make_current(
    store: Store, manifest: Manifest, digest: str, batch: int, result: BatchResult, retracted: Sequence[int]
) -> None:
    """In one transaction: the version is the current one, its batch is over, and every request knows."""
    version, parent = manifest.version, manifest.parent
    with transaction(store.database) as database:
        if store.current != parent:
            store.give_back(batch, "another version became current meanwhile")
            result.overtaken = True
            return
        database.execute(
            "INSERT INTO versions (number, parent, made, manifest) VALUES (?, ?, ?, ?)",
            (version, parent, store.clock(), digest),
        )
        result.superseded = [
            pair for request in result.applied for pair in _apply(store, version, number_of(request))
        ]
        for request in retracted:
            _change(store, version, request, "retracted")
        _hold_back(store, result.held)
        store.end_batch(batch, "published", version)
        store.set_about("current", version)
        store.note_event("published", batch=batch, version=version, parent=parent)
    result.version = version


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
    store.set_state(request, what, version=version if what == "applied" else None, successor=successor)


def hold_back(store: Store, batch: int, held: Sequence[HeldBack]) -> None:
    """End a batch of which nothing is published."""
    with transaction(store.database):
        _hold_back(store, held)
        store.end_batch(batch, "held back")


def _hold_back(store: Store, held: Sequence[HeldBack]) -> None:
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


def ancestors(store: Store, version: int) -> list[int]:
    """A version and all that it was made on, itself first, the base last."""
    line: list[int] = []
    number: int | None = version
    while number is not None:
        line.append(number)
        (number,) = store.database.execute("SELECT parent FROM versions WHERE number = ?", (number,)).fetchone()
    return line


def in_force(store: Store, version: int) -> set[int]:
    """Numbers of the requests that a version holds."""
    held: set[int] = set()
    for number in reversed(ancestors(store, version)):
        for request, what, _ in _changes(store, number):
            (held.add if what == "applied" else held.discard)(request)
    return held


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
        change = difference(store, before, version)
        up, down = ancestors(store, before), ancestors(store, version)
        for number in [one for one in up if one not in down]:
            _undo(store, number)
        for number in reversed([one for one in down if one not in up]):
            _redo(store, number)
        store.set_about("current", version)
        store.note_event("rolled back", version=version, left=before)
    store.point()
    return change


def _changes(store: Store, version: int) -> list[tuple[int, str, int | None]]:
    """What a version changed against its parent: requests, what became of them, and what took their place."""
    return store.database.execute(
        "SELECT request, what, successor FROM changes WHERE version = ?", (version,)
    ).fetchall()


def _undo(store: Store, version: int) -> None:
    """Inside a transaction: requests are in the state that they had before a version."""
    for request, what, _ in _changes(store, version):
        if what == "applied":
            reason = f"version {version} was rolled back"
            store.set_state(request, "held back", only=["applied"], reason=reason)
        else:
            (home,) = store.database.execute(
                "SELECT max(version) FROM changes WHERE request = ? AND what = 'applied' AND version < ?",
                (request, version),
            ).fetchone()
            store.set_state(request, "applied", only=["superseded", "retracted"], version=home)


def _redo(store: Store, version: int) -> None:
    """Inside a transaction: requests are in the state that a version gave them."""
    for request, what, successor in _changes(store, version):
        store.set_state(request, what, version=version if what == "applied" else None, successor=successor)

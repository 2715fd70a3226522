"""Publishing: files first, then one transaction that moves `current` and every request's state at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.attribution import GoldenProfile
from pipeline.editing import WeightUpdate
from pipeline.files import write_json
from pipeline.updates.batch import HeldBack
from pipeline.updates.database import transaction
from pipeline.updates.lineage import mark
from pipeline.updates.queue import Contradiction
from pipeline.updates.store import Store
from pipeline.updates.versions import Manifest, version_folder, write_version


class Change(NamedTuple):
    """What a version changes against its parent.

    Attributes:
        applied: numbers of requests that come in force.
        retracted: numbers of requests that go.
    """

    applied: Sequence[int] = ()
    retracted: Sequence[int] = ()


class OvertakenError(Exception):
    """Another version became current while this one was made."""


def publish(
    store: Store,
    batch: int,
    parent: int,
    change: Change,
    held: Sequence[HeldBack],
    update: WeightUpdate,
    profile: GoldenProfile | None,
    metrics: dict[str, Any],
) -> tuple[int, list[Contradiction]]:
    """Write a version and make it the current one.

    Returns:
        its number, and which applied requests gave way.

    Raises:
        OvertakenError: when the current version is no longer `parent`; nothing is published.
        UserError, OSError: when the disk has no room; nothing is published.
    """
    (newest,) = store.database.execute("SELECT max(number) FROM versions").fetchone()
    number = newest + 1

    def fill(folder: Path) -> None:
        update.save(folder)
        if profile:
            profile.save(folder)
        write_json(folder / "metrics.json", metrics)

    manifest = Manifest(version=number, parent=parent, model=update.model, fingerprint=update.fingerprint)
    shutil.rmtree(version_folder(store.folder, number), ignore_errors=True)
    digest = write_version(store.folder, manifest, fill)
    try:
        superseded = _make_current(store, manifest, digest, batch, change, held)
    except BaseException:  # an interrupt may fall behind the commit: the database knows
        if not store.database.execute("SELECT 1 FROM versions WHERE number = ?", (number,)).fetchone():
            shutil.rmtree(version_folder(store.folder, number), ignore_errors=True)
        raise
    store.point()
    return number, superseded


def _make_current(
    store: Store, manifest: Manifest, digest: str, batch: int, change: Change, held: Sequence[HeldBack]
) -> list[Contradiction]:
    """In one transaction: the version is the current one, its batch is over, and every request knows."""
    with transaction(store.database) as database:
        if store.current != manifest.parent:
            raise OvertakenError
        database.execute(
            "INSERT INTO versions (number, parent, made, manifest) VALUES (?, ?, ?, ?)",
            (manifest.version, manifest.parent, store.clock(), digest),
        )
        superseded = _enter(store, manifest.version, change)
        _hold_back(store, batch, held)
        database.execute(
            "UPDATE batches SET outcome = 'published', version = ? WHERE number = ?", (manifest.version, batch)
        )
        store.set_about("current", manifest.version)
        store.tell("published", batch=batch, version=manifest.version, parent=manifest.parent)
    return superseded


def hold_back(store: Store, batch: int, held: Sequence[HeldBack]) -> None:
    """End a batch of which nothing is published."""
    with transaction(store.database) as database:
        _hold_back(store, batch, held)
        database.execute("UPDATE batches SET outcome = 'held back' WHERE number = ?", (batch,))


def _hold_back(store: Store, batch: int, held: Sequence[HeldBack]) -> None:
    for number, reason, figures in held:
        mark(store, number, "held back", "taken", reason=reason, figures=json.dumps(figures))


def _enter(store: Store, version: int, change: Change) -> list[Contradiction]:
    """Give every request the state that the version puts it in; applied ones of the same facts give way."""
    superseded = []
    for request in change.applied:
        older = store.database.execute(
            "SELECT number FROM requests WHERE state = 'applied' AND fact = "
            "(SELECT fact FROM requests WHERE number = ?)",
            (request,),
        ).fetchall()
        for (number,) in older:
            _note(store, version, number, "superseded", successor=request)
            superseded.append(Contradiction(number, request))
        _note(store, version, request, "applied")
    for request in change.retracted:
        _note(store, version, request, "retracted")
    return superseded


def _note(store: Store, version: int, request: int, what: str, successor: int | None = None) -> None:
    store.database.execute(
        "INSERT INTO changes (version, request, what, successor) VALUES (?, ?, ?, ?)",
        (version, request, what, successor),
    )
    mark(store, request, what, version=version if what == "applied" else None, successor=successor)

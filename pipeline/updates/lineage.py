"""Versions build on one another: what is in force where, what differs, and going from one to another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.updates.database import transaction
from pipeline.updates.store import Store
from pipeline.updates.versions import check_version


class Difference(NamedTuple):
    """Numbers of the requests that one version holds and the other does not.

    Attributes:
        gained: in force in the newer alone.
        lost: in force in the older alone.
    """

    gained: list[int]
    lost: list[int]


def check_number(store: Store, version: int) -> str:
    """The SHA-256 of a version's manifest.

    Raises:
        UserError: when there is no such version.
    """
    row = store.database.execute("SELECT manifest FROM versions WHERE number = ?", (version,)).fetchone()
    if row is None:
        (newest,) = store.database.execute("SELECT max(number) FROM versions").fetchone()
        raise UserError(f"version: {version} does not exist; there is 0 (the base model) to {newest}")
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
        rows = store.database.execute("SELECT request, what FROM changes WHERE version = ?", (number,)).fetchall()
        held -= {request for request, what in rows if what != "applied"}
        held |= {request for request, what in rows if what == "applied"}
    return held


def difference(store: Store, older: int, newer: int) -> Difference:
    """What one version holds and another does not.

    Raises:
        UserError: when one does not exist.
    """
    for version in (older, newer):
        check_number(store, version)
    before, after = in_force(store, older), in_force(store, newer)
    return Difference(sorted(after - before), sorted(before - after))


def rollback(store: Store, version: int) -> Difference:
    """Make another version the current one; an update that is at work meanwhile will not publish over it.

    Requests that are no longer in force are held back; those that are again, applied. `submit --again` queues the
    former anew.

    Returns:
        what is in force now and was not before, and the other way round.

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
        store.tell("rolled back", version=version, left=before)
    store.point()
    return change


def _changes(store: Store, version: int) -> Iterator[tuple[int, str, int | None]]:
    yield from store.database.execute(
        "SELECT request, what, successor FROM changes WHERE version = ?", (version,)
    ).fetchall()


def _undo(store: Store, version: int) -> None:
    """Inside a transaction: requests are in the state that they had before a version."""
    for request, what, _ in _changes(store, version):
        if what == "applied":
            mark(store, request, "held back", "applied", reason=f"version {version} was rolled back")
        else:
            (home,) = store.database.execute(
                "SELECT max(version) FROM changes WHERE request = ? AND what = 'applied' AND version < ?",
                (request, version),
            ).fetchone()
            mark(store, request, "applied", "superseded", "retracted", version=home)


def _redo(store: Store, version: int) -> None:
    """Inside a transaction: requests are in the state that a version gave them."""
    for request, what, successor in _changes(store, version):
        if what == "applied":
            mark(store, request, "applied", version=version)
        else:
            mark(store, request, what, successor=successor)


def mark(
    store: Store,
    request: int,
    state: str,
    *only: str,
    version: int | None = None,
    successor: int | None = None,
    reason: str | None = None,
    figures: str | None = None,
) -> None:
    """Inside a transaction: give a request a state and note it, if its state is among `only` (none: any)."""
    where = f" AND state IN ({', '.join('?' * len(only))})" if only else ""
    changed = store.database.execute(
        "UPDATE requests SET state = ?, version = ?, successor = ?, reason = ?, figures = ? WHERE number = ?"
        + where,
        (state, version, successor, reason, figures, request, *only),
    ).rowcount
    if changed:
        store.tell(state, request=request, version=version, by=successor, reason=reason)

"""What was: versions and events, the story of a request, and whether all of it is still as it was written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterator
from typing import Any

from pipeline.editing.learnt import parts
from pipeline.editing.update import UPDATE_FILE, WeightUpdate
from pipeline.errors import UserError
from pipeline.updates.disk import BASE, PRUNED, content_of, damage, digests_of, learnt_file, version_folder
from pipeline.updates.store import CURRENT, Store

NAMED = 5  # requests that a message spells out
WHEN = "datetime({}, 'unixepoch', 'localtime')"  # in the machine's own zone


def find(store: Store, name: str) -> tuple[int, str]:
    """Number and state of a request, by its id, or as #4 by its number; UserError for none, or several."""
    by_number = "number = " + name[1:] if re.fullmatch(r"#[0-9]{1,18}", name) else "FALSE"
    rows = store.database.execute(
        f"SELECT number, state FROM requests WHERE id = ? OR {by_number} ORDER BY number", (name,)
    ).fetchall()
    if not rows:
        meant = f"; the number of one is written '#{name}'" if name.isdecimal() else ""
        raise UserError(f"request: {name!r} does not exist{meant}")
    if len(rows) > 1:
        listed = ", ".join(f"#{row['number']} ({row['state']})" for row in rows[:NAMED])
        raise UserError(f"request: {name!r} names {len(rows)}; name one by its number: {listed}")
    return rows[0]["number"], rows[0]["state"]


def counts(store: Store) -> dict[str, int]:
    """How many requests are in each state."""
    return dict(store.database.execute("SELECT state, count(*) FROM requests GROUP BY state").fetchall())


def versions(store: Store, limit: int) -> list[dict[str, Any]]:
    """The latest versions, newest first."""
    rows = store.database.execute(
        f"SELECT number, parent, {WHEN.format('made')} AS made, held_back, "
        "(SELECT count(*) FROM changes WHERE version = number AND what = 'applied') AS applied, "
        "files = ? AS pruned FROM versions ORDER BY number DESC LIMIT ?",
        (PRUNED, limit),
    )
    return [dict(row) for row in rows]


def request_row(store: Store, number: int) -> dict[str, Any]:
    """All that the database knows of a request; UserError when its text is not what was submitted."""
    row = store.database.execute("SELECT * FROM requests WHERE number = ?", (number,)).fetchone()
    return dict(row) | content_of(row)


def spelt(store: Store, number: int) -> str:
    """A request's number, id, prompt and new answer, as all commands show it."""
    row = request_row(store, number)
    return f"#{number} ({row['id']})  {row['prompt']} -> {row['new_answer']}"


def story(store: Store, number: int) -> list[tuple[str, str]]:
    """When and what happened to a request, from its submission on."""
    submission = "number = (SELECT submission FROM requests WHERE number = ?)"
    return _events(store, f"request = ? OR {submission} ORDER BY number", number, number)


def events(store: Store, limit: int) -> list[tuple[str, str]]:
    """When and what happened of late, newest first: what is not of one request alone."""
    return _events(store, "request IS NULL ORDER BY number DESC LIMIT ?", limit)


def _events(store: Store, which: str, *values: int) -> list[tuple[str, str]]:
    rows = store.database.execute(f"SELECT {WHEN.format('at')}, what FROM events WHERE {which}", values)
    return [tuple(row) for row in rows]


def check_there(store: Store, version: int, pruned: bool = False) -> dict[str, str]:
    """The SHA-256 of a version's files, by name; UserError for no such version, or one that may not be `pruned`."""
    row = store.database.execute("SELECT files FROM versions WHERE number = ?", (version,)).fetchone()
    if row is None:
        raise UserError(f"version: {version} does not exist; there is 0 (the base model) to {store.newest}")
    if row["files"] == PRUNED and not pruned:
        raise UserError(f"version: {version} was pruned: its files are gone; `history` tells which are there")
    return json.loads(row["files"]) or {}


def check_files(store: Store, version: int) -> dict[str, str]:
    """See that a version's files are as written; their SHA-256 by name. UserError names the first that is not."""
    known, folder = check_there(store, version), version_folder(store.folder, version)
    there = digests_of(folder)
    for name in sorted(known.keys() | there.keys()):
        if name not in there:
            raise UserError(f"version: {folder / name}: missing")
        if name not in known:
            raise UserError(f"version: {folder / name}: not of this version")
        if known[name] != there[name]:
            raise UserError(f"version: {folder / name}: changed since it was written (SHA-256 differs)")
    return known


def check_version(store: Store, version: int, sound: Container[str] = ()) -> list[str]:
    """The same of all that a version consists of, be it that others keep it: what was learnt up to it.

    Gives the SHA-256 of what was learnt, but of what is known to be sound.
    """
    check_files(store, version)
    (learnt,) = store.database.execute("SELECT learnt FROM versions WHERE number = ?", (version,)).fetchone()
    return [part.sha256 for part in parts(learnt_file(store.folder, version), learnt, sound)] if learnt else []


def load_version(store: Store, version: int, to_serve: bool = False) -> WeightUpdate | None:
    """A version, checked, as an update, whole or `to_serve`; None for the base. UserError as `check_version`."""
    known = check_files(store, version)
    folder = version_folder(store.folder, version)
    return WeightUpdate.load(folder, to_serve, known[UPDATE_FILE]) if version != BASE else None


def verify(store: Store) -> Iterator[tuple[int, str]]:
    """The number of each version that is there, and what is wrong with its files; empty when nothing is.
    UserError when the database, a request's text or the profile is damaged, or the link `current` is wrong.
    """
    if problem := damage(store.database):
        raise UserError(f"store: {store.folder}: the database is damaged: {problem}")
    target = os.path.realpath(store.folder / CURRENT)  # before what is known, which may grow meanwhile
    rows = store.database.execute("SELECT number FROM versions WHERE files <> ? ORDER BY number", (PRUNED,))
    there = {number: version_folder(store.folder, number) for (number,) in rows}
    if target not in map(os.path.realpath, there.values()) or not (store.folder / CURRENT).is_dir():
        raise UserError(f"store: {store.folder / CURRENT}: leads to no version that is known and there")
    store.check_profile()
    for row in store.database.execute("SELECT * FROM requests"):
        content_of(row)
    sound: set[str] = set()  # files of what was learnt, by their SHA-256: most versions share most of them
    for number in there:
        problem = ""
        try:
            sound.update(check_version(store, number, sound))
            load_version(store, number, to_serve=True)
        except (UserError, OSError) as error:
            problem = str(error)
        yield number, problem

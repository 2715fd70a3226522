"""What was: versions and events, the story of a request, and whether all of it is still as it was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from pipeline.errors import UserError
from pipeline.model import LLM
from pipeline.updates.store import CURRENT, Store
from pipeline.updates.versions import BASE, load_version

NAMED = 5  # requests that a message spells out


def find(store: Store, name: str) -> tuple[int, str]:
    """Number and state of a request, by its number in the store or its own id.

    Raises:
        UserError: when there is none, or several have the id.
    """
    rows = store.database.execute(
        "SELECT number, state FROM requests WHERE number = ?", (int(name) if _is_number(name) else -1,)
    ).fetchall()
    rows = rows or store.database.execute("SELECT number, state FROM requests WHERE id = ?", (name,)).fetchall()
    if not rows:
        raise UserError(f"request: {name!r} does not exist; `history` lists what does")
    if len(rows) > 1:
        listed = ", ".join(f"{row['number']} ({row['state']})" for row in rows[:NAMED])
        raise UserError(f"request: {len(rows)} have the id {name!r}; name one by its number: {listed}")
    return rows[0]["number"], rows[0]["state"]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 19


def counts(store: Store) -> dict[str, int]:
    """How many requests are in each state."""
    return dict(store.database.execute("SELECT state, count(*) FROM requests GROUP BY state").fetchall())


def versions(store: Store, limit: int) -> list[dict[str, Any]]:
    """The latest versions, newest first."""
    rows = store.database.execute(
        "SELECT number, parent, made, (SELECT count(*) FROM changes WHERE version = number AND what = 'applied') "
        "AS applied, (SELECT count(*) FROM requests r JOIN batches b ON r.batch = b.number WHERE b.version = "
        "versions.number AND r.state = 'held back') AS held_back FROM versions ORDER BY number DESC LIMIT ?",
        (limit,),
    )
    return [dict(row) | {"made": day(row["made"])} for row in rows]


def request_row(store: Store, number: int) -> dict[str, Any]:
    """All that the database knows of a request."""
    row = store.database.execute("SELECT * FROM requests WHERE number = ?", (number,)).fetchone()
    return dict(row) | json.loads(row["content"])


def story(store: Store, number: int) -> list[tuple[str, str]]:
    """When and what happened to a request, from its submission on."""
    at, file = store.database.execute(
        "SELECT at, file FROM submissions WHERE number = (SELECT submission FROM requests WHERE number = ?)",
        (number,),
    ).fetchone()
    lines = [(day(at), f"submitted in {file}")]
    for row in store.database.execute("SELECT * FROM events WHERE request = ? ORDER BY number", (number,)):
        detail = json.loads(row["detail"] or "{}")
        words = [row["what"]]
        words += [f"in version {row['version']}"] if row["version"] is not None else []
        words += [f"by request {detail['by']}"] if "by" in detail else []
        words += [f"({detail['reason']})"] if "reason" in detail else []
        lines.append((day(row["at"]), " ".join(words)))
    return lines


def events(store: Store, limit: int) -> list[tuple[str, str]]:
    """When and what happened of late, newest first: what is not of one request alone."""
    rows = store.database.execute(
        "SELECT * FROM events WHERE request IS NULL ORDER BY number DESC LIMIT ?", (limit,)
    )
    lines = []
    for row in rows:
        detail = json.loads(row["detail"] or "{}")
        more = f" ({detail['file']}: {detail['queued']} new)" if row["what"] == "submitted" else ""
        version = f" version {row['version']}" if row["version"] is not None else ""
        lines.append((day(row["at"]), f"{row['what']}{version}{more}"))
    return lines


def day(at: float) -> str:
    """A time in words, in the machine's own zone."""
    return f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"


def verify(store: Store, load: Callable[[str], LLM], model: str | None = None) -> Iterator[tuple[int, str]]:
    """Each version's number, and what is wrong with it; empty when nothing is.

    Raises:
        UserError: when the database is damaged, the link `current` is wrong, or the model is not the store's.
    """
    for pragma in ("integrity_check", "foreign_key_check"):
        rows = store.database.execute(f"PRAGMA {pragma}").fetchall()
        if rows and rows[0][0] != "ok":
            raise UserError(f"store: {store.folder}: the database is damaged: {' '.join(map(str, rows[0]))}")
    if not (store.folder / CURRENT).is_dir():
        raise UserError(f"store: {store.folder / CURRENT}: leads nowhere")
    rows = store.database.execute("SELECT number, manifest FROM versions ORDER BY number").fetchall()
    llm = None
    if len(rows) > 1:
        name = model or store.model
        llm = load(name)
        store.check_fingerprint(name, llm.fingerprint)
    for number, digest in rows:
        yield number, _problem(store, number, digest, llm)


def _problem(store: Store, number: int, digest: str, llm: LLM | None) -> str:
    """What is wrong with a version: with its files, or with applying it."""
    try:
        update = load_version(store.folder, number, digest)
        if number != BASE:
            assert update and llm
            with update.applied(llm):
                pass
    except (UserError, KeyError, RuntimeError, OSError) as error:
        return " ".join(str(error).split())
    return ""

"""What was: versions and events, the story of a request, and how much of what there is."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.updates.store import Store

NAMED = 5  # requests that a message spells out


class Line(NamedTuple):
    """Something that happened: when, what, and to what."""

    at: str
    what: str


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


def story(store: Store, number: int) -> list[Line]:
    """What happened to a request, from its submission on."""
    at, file = store.database.execute(
        "SELECT at, file FROM submissions WHERE number = (SELECT submission FROM requests WHERE number = ?)",
        (number,),
    ).fetchone()
    lines = [Line(day(at), f"submitted in {file}")]
    for row in store.database.execute("SELECT * FROM events WHERE request = ? ORDER BY number", (number,)):
        lines.append(Line(day(row["at"]), _told(row["what"], row["version"], json.loads(row["detail"] or "{}"))))
    return lines


def _told(what: str, version: int | None, detail: dict[str, Any]) -> str:
    words = [what]
    words += [f"in version {version}"] if version is not None else []
    words += [f"by request {detail['by']}"] if "by" in detail else []
    words += [f"({detail['reason']})"] if "reason" in detail else []
    return " ".join(words)


def events(store: Store, limit: int) -> list[Line]:
    """The latest events that are not of one request alone, newest first."""
    rows = store.database.execute(
        "SELECT * FROM events WHERE request IS NULL ORDER BY number DESC LIMIT ?", (limit,)
    )
    lines = []
    for row in rows:
        detail = json.loads(row["detail"] or "{}")
        more = f" ({detail['file']}: {detail['queued']} new)" if row["what"] == "submitted" else ""
        version = f" version {row['version']}" if row["version"] is not None else ""
        lines.append(Line(day(row["at"]), f"{row['what']}{version}{more}"))
    return lines


def day(at: float) -> str:
    """A time in words, in the machine's own zone."""
    return f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"

"""Verifying a store: every file against its SHA-256, every version against its base, the database by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipeline.errors import UserError
from pipeline.model import LLM
from pipeline.updates.store import CURRENT, Store
from pipeline.updates.versions import BASE, load_version


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
    try:
        update = load_version(store.folder, number, digest)
        if number != BASE:
            assert update and llm
            with update.applied(llm):
                pass
    except (UserError, KeyError, RuntimeError, OSError) as error:
        return " ".join(str(error).split())
    return ""

"""The store: a folder with the database, the versions, and `current`, a link to the version in force.

The database is the truth. `current` is a link for whoever only reads: it is set after the database's word, under a
lock and from the database, so that it never names what is not whole and, after a kill, is at most one step behind
until the store is opened next.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import file_digest
from pipeline.shipped import program
from pipeline.updates.database import DATABASE, connect, transaction
from pipeline.updates.locks import LockedError, locked
from pipeline.updates.versions import (
    BASE,
    MANIFEST,
    VERSIONS,
    Manifest,
    remove_unfinished,
    version_folder,
    write_version,
)

CURRENT, OPENING_LOCK, UPDATE_LOCK = "current", "opening.lock", "update.lock"
BUNDLED = "smollm2"


class BusyError(UserError):
    """Another process is at work on the store."""


class Store:
    """A store, opened.

    Args:
        folder: where it is, or will be.
        model: the base model's name; needed where the store is new.
        make: whether it may be made.

    Attributes:
        folder: where it is.
        database: its SQLite database.

    Raises:
        UserError: when there is none, it is no store, of a newer layout, or made for a model of another name.
    """

    def __init__(self, folder: str | Path, model: str | None = None, make: bool = False) -> None:
        self.folder = Path(folder)
        self._check_folder(model if make else None, make)
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / OPENING_LOCK):
            self.database = connect(self.folder / DATABASE)
            if self.about("model") is None:
                self._begin(_lasting(model or ""))
            self._point()

    def _check_folder(self, model: str | None, make: bool) -> None:
        there = self.folder.is_dir() and any(
            path.name not in (OPENING_LOCK, VERSIONS) for path in self.folder.iterdir()
        )
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"store: {self.folder}: a file; expected a store's folder")
        if there and not (self.folder / DATABASE).is_file():
            raise UserError(f"store: {self.folder}: no store: it holds other things, and no {DATABASE}")
        if not there and not make:
            raise UserError(f"store: {self.folder}: no such store; `{program()} submit` makes one")
        if not there and not model:
            raise UserError(f"store: {self.folder}: new; name the model that it is for with --model")

    def _begin(self, model: str) -> None:
        """Make version 0, the base model as it is, and say whose store this is."""
        if not model:
            raise UserError(f"store: {self.folder}: new; name the model that it is for with --model")
        folder = version_folder(self.folder, BASE)
        shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed here
        write_version(self.folder, Manifest(version=BASE, parent=None, model=model, fingerprint=""))
        with transaction(self.database) as database:
            database.executemany(
                "INSERT INTO about VALUES (?, ?)",
                [("model", model), ("fingerprint", ""), ("current", BASE), ("next", 1), ("clock", self.clock())],
            )
            database.execute(
                "INSERT INTO versions (number, made, manifest, shown) VALUES (?, ?, ?, 1)",
                (BASE, time.time(), file_digest(folder / MANIFEST)),
            )

    def close(self) -> None:
        """Let go of the database."""
        self.database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # what it is for

    def about(self, name: str) -> Any:
        """One thing that the store knows of itself."""
        row = self.database.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def set_about(self, name: str, value: Any) -> None:
        """Keep one thing that the store knows of itself, inside a transaction or by itself."""
        with nullcontext() if self.database.in_transaction else transaction(self.database):
            self.database.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, value))

    @property
    def model(self) -> str:
        """The base model's name."""
        return str(self.about("model"))

    def check_model(self, name: str | None) -> None:
        """Raise UserError when a model of this name is not the store's."""
        if name is not None and _lasting(name) != self.model:
            raise UserError(f"store: {self.folder}: made for model {self.model!r}, not for {name!r}")

    def check_fingerprint(self, name: str, fingerprint: str) -> None:
        """Raise UserError when a loaded model is not the store's; the first one loaded becomes it."""
        known = self.about("fingerprint")
        if not known:
            self.check_model(name)
            self.set_about("fingerprint", fingerprint)
        elif known != fingerprint:
            raise UserError(
                f"store: {self.folder}: made for model {self.model!r} ({known}), not for {name!r} ({fingerprint})"
            )

    # the version in force

    @property
    def current(self) -> int:
        """The number of the version in force; 0 is the base model."""
        return int(self.about("current"))

    def point(self) -> None:
        """Set the link `current` to the version in force."""
        with locked(self.folder / OPENING_LOCK):
            self._point()

    def _point(self) -> None:
        link, target = self.folder / CURRENT, Path(VERSIONS) / f"{self.current:04d}"
        if link.is_symlink() and link.readlink() == target:
            return
        partial = self.folder / f".{CURRENT}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(target, target_is_directory=True)
        partial.replace(link)

    # one update at a time

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Be the one that makes versions; what a dead update left is put right first.

        Raises:
            BusyError: when another process is that one.
        """
        try:
            with locked(self.folder / UPDATE_LOCK, wait=False):
                self._recover()
                yield
        except LockedError:
            raise BusyError(f"store: {self.folder}: another update is at work on it") from None

    def _recover(self) -> None:
        """Requests that a dead update had taken go back to the queue; what it had half written goes."""
        with transaction(self.database) as database:
            dead = [row[0] for row in database.execute("SELECT number FROM batches WHERE outcome = 'open'")]
            for batch in dead:
                self.give_back(batch, "the update ended before it was done")
        (newest,) = self.database.execute("SELECT max(number) FROM versions").fetchone()
        remove_unfinished(self.folder, newest)
        self.point()

    def give_back(self, batch: int, why: str) -> None:
        """Inside a transaction: what a batch had taken and not finished is in the queue again, where it was."""
        rows = self.database.execute(
            "UPDATE requests SET state = 'queued', batch = NULL WHERE batch = ? AND state = 'taken' "
            "RETURNING number",
            (batch,),
        ).fetchall()
        for (number,) in rows:
            self.tell("given back", request=number, batch=batch, reason=why)
        self.database.execute(  # an interrupt may fall behind what ended it: then it stays as it ended
            "UPDATE batches SET outcome = 'given back' WHERE number = ? AND outcome = 'open'", (batch,)
        )

    # time and events

    def clock(self) -> float:
        """Seconds since 1970, never less than what was told before, even when the machine's clock goes back."""
        return max(time.time(), float(self.about("clock") or 0))

    def behind(self) -> float:
        """Seconds that the machine's clock is behind the store's."""
        return max(0.0, float(self.about("clock") or 0) - time.time())

    def tell(
        self,
        what: str,
        request: int | None = None,
        batch: int | None = None,
        version: int | None = None,
        **detail: str | int | None,
    ) -> None:
        """Inside a transaction: note what happened, for `history`; details that are None are left out."""
        told = {name: value for name, value in detail.items() if value is not None}
        at = self.clock()
        self.database.execute(
            "INSERT INTO events (at, what, request, batch, version, detail) VALUES (?, ?, ?, ?, ?, ?)",
            (at, what, request, batch, version, json.dumps(told, ensure_ascii=False) if told else None),
        )
        self.set_about("clock", at)


def _lasting(name: str) -> str:
    """A model's name that means the same from any working folder."""
    return str(Path(name).resolve()) if name != BUNDLED and name and Path(name).exists() else name

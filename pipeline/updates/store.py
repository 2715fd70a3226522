"""The store: a folder with the database, the versions, and `current`, a link to the version in force.

The database is the truth. `current` is a link for whoever only reads: it is set after the database's word, under a
lock and from the database, so that it never names what is not whole and, after a kill, is at most one step behind
until the store is opened next.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import Timeout

from pipeline.attribution.profile import PROFILE_FILE
from pipeline.errors import UserError, note
from pipeline.files import file_digest
from pipeline.options.shared import BUNDLED
from pipeline.shipped import program
from pipeline.updates.disk import (
    BASE,
    DATABASE,
    LOST,
    PRUNED,
    VERSIONS,
    access,
    clear_learnt,
    clear_unknown,
    connect,
    damage,
    locked,
    transaction,
    version_folder,
)

CURRENT, OPENING_LOCK, UPDATE_LOCK = "current", "opening.lock", "update.lock"


class BusyError(UserError):
    """Another process is at work on the store."""


class Store(AbstractContextManager["Store"]):
    """A store, opened; where it is new, it is made if `make` says so, for the base model that is named.

    Opened for `reading` nothing of it is written, nor locked. Notes say what is found and mended.
    UserError when there is none, it is no store, of another layout, or new and no model is named.
    """

    def __init__(
        self, folder: str | Path, model: str | None = None, make: bool = False, reading: bool = False
    ) -> None:
        self.folder, self.reading = Path(folder), reading
        self._check_folder(make, model)
        with ExitStack() as failing:
            with nullcontext() if reading else self._pointing():
                if not (self.folder / DATABASE).exists():
                    (self.folder / DATABASE).touch(mode=access(self.folder) & 0o666)  # its log's will be the same
                self.database = connect(self.folder / DATABASE, reading)
                failing.push(self)
                known = self.about("model")
                self._check_named(known or (None if reading else model))
                if known is None:
                    self._begin(model or "")
            failing.pop_all()

    def _check_folder(self, make: bool, model: str | None) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"store: {self.folder}: a file; expected a store's folder")
        if (self.folder / DATABASE).is_file():
            return
        if self.folder.exists() and {path.name for path in self.folder.iterdir()} - {OPENING_LOCK, VERSIONS}:
            raise UserError(f"store: {self.folder}: no store: it holds other things, and no {DATABASE}")
        if not make:
            raise UserError(f"store: {self.folder}: no such store; `{program()} submit` makes one")
        self._check_named(model)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # its owner's alone

    def _check_named(self, model: str | None) -> None:
        if not model:
            raise UserError(f"store: {self.folder}: new; name the model that it is for")

    def _begin(self, name: str) -> None:
        """Make version 0, the base model as it is, and say whose store this is."""
        version_folder(self.folder, BASE).mkdir(parents=True, exist_ok=True)
        with transaction(self.database) as database:
            about = {"model": _absolute(name), "fingerprint": "", "current": BASE, "next": 1}
            database.executemany("INSERT INTO about VALUES (?, ?)", about.items())
            database.execute(
                "INSERT INTO versions (number, made, files, shown) VALUES (?, ?, '{}', 1)", (BASE, time.time())
            )

    def close(self) -> None:
        """Let go of the database."""
        self.database.close()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close; UserError in place of an error that comes of a damaged database."""
        try:
            known = (UserError, OSError, sqlite3.OperationalError)
            if isinstance(error, Exception) and not isinstance(error, known) and (wrong := damage(self.database)):
                raise UserError(f"store: {self.folder}: the database is damaged: {wrong}") from error
        finally:
            self.close()

    def about(self, name: str) -> Any:
        """One thing that the store knows of itself."""
        row = self.database.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def set_about(self, name: str, value: Any) -> None:
        """Keep one thing that the store knows of itself, inside a transaction."""
        self.database.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, value))

    @property
    def model(self) -> str:
        """The base model's name."""
        return str(self.about("model"))

    def check_model(self, name: str | None) -> None:
        """Raise UserError when a model of this name is not the store's."""
        if name is not None and _absolute(name) != self.model:
            raise UserError(f"store: {self.folder}: made for model {self.model!r}, not for {name!r}")

    def base_name(self, name: str | None) -> str:
        """The base model's name, the store's or another; UserError where it cannot be the store's."""
        if not self.about("fingerprint"):
            self.check_model(name)
        return name or self.model

    def check_base(self, name: str, fingerprint: str) -> None:
        """Keep the base model's fingerprint, once it is loaded first; UserError when it is not the store's."""
        known = self.about("fingerprint")
        if not known and not self.reading:
            with transaction(self.database):
                self.set_about("fingerprint", fingerprint)
        elif known and known != fingerprint:
            raise UserError(f"store: {self.folder}: made for model {self.model!r} ({known}), not for {name!r}")

    @property
    def current(self) -> int:
        """The number of the version in force; 0 is the base model."""
        return int(self.about("current"))

    @property
    def newest(self) -> int:
        """The number of the version that was made last."""
        return int(self.database.execute("SELECT max(number) FROM versions").fetchone()[0])

    def point(self) -> None:
        """Set the links: `current` to the version in force, and the profile, for later batches, to the newest's."""
        with self._pointing():
            pass

    @contextmanager
    def _pointing(self) -> Iterator[None]:
        """Be the only one that opens the store to write or sets its links, which are set behind the `with`."""
        with locked(self.folder / OPENING_LOCK):
            yield
            self._link(self.folder / CURRENT, Path(VERSIONS) / f"{self.current:04d}")
            newest, profile = Path(VERSIONS) / f"{self.newest:04d}" / PROFILE_FILE, self.folder / PROFILE_FILE
            if not (self.folder / newest).is_file():
                return
            own = profile.is_file() and not profile.is_symlink()
            if not own or file_digest(profile) == file_digest(self.folder / newest):
                self._link(profile, newest)

    def _link(self, link: Path, target: Path) -> None:
        if link.is_symlink() and link.readlink() == target:
            return
        partial = self.folder / f".{link.name}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(target)
        partial.replace(link)

    def check_profile(self) -> Path | None:
        """Where the profile is that the next batch is edited by, if any; UserError when it is not the newest's."""
        newest, file = self.newest, self.folder / PROFILE_FILE
        row = self.database.execute("SELECT files FROM versions WHERE number = ?", (newest,)).fetchone()
        known, kept = json.loads(row["files"]).get(PROFILE_FILE), version_folder(self.folder, newest) / PROFILE_FILE
        is_known = [one.is_file() and file_digest(one) == known for one in (file, kept)]
        if known and not is_known[0]:
            way = f"remove it, and {kept} is used" if is_known[1] else "`update --profile` takes another"
            raise UserError(f"store: {file}: changed (SHA-256 differs); {way}")
        return self.folder if file.is_file() else None

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Be the one that makes versions; a dead one's work is given back. BusyError when another is that one."""
        try:
            held = locked(self.folder / UPDATE_LOCK, wait=False)
        except Timeout:
            raise BusyError(f"store: {self.folder}: another update is at work on it") from None
        with held:
            with transaction(self.database):
                self.give_back("the update ended before it was done")
            self.clear()
            self.point()
            yield

    def clear(self) -> None:
        """Remove what is pruned or half written, and keep aside, and tell, what is whole and unknown.

        What a pruned version learnt stays as long as one that is there goes on from it.
        """
        rows = self.database.execute("SELECT number, files = ? FROM versions", (PRUNED,)).fetchall()
        known, pruned = ({number for number, gone in rows if bool(gone) == side} for side in (False, True))
        needed = self.database.execute(
            "WITH RECURSIVE line(number) AS (SELECT number FROM versions WHERE files <> ? "
            "UNION SELECT after FROM versions JOIN line USING (number)) SELECT number FROM line",
            (PRUNED,),
        )
        clear_learnt(self.folder, pruned - {number for (number,) in needed})
        for name in clear_unknown(self.folder, known, pruned):
            told = f"version {name} is whole, but {DATABASE} does not know it: moved to {LOST}/{name}"
            with transaction(self.database):
                self.note(told)
            note(f"{self.folder}: {told}")

    # inside a transaction

    def give_back(self, reason: str) -> None:
        """What an update had taken and not finished is in the queue again, where it was."""
        for (number,) in self.database.execute("SELECT number FROM requests WHERE state = 'taken'").fetchall():
            self.set_state(number, "queued", f"given back ({reason})")

    def set_state(self, request: int, state: str, told: str | None = None) -> None:
        """Give a request a state, and note that for `history`, in other words where they are given."""
        self.database.execute("UPDATE requests SET state = ? WHERE number = ?", (state, request))
        self.note(told or state, request)

    def note(self, what: str, request: int | None = None) -> int:
        """Note what happened, to a request or to the store, for `history`; returns the event's number."""
        made = self.database.execute(
            "INSERT INTO events (at, what, request) VALUES (?, ?, ?)", (self.clock(), what, request)
        )
        return int(made.lastrowid or 0)

    def clock(self) -> float:
        """Seconds since 1970, never less than at the last event, even when the machine's clock goes back."""
        last = self.database.execute("SELECT at FROM events ORDER BY number DESC LIMIT 1").fetchone()
        return max(time.time(), last[0] if last else 0.0)


def _absolute(name: str) -> str:
    """A model's name that means the same from any working folder."""
    return str(Path(name).resolve()) if name != BUNDLED and name and Path(name).exists() else name

"""The store: a folder with the database, the versions, and `current`, a link to the version in force.

The database is the truth. `current` is a link for whoever only reads: it is set after the database's word, under a
lock and from the database, so that it never names what is not whole and, after a kill, is at most one step behind
until the store is opened next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import UserError
from pipeline.model.llm import LLM
from pipeline.shipped import program
from pipeline.updates.disk import BASE, DATABASE, VERSIONS, connect, remove_unfinished, transaction, version_folder

CURRENT, OPENING_LOCK, UPDATE_LOCK = "current", "opening.lock", "update.lock"
BUNDLED = "smollm2"


class BusyError(UserError):
    """Another process is at work on the store."""


class Store(AbstractContextManager["Store"]):
    """A store, opened; where it is new, it is made if `make` says so, for the base model that is named.

    UserError when there is none, it is no store, of another layout, or new and no model is named.
    """

    def __init__(self, folder: str | Path, model: str | None = None, make: bool = False) -> None:
        self.folder = Path(folder)
        self._check_folder(make, model)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.opening = FileLock(self.folder / OPENING_LOCK)
        with self.opening:
            self.database = connect(self.folder / DATABASE)
            if self.about("model") is None:
                self._begin(model)
            self.point()

    def _check_folder(self, make: bool, model: str | None) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"store: {self.folder}: a file; expected a store's folder")
        if (self.folder / DATABASE).is_file():
            return
        if self.folder.exists() and {path.name for path in self.folder.iterdir()} - {OPENING_LOCK, VERSIONS}:
            raise UserError(f"store: {self.folder}: no store: it holds other things, and no {DATABASE}")
        if not make:
            raise UserError(f"store: {self.folder}: no such store; `{program()} submit` makes one")
        if not model:
            raise UserError(f"store: {self.folder}: new; name the model that it is for with --model")

    def _begin(self, name: str | None) -> None:
        """Make version 0, the base model as it is, and say whose store this is."""
        version_folder(self.folder, BASE).mkdir(parents=True, exist_ok=True)
        with transaction(self.database) as database:
            about = {"model": _absolute(name or ""), "fingerprint": "", "current": BASE, "next": 1}
            database.executemany("INSERT INTO about VALUES (?, ?)", about.items())
            database.execute(
                "INSERT INTO versions (number, made, files, shown) VALUES (?, ?, '{}', 1)", (BASE, time.time())
            )

    def close(self) -> None:
        """Let go of the database."""
        self.database.close()

    def __exit__(self, *_: object) -> None:
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

    def load_base(self, load: Callable[[str], LLM], name: str | None = None) -> LLM:
        """Load the base model, by the store's name for it or another; UserError when it is not the store's."""
        name, known = name or self.model, self.about("fingerprint")  # which the first one loaded gives the store
        if not known:
            self.check_model(name)
        llm = load(name)
        if not known:
            with transaction(self.database):
                self.set_about("fingerprint", llm.fingerprint)
        elif known != llm.fingerprint:
            raise UserError(f"store: {self.folder}: made for model {self.model!r} ({known}), not for {name!r}")
        return llm

    @property
    def current(self) -> int:
        """The number of the version in force; 0 is the base model."""
        return int(self.about("current"))

    @property
    def newest(self) -> int:
        """The number of the version that was made last."""
        return int(self.database.execute("SELECT max(number) FROM versions").fetchone()[0])

    def point(self) -> None:
        """Set the link `current` to the version in force."""
        with self.opening:
            link, target = self.folder / CURRENT, Path(VERSIONS) / f"{self.current:04d}"
            if link.is_symlink() and link.readlink() == target:
                return
            partial = self.folder / f".{CURRENT}.partial"
            partial.unlink(missing_ok=True)
            partial.symlink_to(target, target_is_directory=True)
            partial.replace(link)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Be the one that makes versions; what a dead update had taken is queued, what it half wrote is removed.

        BusyError when another process is that one.
        """
        try:
            held = FileLock(self.folder / UPDATE_LOCK).acquire(blocking=False)
        except Timeout:
            raise BusyError(f"store: {self.folder}: another update is at work on it") from None
        with held:
            with transaction(self.database):
                self.give_back("the update ended before it was done")
            remove_unfinished(self.folder, self.newest)
            self.point()
            yield

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

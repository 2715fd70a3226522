"""A store on disk: its SQLite database, and a folder for each version, written whole or not at all.

    versions/0004/  update.safetensors  update.json  state.safetensors  golden_profile.json  metrics.json

`update.*` are a WeightUpdate's files: the base model and one read give the version, whatever went before it.
Version 0, the base model, is an empty folder. The database logs ahead, so that submitters, servers and an update
get along; every commit reaches the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import file_digest

BASE = 0
VERSIONS, METRICS = "versions", "metrics.json"

DATABASE = "store.db"
APPLICATION = 0x474C5550  # "GLUP" in the file's header: a store of golden layers' updates
PATIENCE = 120  # seconds that a writer waits for another

LAYOUT = 2  # of the tables below
SCHEMA = """
    CREATE TABLE about (name TEXT PRIMARY KEY, value) WITHOUT ROWID;

    CREATE TABLE versions (
        number INTEGER PRIMARY KEY,
        parent INTEGER REFERENCES versions,
        made REAL NOT NULL,
        files TEXT NOT NULL,                 -- JSON: the SHA-256 of each of its files, by name
        held_back INTEGER NOT NULL DEFAULT 0,
        shown INTEGER NOT NULL DEFAULT 0     -- whether TensorBoard has it
    );

    CREATE TABLE requests (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL,
        source TEXT,
        content TEXT NOT NULL,               -- JSON, as in our JSONL, without id and source
        digest BLOB NOT NULL UNIQUE,         -- of the content
        fact INTEGER NOT NULL,               -- what it is about: subject and prompt
        submission INTEGER NOT NULL REFERENCES events,
        not_before REAL NOT NULL DEFAULT 0,
        effective REAL NOT NULL,             -- from when it counts: of requests about one fact the newest wins,
        position INTEGER NOT NULL,           -- by these two; positions never go back, whatever the clock does
        state TEXT NOT NULL DEFAULT 'queued'
            CHECK (state IN ('queued', 'taken', 'applied', 'held back', 'superseded', 'retracted'))
    );
    CREATE INDEX requests_due ON requests (state, not_before, position);
    CREATE INDEX requests_fact ON requests (fact, state);

    CREATE TABLE changes (                   -- what a version changed against its parent
        version INTEGER NOT NULL REFERENCES versions,
        request INTEGER NOT NULL REFERENCES requests,
        what TEXT NOT NULL CHECK (what IN ('applied', 'superseded', 'retracted')),
        successor INTEGER REFERENCES requests,
        PRIMARY KEY (version, request)
    ) WITHOUT ROWID;

    CREATE TABLE events (
        number INTEGER PRIMARY KEY,
        at REAL NOT NULL,
        what TEXT NOT NULL,
        request INTEGER REFERENCES requests
    );
    CREATE INDEX events_request ON events (request);
"""


def connect(file: Path) -> sqlite3.Connection:
    """Open the database; its tables are made where it is new.

    UserError when the file is no store's database, damaged, or of another layout than this program's.
    """
    try:
        database = sqlite3.connect(file, timeout=PATIENCE, isolation_level=None)
        database.row_factory = sqlite3.Row
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "cache_size = -200000"):
            database.execute(f"PRAGMA {pragma}")
        application, layout, tables = database.execute(
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master) "
            "FROM pragma_application_id, pragma_user_version"
        ).fetchone()
        if not (application or layout or tables):
            header = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {LAYOUT};"
            database.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {header} COMMIT;")
        elif application != APPLICATION:
            raise UserError(f"store: {file}: a database of another program")
        elif layout != LAYOUT:
            raise UserError(f"store: {file}: of layout {layout}; this program knows layout {LAYOUT}")
    except sqlite3.DatabaseError as error:
        raise UserError(f"store: {file}: cannot be read as a store's database ({error})") from None
    return database


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All inside the `with` is written, or nothing; other writers wait from its start.

    UserError when the disk is full, or another writer takes longer than `PATIENCE`.
    """
    try:
        database.execute("BEGIN IMMEDIATE")
        yield database
        database.execute("COMMIT")
    except BaseException as error:
        if database.in_transaction:  # a full disk has ended it already
            database.execute("ROLLBACK")
        if isinstance(error, sqlite3.OperationalError):
            room = "; is there room on the disk?" if "disk" in str(error) else ""
            raise UserError(f"store: {DATABASE}: {error}{room}") from error
        raise


def version_folder(store: Path, number: int) -> Path:
    """The folder of a version."""
    return store / VERSIONS / f"{number:04d}"


def write_version(store: Path, number: int, fill: Callable[[Path], Any]) -> dict[str, str]:
    """Let `fill` write a version's folder, whole or not at all; returns its files' SHA-256 by name."""
    folder = version_folder(store, number)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        digests = digests_of(partial)
        for path in [*partial.rglob("*"), partial]:
            _to_disk(path)
        partial.rename(folder)
        _to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return digests


def digests_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of all files in a folder, however deep, by name."""
    paths = [path for path in folder.rglob("*") if not path.is_dir()]
    return {str(path.relative_to(folder)): file_digest(path) for path in paths}


def _to_disk(path: Path) -> None:
    """Wait until a file's or folder's content has reached the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_unfinished(store: Path, newest: int) -> None:
    """Remove folders that no version is known for: what an update that did not end well was writing."""
    for path in (store / VERSIONS).iterdir():
        if path.name.endswith(".partial") or (path.name.isdecimal() and int(path.name) > newest):
            shutil.rmtree(path, ignore_errors=True)


def read_metrics(store: Path, number: int) -> dict[str, Any]:
    """A version's figures; UserError when they are missing or cannot be read."""
    file = version_folder(store, number) / METRICS
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"version: {file}: cannot be read ({error})") from None

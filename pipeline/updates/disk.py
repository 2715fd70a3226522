"""A store on disk: its SQLite database, and a folder for each version, written whole or not at all.

    versions/0004/  update.safetensors  update.json  state.safetensors  golden_profile.json  metrics.json
    learnt/0004.safetensors

`update.*` are a WeightUpdate's files: the base model and one read give the version, whatever went before it. What a
later update goes on from is gathered from `learnt/`, where each version keeps what it alone learnt. Version 0, the
base model, is an empty folder. The database logs ahead, so that submitters, servers and an update get along; every
commit reaches the disk. A new store is its owner's alone; what is added to it later can be read by whoever its
folder lets in.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.editing.learnt import Part
from pipeline.editing.tensors import write_tensors
from pipeline.editing.update import UPDATE_FILE
from pipeline.errors import UserError
from pipeline.files import file_digest

BASE = 0
VERSIONS, METRICS, LOST = "versions", "metrics.json", "lost+found"
LEARNT = "learnt"  # the folder of what versions learnt

DATABASE = "store.db"
APPLICATION = 0x474C5550  # "GLUP" in the file's header: a store of golden layers' updates
PATIENCE = 120  # seconds that a writer waits for another

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what a disk says that cannot lock files

PRUNED = "null"  # in place of a version's `files`
LAYOUT = 4  # of the tables below, to the letter, and of files
SCHEMA = """
    -- indexes named `copy` hold what no other has a second copy of, for SQLite's own check
    CREATE TABLE about (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
    CREATE INDEX about_copy ON about (value);

    CREATE TABLE versions (
        number INTEGER PRIMARY KEY,
        parent INTEGER REFERENCES versions,
        learnt TEXT,                         -- the SHA-256 of its file below `learnt`, and the version whose file
        after INTEGER REFERENCES versions,   -- there it goes on from
        made REAL NOT NULL,
        files TEXT NOT NULL,                 -- JSON: the SHA-256 of each of its files, by name
        held_back INTEGER NOT NULL DEFAULT 0,
        shown INTEGER NOT NULL DEFAULT 0     -- whether TensorBoard has it
    );
    CREATE INDEX versions_copy ON versions (parent, learnt, after, made, files, held_back, shown);

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
    CREATE INDEX requests_copy ON requests (id, source, effective, submission);

    CREATE TABLE changes (                   -- what a version changed against its parent
        version INTEGER NOT NULL REFERENCES versions,
        request INTEGER NOT NULL REFERENCES requests,
        what TEXT NOT NULL CHECK (what IN ('applied', 'superseded', 'retracted')),
        successor INTEGER REFERENCES requests,
        PRIMARY KEY (version, request)
    ) WITHOUT ROWID;
    CREATE INDEX changes_copy ON changes (what, successor);

    CREATE TABLE events (
        number INTEGER PRIMARY KEY,
        at REAL NOT NULL,
        what TEXT NOT NULL,
        request INTEGER REFERENCES requests
    );
    CREATE INDEX events_copy ON events (request, number, at, what);
"""

TABLES = "SELECT type, name, sql FROM sqlite_master WHERE sql NOT NULL"


def connect(file: Path, reading: bool = False) -> sqlite3.Connection:
    """Open a database, made where it is new; UserError for no store's, a damaged one, or another layout's."""
    try:
        with ExitStack() as unfit:
            database = unfit.enter_context(closing(_open(file, "ro" if reading else "rwc")))
            _prepare(database, file, reading)
            unfit.pop_all()
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # SQLite quotes what is damaged
        raise UserError(f"store: {file}: cannot be read as a store's database ({error})") from None
    return database


def _prepare(database: sqlite3.Connection, file: Path, reading: bool) -> None:
    """Set it up as a store's, and see that it is one."""
    for pragma in ("synchronous = FULL", "foreign_keys = ON", "cache_size = -200000"):
        database.execute(f"PRAGMA {pragma}")
    if not reading:
        database.execute("PRAGMA journal_mode = WAL")
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


def damage(database: sqlite3.Connection) -> str:
    """What is wrong with a database; empty when nothing is found."""
    try:
        found = [problem for (problem,) in database.execute("PRAGMA integrity_check") if problem != "ok"]
        found += [f"{row[0]} names a {row[2]} that is none" for row in database.execute("PRAGMA foreign_key_check")]
        with closing(sqlite3.connect(":memory:")) as new:
            new.executescript(SCHEMA)
            known, here = ({*map(tuple, one.execute(TABLES))} for one in (new, database))
            found += [f"its tables are not those of layout {LAYOUT}"] if known != here else []
        return str(found[0]) if found else ""
    except Exception as error:  # of whatever kind: it is the damage
        return f"{type(error).__name__}: {error}"


def _open(file: Path, mode: str) -> sqlite3.Connection:
    """A connection; on a disk that cannot be written the database is all there is, unless a writer left its log."""
    database = sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", PATIENCE, isolation_level=None, uri=True)
    database.row_factory = sqlite3.Row
    database.text_factory = lambda raw: raw.decode(errors="replace")  # what is damaged, its digest tells
    try:
        database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        log = file.with_name(f"{file.name}-wal")
        if mode != "ro" or (log.exists() and log.stat().st_size):
            raise
        database.close()
        return _open(file, "ro&immutable=1")
    return database


def locked(file: Path, wait: bool = True) -> AbstractContextManager[Any]:
    """A lock until a `with` ends; filelock.Timeout where one is not to wait, UserError where the disk has none."""
    try:
        return FileLock(file, mode=access(file.parent) & 0o666, blocking=wait, fallback_to_soft=False).acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        reason = f"this disk cannot lock files ({error.strerror})"
        raise UserError(f"store: {file}: {reason}; keep the store on one that can") from None


def access(folder: Path) -> int:
    """Who may do what with a folder, as `chmod` counts it."""
    return folder.stat().st_mode & 0o777


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All inside is written, or nothing; UserError for a full disk, or another writer that takes `PATIENCE`."""
    try:
        database.execute("BEGIN IMMEDIATE")
        yield database
        database.execute("COMMIT")
    except BaseException as error:
        if database.in_transaction:  # a full disk has ended it already
            database.execute("ROLLBACK")
        if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:  # no fault of ours
            room = "; is there room on the disk?" if "disk" in str(error) else ""
            raise UserError(f"store: {DATABASE}: {error}{room}") from error
        raise


def version_folder(store: Path, number: int) -> Path:
    """The folder of a version."""
    return store / VERSIONS / f"{number:04d}"


def write_version(
    store: Path, number: int, part: Part, fill: Callable[[Path, tuple[str, str]], Any]
) -> tuple[dict[str, str], str]:
    """Let `fill` write a version's folder, whole or not at all, after the file of what it learnt, which it is told.

    Returns its files' SHA-256 by name, and that of the file.
    """
    file, folder = learnt_file(store, number), version_folder(store, number)
    file.parent.mkdir(mode=access(store), exist_ok=True)
    learnt = write_tensors(file, part.columns, part.about.model_dump_json())
    _settle(store, file)
    _to_disk(file.parent)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial, (file.name, learnt))
        digests = digests_of(partial)
        for path in [*partial.rglob("*"), partial]:
            _settle(store, path)
        partial.rename(folder)
        _to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return digests, learnt


def remove_version(store: Path, number: int) -> None:
    """Remove what `write_version` wrote."""
    shutil.rmtree(version_folder(store, number))
    learnt_file(store, number).unlink()


def learnt_file(store: Path, number: int) -> Path:
    """The file of what a version learnt."""
    return store / LEARNT / f"{number:04d}.safetensors"


def digests_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of all files in a folder, however deep, by name; of what is no file, none."""
    paths = [path for path in folder.rglob("*") if not path.is_dir()]
    return {str(path.relative_to(folder)): file_digest(path) if path.is_file() else "" for path in paths}


def _settle(store: Path, path: Path) -> None:
    """Let those read a new file or folder who may read the store; its content has reached the disk then."""
    path.chmod(access(store) & (0o777 if path.is_dir() else 0o666))
    _to_disk(path)


def _to_disk(path: Path) -> None:
    """Wait until a file's or folder's content has reached the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def clear_unknown(store: Path, known: Collection[int], pruned: Collection[int]) -> list[str]:
    """Remove what was pruned or half written; what is whole and unknown goes to `lost+found`, and is named."""
    lost = []
    for path in sorted((store / VERSIONS).iterdir()):
        number = int(path.name) if path.name.isdecimal() else None
        if number in known or not (number is not None or path.name.endswith(".partial")):
            continue
        if number in pruned or not (path / UPDATE_FILE).is_file() or number is None:
            shutil.rmtree(path, ignore_errors=True)
        else:
            (store / LOST).mkdir(mode=access(store), exist_ok=True)
            path.rename(store / LOST / path.name)  # the number is not given again
            lost.append(path.name)
    return lost


def clear_learnt(store: Path, gone: Collection[int]) -> None:
    """Remove what these versions learnt, and what was half written."""
    for path in (store / LEARNT).glob("*"):
        if path.suffix == ".partial" or (path.stem.isdecimal() and int(path.stem) in gone):
            path.unlink(missing_ok=True)


def last_lost(store: Path) -> int:
    """The highest number of a version in `lost+found`; 0 where none is."""
    return max((int(path.name) for path in (store / LOST).glob("[0-9]*") if path.name.isdecimal()), default=BASE)


def content_digest(content: str) -> bytes:
    """What a request is known by: the digest of its content."""
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def content_of(row: sqlite3.Row) -> dict[str, Any]:
    """What a request's row holds; UserError when it is not what was submitted."""
    if content_digest(str(row["content"])) != row["digest"]:
        raise UserError(
            f"request: #{row['number']}: changed in {DATABASE} since it was submitted (its digest differs); "
            "submit it again, which mends it"
        )
    return dict(json.loads(row["content"]))


def read_metrics(store: Path, number: int) -> dict[str, Any]:
    """A version's figures; UserError when they are missing or cannot be read."""
    file = version_folder(store, number) / METRICS
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"version: {file}: cannot be read ({error})") from None

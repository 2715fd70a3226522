"""The records of a source of requests, one after another, whatever kind of source it is."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import UserError
from pipeline.requests.csv_records import SUFFIXES, row_records
from pipeline.requests.layouts import without_empty

DEMO_REQUESTS = Path(__file__).with_name("demo.jsonl")
PREFIX = "hf:"  # of a Hugging Face data set: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`
GZIP = b"\x1f\x8b"


def raw_records(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Each record's place in its source and what it holds, read as it is asked for; of a JSON list, all at once.

    A record that is broken, where those after it can be read, is the UserError that says what is wrong with it.

    Raises:
        UserError: when there is no such source, or it is broken where the next record would begin.
    """
    if str(source).startswith(PREFIX):
        yield from _hub_records(str(source))
        return
    path = DEMO_REQUESTS if str(source) == "demo" else Path(source)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"requests: {path}: {found}; expected a JSON, JSONL or CSV file, `hf:NAME`, or `demo`")
    place = "its beginning"
    try:
        for place, record in _file_records(path):
            yield place, record
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: gzip data is cut short or damaged after {place}") from None


def _file_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a file: told by its name where it is a table, else by its first character."""
    with _opened(path) as file:
        if path.name.lower().removesuffix(".gz").endswith(SUFFIXES):
            yield from row_records(file)
            return
        characters = iter(lambda: file.read(1), "")
        first = next(filter(str.strip, characters), "")
        file.seek(0)
        yield from _list_records(file) if first == "[" else _line_records(file)


def _line_records(lines: TextIO) -> Iterator[tuple[str, Any]]:
    """The records of a JSONL file; blank lines are none."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            record = _why(line, error)
        yield f"line {number}", record


def _list_records(file: TextIO) -> Iterator[tuple[str, Any]]:
    """The records of a JSON file that holds one list."""
    text = file.read()
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"line {getattr(error, 'lineno', 1)}: {_why(text, error)}") from None
    for number, record in enumerate(records):
        yield f"record {number}", record


def _why(text: str, error: Exception) -> UserError:
    """Why a text is no JSON."""
    strange = re.search("[\udc80-\udcff]", text)  # what bytes become that are not UTF-8
    return UserError("not UTF-8 text" if strange else f"malformed JSON: {getattr(error, 'msg', error)}")


def _opened(path: Path) -> TextIO:
    """The file's text, unpacked where it is gzipped, whatever its name; without a byte order mark.

    Bytes that are not UTF-8 become characters that no text may hold: so a bad record does not hide the next.
    """
    with path.open("rb") as file:
        packed = file.read(len(GZIP)) == GZIP
    content = gzip.open(path) if packed else path.open("rb")  # noqa: SIM115
    return TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _hub_records(source: str) -> Iterator[tuple[str, Any]]:
    """The rows of a data set on the hub or in a folder, read from the library's files on disk, one after another.

    They are not streamed from the hub: streamed, fields whose type differs between rows come undecoded (datasets
    5.2), and KnowEdit's axes do differ.
    """
    name, *rest = source.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2 or not all(rest):
        expected = f"{PREFIX}NAME, {PREFIX}NAME:SPLIT or {PREFIX}NAME:CONFIG:SPLIT"
        raise UserError(f"requests: {source}: expected {expected}")
    try:
        from datasets import disable_progress_bars, load_dataset
    except ImportError:
        raise UserError(
            f"requests: {source}: needs the package `datasets`; install the extra: pip install -e '.[datasets]'"
        ) from None
    split = rest.pop() if rest else None
    disable_progress_bars()
    try:
        rows = load_dataset(name, *rest, split=split)
    except Exception as error:  # the library raises whatever its many back ends do
        raise UserError(f"requests: {source}: cannot be read: {type(error).__name__}: {error}") from None
    if split is None:
        if len(rows) != 1:
            raise UserError(f"requests: {source}: has several splits; add one of them: {', '.join(rows)}")
        (rows,) = rows.values()
    for number, row in enumerate(rows):
        yield f"row {number}", without_empty(row)

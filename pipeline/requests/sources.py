"""The records of a source of requests, one after another, whatever kind of source it is."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import UserError
from pipeline.requests.csv_records import SUFFIXES, row_records
from pipeline.requests.hub_records import PREFIX, hub_records
from pipeline.requests.json_records import line_records, list_records
from pipeline.requests.lines import opened

DEMO_REQUESTS = Path(__file__).with_name("demo.jsonl")

Reader = Callable[[TextIO], Iterator[tuple[str, Any]]]


def raw_records(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Each record's place in its source and what it holds, read as it is asked for: one at a time is in memory.

    A record that is broken, where those after it can be read, is the UserError that says what is wrong with it.

    Args:
        source: a JSONL file, a JSON file with one list, a CSV or TSV file, any of them gzipped; `hf:NAME`; `demo`.

    Raises:
        UserError: when there is no such source, or it is broken where the next record would begin.
    """
    if str(source).startswith(PREFIX):
        yield from hub_records(str(source))
        return
    path = DEMO_REQUESTS if str(source) == "demo" else Path(source)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"requests: {path}: {found}; expected a JSON, JSONL or CSV file, `hf:NAME`, or `demo`")
    place = "its beginning"
    try:
        read = _reader(path)
        with opened(path) as file:
            for place, record in read(file):
                yield place, record
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: gzip data is cut short or damaged after {place}") from None


def _reader(path: Path) -> Reader:
    """What reads the file: told by its name where it is a table, else by its first character."""
    if path.name.lower().removesuffix(".gz").endswith(SUFFIXES):
        return row_records
    with opened(path) as file:
        letters = iter(lambda: file.read(1), "")
        return list_records if next(filter(str.strip, letters), "") == "[" else line_records

"""The records of a source of requests, one after another, whatever kind of source it is."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path

from pipeline.errors import UserError
from pipeline.requests.csv_records import SUFFIXES, row_records
from pipeline.requests.hub_records import PREFIX, hub_records
from pipeline.requests.json_records import line_records, list_records
from pipeline.requests.raw import BOM, RawRecord

DEMO_REQUESTS = Path(__file__).with_name("demo.jsonl")
GZIP = b"\x1f\x8b"


def raw_records(source: str | Path) -> Iterator[RawRecord]:
    """Each record of a source, read as it is asked for: no more than one is held in memory.

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
    last = "its beginning"
    try:
        with _opened(path) as file:
            for record in _reader(path)(path, file):
                last = record.where.removeprefix(f"{path}: ")
                yield record
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: gzip data is cut short or damaged after {last}") from None


def _opened(path: Path) -> BufferedIOBase:
    """The file's bytes, unpacked where it is gzipped, whatever its name."""
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
    return gzip.open(path) if packed else path.open("rb")


def _reader(path: Path) -> Callable[[Path, BufferedIOBase], Iterator[RawRecord]]:
    """What reads the file: told by its name where it is a table, else by its first character."""
    if path.name.lower().removesuffix(".gz").endswith(SUFFIXES):
        return row_records
    with _opened(path) as file:
        start = file.read(len(BOM)).removeprefix(BOM)
        while not start.strip() and (more := file.read(1)):
            start = more
    return list_records if start.lstrip().startswith(b"[") else line_records

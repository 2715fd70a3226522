"""The records of a source of requests, one after another, whatever kind of source it is.

In CSV a row is a record, and the first line names the columns. Those of rephrases and probes can come again with a
number (`rephrase_2`, `locality_prompt_2`). A file without `new_answer` has a benchmark's column names.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import UserError
from pipeline.files import parse_json
from pipeline.requests.guessing import as_fields, suggested
from pipeline.requests.layouts import LANGUAGE, told, without_empty
from pipeline.requests.mapping import is_blank

DEMO_REQUESTS = Path(__file__).with_name("demo.jsonl")
PREFIX = "hf:"  # of a Hugging Face data set: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`
GZIP = b"\x1f\x8b"

SUFFIXES = (".csv", ".tsv")
DELIMITERS = ",;\t"
COLUMNS = ("id", "prompt", "subject", "new_answer", "old_answer", "source")
PROBES = tuple(f"{kind}_{part}" for kind in ("locality", "portability") for part in ("prompt", "answer", "axis"))
REPEATED = ("rephrase", *PROBES)
LONGEST = 1 << 24  # characters of a line
PARTS = 32  # as long as that, of a JSON list, which is read whole
BLANK, COLUMNS_MOST = 100_000, 10_000  # blank lines, or characters at the beginning; columns of a table
NUMBERED = re.compile(rf"({'|'.join(REPEATED)})(?:_(\d{{1,9}}))?")


def raw_records(source: str | Path, whole: bool = False) -> Iterator[tuple[str, Any]]:
    """Each record's place in its source and what it holds, read as it is asked for; of a JSON list, all at once.

    `whole`: a table's columns may have any name, and its empty cells are of the record.
    A record that is broken, where those after it can be read, is the UserError that says what is wrong with it.
    UserError when there is no such source, or it is broken where the next record would begin.
    """
    if str(source).startswith(PREFIX):
        yield from _hub_records(str(source), whole)
        return
    path = DEMO_REQUESTS if str(source) == "demo" else Path(source)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"requests: {path}: {found}; expected a JSON, JSONL or CSV file, `hf:NAME`, or `demo`")
    place = "its beginning"
    try:
        for place, record in _file_records(path, whole):
            yield place, record
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: gzip data is cut short or damaged after {place}") from None


def _spread(place: str, record: Any) -> Iterator[tuple[str, Any]]:
    """A record; or each of those that it holds in lists by name (`{"en": […], "zh": […]}`), a language with it."""
    lists = record.items() if isinstance(record, dict) else ()
    of_records = (isinstance(held, list) and held and isinstance(held[0], dict) for _, held in lists)
    if not lists or not all(of_records) or told(record):
        yield place, record
        return
    for name, held in lists:
        for number, one in enumerate(held):
            yield f"{place}, {name} {number}", {name: one} if LANGUAGE.fullmatch(name) else one


def _file_records(path: Path, whole: bool) -> Iterator[tuple[str, Any]]:
    """The records of a file: told by its name where it is a table, else by how it begins."""
    with _opened(path) as file:
        if path.name.lower().removesuffix(".gz").endswith(SUFFIXES):
            yield from _row_records(_lines(file), whole)
            return
        characters = islice(iter(lambda: file.read(1), ""), BLANK)
        first = next(filter(str.strip, characters), "")
        line = file.readline(BLANK) if first == "{" else ""
        goes_on = ".json" in path.suffixes and line.endswith("\n") and not line.rstrip().endswith("}")
        at_once = first == "[" or line.isspace() or goes_on
        file.seek(0)
        yield from _list_records(file) if at_once else _line_records(_lines(file))


def _lines(file: TextIO) -> Iterator[str]:
    """A file's lines; UserError for one longer, or more blank ones in a row, than anybody means."""
    blank = number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise UserError(f"line {number}: longer than {LONGEST:,} characters")
        blank = 0 if line.strip() else blank + 1
        if blank > BLANK:
            raise UserError(f"line {number}: more than {BLANK:,} blank lines in a row")
        yield line


def _line_records(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The records of a JSONL file; blank lines are none."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            record = _why(line, error)
        yield from _spread(f"line {number}", record)


def _list_records(file: TextIO) -> Iterator[tuple[str, Any]]:
    parts = list(islice(iter(lambda: file.read(LONGEST), ""), PARTS + 1))
    if len(parts) > PARTS:
        raise UserError(f"a JSON list longer than {PARTS * LONGEST:,} characters; JSONL has no such bound")
    text = "".join(parts)
    try:
        records = parse_json(text)
    except ValueError as error:
        raise UserError(f"line {getattr(error, 'lineno', 1)}: {_why(text, error)}") from None
    numbered = ((f"record {number}", record) for number, record in enumerate(records))
    yield from _spread("its object", records) if isinstance(records, dict) else numbered


def _row_records(lines: Iterator[str], whole: bool) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV file; commas, semicolons or tabs, whichever the first line holds most of."""
    first = next(lines, "")
    delimiter = max(DELIMITERS, key=first.count)
    rows = csv.DictReader(chain([first], lines), restval="", delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in rows.fieldnames or ()]
        _check_header(header, own="new_answer" in header and not whole)
        rows.fieldnames = header
        for row in rows:
            if not all(map(is_blank, row.values())):
                yield f"line {rows.line_num}", _record(row, header, whole)
    except csv.Error as error:
        raise UserError(f"line {rows.reader.line_num}: malformed CSV: {error}") from None


def _check_header(header: Sequence[str], own: bool) -> None:
    """UserError for a header of a wrong column; what is missing is told with the first record."""
    if len(header) > COLUMNS_MOST:
        raise UserError(f"{len(header)} columns; the most are {COLUMNS_MOST:,}")
    for name, count in Counter(filter(None, header)).items():
        if count > 1:
            raise UserError(f"column {name!r} stands twice")
        if own and name not in COLUMNS and not NUMBERED.fullmatch(name):
            known = ", ".join((*COLUMNS, *REPEATED))
            fields = as_fields(suggested(dict.fromkeys(header)))
            hint = f"; did you mean {fields}?" if fields else ""
            raise UserError(
                f"column {name!r} does not exist; there is {known}, from rephrase on also numbered{hint}"
            )


def _record(row: dict[Any, Any], header: Sequence[str], whole: bool) -> dict[str, Any] | UserError:
    """A row as a record of the layout that its columns name; what is wrong where it is none."""
    if more := row.pop(None, None):
        return UserError(f"{len(header) + len(more)} cells; the first line names {len(header)} columns")
    row.pop("", None)
    cells = without_empty(row)
    if whole:
        return row | _nested(cells)
    return _nested(cells) if "new_answer" in header else cells


def _nested(cells: dict[str, str]) -> dict[str, Any]:
    """Numbered columns as the lists of our own layout, in the order of their numbers."""
    record: dict[str, Any] = {}
    listed: dict[tuple[str, int], dict[str, str]] = {}
    for name, cell in cells.items():
        if numbered := NUMBERED.fullmatch(name):
            kind, _, part = numbered[1].partition("_")
            listed.setdefault((kind, int(numbered[2] or 1)), {})[part] = cell
        else:
            record[name] = cell
    for (kind, _), parts in sorted(listed.items()):
        name, value = ("rephrases", parts[""]) if kind == "rephrase" else (kind, parts)
        record.setdefault(name, []).append(value)
    return record


def _why(text: str, error: Exception) -> UserError:
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


def _hub_records(source: str, whole: bool) -> Iterator[tuple[str, Any]]:
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
        yield f"row {number}", row if whole else without_empty(row)

"""Records of CSV files: a row a record, columns by name, in the first line.

Beside `id`, `prompt`, `subject`, `new_answer`, `old_answer` and `source` there are `rephrase`, and
`locality_prompt`, `locality_answer`, `locality_axis` and the same of `portability`; each of these can come again
with a number (`rephrase_2`, `locality_prompt_2`). A file without `new_answer` has a benchmark's column names.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from functools import partial
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.requests.layouts import without_empty
from pipeline.requests.raw import BadRecordError, RawRecord, bounded_lines

SUFFIXES = (".csv", ".tsv")
DELIMITERS = ",;\t"
COLUMNS = ("id", "prompt", "subject", "new_answer", "old_answer", "source")
PROBES = tuple(f"{kind}_{part}" for kind in ("locality", "portability") for part in ("prompt", "answer", "axis"))
REPEATED = ("rephrase", *PROBES)
NUMBERED = re.compile(rf"({'|'.join(REPEATED)})(?:_(\d+))?")


def row_records(path: Path, file: BufferedIOBase) -> Iterator[RawRecord]:
    """The rows of a CSV file; commas, semicolons or tabs, whichever the first line holds most of.

    Raises:
        UserError: where the table is malformed, or a column's name is unknown or stands twice.
    """
    lines = (line.decode("utf-8", "surrogateescape") for _, _, line in bounded_lines(path, file))
    first = next(lines, "")
    delimiter = max(DELIMITERS, key=first.count)
    rows = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        _check_header(path, header)
        while True:
            line = rows.line_num + 1
            row = next(rows, None)
            if row is None:
                return
            if any(cell.strip() for cell in row):
                where = f"{path}: line {line}"
                yield RawRecord(where, partial(_parse_row, where, header, row))
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num}: malformed CSV: {error}") from None


def _check_header(path: Path, header: list[str]) -> None:
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice:
        raise UserError(f"{path}: column {twice!r} stands twice")
    if "new_answer" not in header:
        return  # a benchmark's columns; what is missing is told with the first record
    for name in header:
        if name and name not in COLUMNS and not NUMBERED.fullmatch(name):
            known = ", ".join((*COLUMNS, *REPEATED))
            raise UserError(
                f"{path}: column {name!r} does not exist; there is {known}, the last {len(REPEATED)} also numbered"
            )


def _parse_row(where: str, header: list[str], row: list[str]) -> dict[str, Any]:
    """A row as a record of the layout that its columns name."""
    if len(row) > len(header):
        raise BadRecordError(f"{where}: {len(row)} cells; the first line names {len(header)} columns")
    cells = dict(zip(header, [*row, *[""] * (len(header) - len(row))], strict=True))
    if any("\udc80" <= letter <= "\udcff" for cell in row for letter in cell):
        raise BadRecordError(f"{where}: not UTF-8 text")
    cells = {name: cell for name, cell in cells.items() if name}
    return _nested(without_empty(cells)) if "new_answer" in header else without_empty(cells)


def _nested(cells: dict[str, str]) -> dict[str, Any]:
    """Numbered columns as the lists of our own layout, in the order of their numbers."""
    record: dict[str, Any] = {name: cell for name, cell in cells.items() if name in COLUMNS}
    probes: dict[tuple[str, int], dict[str, str]] = {}
    rephrases: dict[int, str] = {}
    for name, cell in cells.items():
        if name not in COLUMNS and (match := NUMBERED.fullmatch(name)):
            kind, _, part = match[1].partition("_")
            number = int(match[2] or 1)
            if part:
                probes.setdefault((kind, number), {})[part] = cell
            else:
                rephrases[number] = cell
    if rephrases:
        record["rephrases"] = [rephrases[number] for number in sorted(rephrases)]
    for (kind, _), probe in sorted(probes.items()):
        record.setdefault(kind, []).append(probe)
    return record

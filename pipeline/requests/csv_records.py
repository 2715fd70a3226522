"""Records of CSV files: a row a record, columns by name, in the first line.

Beside `id`, `prompt`, `subject`, `new_answer`, `old_answer` and `source` there are `rephrase`, and
`locality_prompt`, `locality_answer`, `locality_axis` and the same of `portability`; each of these can come again
with a number (`rephrase_2`, `locality_prompt_2`). A file without `new_answer` has a benchmark's column names.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from pipeline.errors import UserError
from pipeline.requests.layouts import is_blank, without_empty

SUFFIXES = (".csv", ".tsv")
DELIMITERS = ",;\t"
COLUMNS = ("id", "prompt", "subject", "new_answer", "old_answer", "source")
PROBES = tuple(f"{kind}_{part}" for kind in ("locality", "portability") for part in ("prompt", "answer", "axis"))
REPEATED = ("rephrase", *PROBES)
NUMBERED = re.compile(rf"({'|'.join(REPEATED)})(?:_(\d{{1,9}}))?")


def row_records(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV file; commas, semicolons or tabs, whichever the first line holds most of."""
    first = next(lines, "")
    delimiter = max(DELIMITERS, key=first.count)
    rows = csv.DictReader(chain([first], lines), restval="", delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in rows.fieldnames or ()]
        _check_header(header)
        rows.fieldnames = header
        for row in rows:
            if not all(map(is_blank, row.values())):
                yield f"line {rows.line_num}", _record(row, header)
    except csv.Error as error:
        raise UserError(f"line {rows.reader.line_num}: malformed CSV: {error}") from None


def _check_header(header: Sequence[str]) -> None:
    own = "new_answer" in header  # else a benchmark's columns; what is missing is told with the first record
    for name in filter(None, header):
        if header.count(name) > 1:
            raise UserError(f"column {name!r} stands twice")
        if own and name not in COLUMNS and not NUMBERED.fullmatch(name):
            known = ", ".join((*COLUMNS, *REPEATED))
            raise UserError(f"column {name!r} does not exist; there is {known}, from rephrase on also numbered")


def _record(row: dict[Any, Any], header: Sequence[str]) -> dict[str, Any] | UserError:
    """A row as a record of the layout that its columns name; what is wrong where it is none."""
    if more := row.pop(None, None):
        return UserError(f"{len(header) + len(more)} cells; the first line names {len(header)} columns")
    row.pop("", None)
    cells = without_empty(row)
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
        if kind == "rephrase":
            record.setdefault("rephrases", []).append(parts[""])
        else:
            record.setdefault(kind, []).append(parts)
    return record

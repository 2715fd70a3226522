"""Raw records: what a source of requests hands out before anyone looks at their fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError

LONGEST = 64 * 2**20  # bytes of a record: what is longer is no record, and must not fill the memory
BOM = b"\xef\xbb\xbf"


class BadRecordError(UserError):
    """One record is bad, those after it can be read; any other UserError while reading ends it."""


class RawRecord(NamedTuple):
    """Where a record stands, in words, and what gives its contents or raises BadRecordError.

    Nothing is parsed before it is asked for, so that records left out are not checked.
    """

    where: str
    parse: Callable[[], Any]

    @property
    def place(self) -> str:
        """Where it stands in its source."""
        return self.where.rpartition(": ")[2]


def bounded_lines(path: Path, file: BufferedIOBase) -> Iterator[tuple[int, int, bytes]]:
    """Each line with its number (from 1) and the byte it begins at, without a byte order mark.

    Raises:
        UserError: for a line longer than `LONGEST`.
    """
    number, start = 1, 0
    while line := file.readline(LONGEST):
        if len(line) == LONGEST and not line.endswith(b"\n"):
            raise UserError(f"{path}: line {number}: longer than {LONGEST >> 20} MiB; expected a record a line")
        text = line.removeprefix(BOM) if number == 1 else line
        yield number, start + len(line) - len(text), text
        number, start = number + 1, start + len(line)

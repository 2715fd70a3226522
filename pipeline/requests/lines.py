"""A file of requests as text: unpacked, without a byte order mark, in lines that cannot fill the memory."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from pipeline.errors import UserError

LONGEST = 64 * 2**20  # characters of a record: what is longer is no record, and must not fill the memory
GZIP = b"\x1f\x8b"
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what `opened` reads for bytes that are none


def opened(path: Path) -> TextIO:
    """The file's text, unpacked where it is gzipped, whatever its name.

    Bytes that are not UTF-8 are read as what `NOT_UTF8` finds: so a bad record does not hide the next.
    """
    with path.open("rb") as file:
        packed = file.read(len(GZIP)) == GZIP
    content = gzip.open(path) if packed else path.open("rb")  # noqa: SIM115
    return TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def bounded_lines(file: TextIO) -> Iterator[tuple[int, str]]:
    """Each line with its number, from 1.

    Raises:
        UserError: for a line longer than `LONGEST`.
    """
    for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), start=1):
        if len(line) == LONGEST and not line.endswith("\n"):
            raise UserError(f"line {number}: longer than {LONGEST >> 20} MiB; expected a record a line")
        yield number, line

"""Records of JSON files: an object a line, or one list of objects, never more than one record in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

from pipeline.errors import UserError
from pipeline.requests.lines import LONGEST, NOT_UTF8, bounded_lines

PIECE = 2**14  # characters of a list that are read at once
DECODER = json.JSONDecoder()


def line_records(file: TextIO) -> Iterator[tuple[str, Any]]:
    """The records of a JSONL file; blank lines are none."""
    for number, line in bounded_lines(file):
        if line.strip():
            yield f"line {number}", _parsed(line)


def _parsed(line: str) -> Any:
    if NOT_UTF8.search(line):
        return UserError("not UTF-8 text")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return UserError(f"malformed JSON: {_reason(error)}")


def list_records(file: TextIO) -> Iterator[tuple[str, Any]]:
    """The records of a JSON file that holds one list.

    Raises:
        UserError: where the list is malformed: what follows cannot be told apart any more.
    """
    window = _Window(file)
    window.take("[")
    number, after = 0, window.take("]") if window.peek() == "]" else ","
    while after == ",":
        yield f"record {number}", window.value()
        number, after = number + 1, window.take(",]")
    if window.peek():
        raise window.malformed("the list has ended, but text follows")


class _Window:
    """A text of which only what is being parsed is in memory.

    Attributes:
        text: what has been read and is not parsed yet.
        line: the line that `text` begins in.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text, self.line = "", 1

    def peek(self) -> str:
        """The next character that is no space, or nothing at the file's end."""
        while True:
            self._drop(len(self.text) - len(self.text.lstrip()))
            if self.text or not self._more():
                return self.text[:1]

    def take(self, expected: str) -> str:
        """Go on behind a character that must come next, one of those expected."""
        found = self.peek()
        if not found or found not in expected:
            raise self.malformed(f"expecting {' or '.join(map(repr, expected))}")
        self._drop(1)
        return found

    def value(self) -> Any:
        """The next value, whole; the UserError that says so where it is not UTF-8."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text)
            except json.JSONDecodeError as error:  # more text may mend it
                if not self._more():
                    raise self.malformed(_reason(error), error.pos) from None
                continue
            except (ValueError, RecursionError) as error:
                raise self.malformed(_reason(error)) from None
            if end < len(self.text) or not self._more():  # at the very end, a number may go on
                bad = NOT_UTF8.search(self.text, 0, end)
                self._drop(end)
                return UserError("not UTF-8 text") if bad else value

    def malformed(self, reason: str, at: int = 0) -> UserError:
        """The error that says in which line the list is broken."""
        line = self.line + self.text.count("\n", 0, at)
        return UserError(f"line {line}: malformed JSON: {reason}")

    def _more(self) -> bool:
        """Read another piece; whether there was one. Pieces grow with the record."""
        if len(self.text) > LONGEST:
            raise self.malformed(f"a record longer than {LONGEST >> 20} MiB")
        piece = self.file.read(max(PIECE, len(self.text)))
        self.text += piece
        return bool(piece)

    def _drop(self, end: int) -> None:
        self.line += self.text.count("\n", 0, end)
        self.text = self.text[end:]


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)

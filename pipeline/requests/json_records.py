"""Records of JSON files: an object a line, or one list of objects, never more than one record in memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from functools import partial
from io import BufferedIOBase
from itertools import count
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.requests.raw import BOM, LONGEST, BadRecordError, RawRecord, bounded_lines

PIECE = 2**16  # bytes of a list that are read at once
UNFINISHED = 16  # characters before the end in which a number, word or escape that goes on is taken for an error
DECODER = json.JSONDecoder()


def line_records(path: Path, file: BufferedIOBase) -> Iterator[RawRecord]:
    """The records of a JSONL file; blank lines are none."""
    for number, start, line in bounded_lines(path, file):
        if line.strip():
            where = f"{path}: line {number}"
            yield RawRecord(where, partial(_parse_line, where, line, start))


def _parse_line(where: str, line: bytes, start: int) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{where}: not UTF-8 text (byte {start + error.start} of the file)") from None
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"{where}: malformed JSON: {_reason(error)}") from None


def list_records(path: Path, file: BufferedIOBase) -> Iterator[RawRecord]:
    """The records of a JSON file that holds one list.

    Raises:
        UserError: where the list is malformed: what follows cannot be told apart any more.
    """
    window = _Window(path, file)
    window.take("[")
    if window.peek() == "]":
        window.take("]")
    else:
        for number in count():
            value = window.value()
            yield RawRecord(f"{path}: record {number}", partial(_parsed, value))
            if window.peek() == "]":
                window.take("]")
                break
            window.take(",")
    if window.peek():
        raise window.malformed("the list has ended, but text follows")


def _parsed(value: Any) -> Any:
    """A record of a list is parsed when it is found: where it ends cannot be told otherwise."""
    return value


class _Window:
    """A text file of which only what is being parsed is in memory.

    Attributes:
        text: what has been read and may still be needed.
        at: where parsing stands in it.
        line: the line that `text` begins in.
        bytes_read: how many bytes were read so far.
    """

    def __init__(self, path: Path, file: BufferedIOBase) -> None:
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.line, self.bytes_read = "", 0, 1, 0
        self.bad_byte: int | None = None

    def peek(self) -> str:
        """The next character that is no space, or nothing at the file's end."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, expected: str) -> None:
        """Go on behind a character that must come next."""
        if self.peek() != expected:
            raise self.malformed(f"expecting {expected!r}" + (" or ']'" if expected == "," else ""))
        self.at += 1

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                length = end - self.at
            except (ValueError, RecursionError) as error:
                wrong = getattr(error, "pos", self.at) - self.at
                if not self._goes_on(error) or not self._more():
                    raise self.malformed(_reason(error), self.at + wrong) from None
                continue
            if end < len(self.text) or not self._more():  # at the very end, a number may go on
                self.at += length
                return value

    def malformed(self, reason: str, at: int | None = None) -> UserError:
        """The error that says in which line the list is broken."""
        line = self.line + self.text.count("\n", 0, self.at if at is None else at)
        return UserError(f"{self.path}: line {line}: malformed JSON: {reason}")

    def _goes_on(self, error: Exception) -> bool:
        """Whether an error may come from the text's end, so that more text may mend it."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.pos >= len(self.text) - UNFINISHED or error.msg.startswith("Unterminated string")

    def _more(self) -> bool:
        """Drop what is parsed, read another piece; whether there was one. Pieces grow with the record."""
        if self.bad_byte is not None:
            raise UserError(f"{self.path}: not UTF-8 text (byte {self.bad_byte} of the file)")
        if len(self.text) - self.at > LONGEST:
            raise self.malformed(f"a record longer than {LONGEST >> 20} MiB")
        pending = len(self.decoder.getstate()[0])
        longer = len(self.text) - self.at
        piece = self.file.read(longer) if longer > PIECE else self.file.read1(PIECE)
        if not self.bytes_read:
            self.bytes_read = len(piece) - len(piece := piece.removeprefix(BOM))
        try:
            text = self.decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:  # what stands before it is read first
            self.bad_byte = self.bytes_read - pending + error.start
            text = error.object[: error.start].decode("utf-8")
        self.bytes_read += len(piece)
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + text, 0
        return bool(piece)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)

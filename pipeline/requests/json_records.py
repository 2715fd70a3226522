"""Records of JSON files: an object a line, or one list of objects, never more than one record in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from pipeline.errors import UserError
from pipeline.requests.lines import LONGEST, NOT_UTF8, bounded_lines

PIECE = 2**14  # characters of a list that are read at once
DECODER = json.JSONDecoder()
SPACE = re.compile(r"\s*")
END = object()  # in place of a record: the list is over


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
    text, line, number, expected, ended = "", 1, 0, "[", False
    while True:
        found = _element(text, line, expected, ended)
        if found is None:
            if len(text) > LONGEST:
                raise UserError(f"line {line}: malformed JSON: a record longer than {LONGEST >> 20} MiB")
            piece = file.read(max(PIECE, len(text)))  # pieces grow with the record
            text, ended = text + piece, not piece
            continue
        record, end = found
        bad = NOT_UTF8.search(text, 0, end)
        text, line = text[end:], line + text.count("\n", 0, end)
        if record is END:
            break
        yield f"record {number}", UserError("not UTF-8 text") if bad else record
        number, expected = number + 1, ",]"
    text += file.read(PIECE)
    if text.strip():
        raise _malformed("the list has ended, but text follows", line, text, _skip(text, 0))


def _element(text: str, line: int, expected: str, ended: bool) -> tuple[Any, int] | None:
    """The next record of a list, or END, and where it ends; None where more text is needed to tell.

    Args:
        text: from the end of the record before it on.
        line: the line that it begins in.
        expected: the characters one of which must come first.
        ended: whether there is no more text.
    """
    at = _skip(text, 0)
    if at == len(text) and not ended:
        return None
    if text[at : at + 1] not in tuple(expected):
        raise _malformed(f"expecting {' or '.join(map(repr, expected))}", line, text, at)
    if text[at] == "]":
        return END, at + 1
    after = _skip(text, at + 1)
    if expected == "[" and text[after : after + 1] == "]":
        return END, after + 1
    try:
        record, end = DECODER.raw_decode(text, after)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and not ended:  # more text may mend it
            return None
        raise _malformed(_reason(error), line, text, getattr(error, "pos", 0)) from None
    return (record, end) if end < len(text) or ended else None  # at the very end, a number may go on


def _skip(text: str, start: int) -> int:
    """Where the next character stands that is no space."""
    found = SPACE.match(text, start)
    return found.end() if found else start


def _malformed(reason: str, line: int, text: str, at: int) -> UserError:
    return UserError(f"line {line + text.count(chr(10), 0, at)}: malformed JSON: {reason}")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)

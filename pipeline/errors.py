"""What users are told in a single line, without a traceback: errors that are theirs to mend, and notes."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Collection, Iterable
from difflib import get_close_matches

DEEPEST = 64  # levels of lists and mappings in each other, in a file: more than anybody means
UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's categories of what steers a terminal, or is not seen
JOINERS = "\u200c\u200d"  # are unseen too, but scripts and emoji need them


class UserError(ValueError):
    """What is wrong, where (file, record or flag), what was expected and what exists, in one line."""


class DeviceError(UserError):
    """What one device alone cannot do: other processes of the command may be waiting for it."""


class Note(UserWarning):
    """What went another way than expected and ends nothing; commands show it as a line `note: ...`."""


def note(text: str) -> None:
    """Tell the user of something that ends nothing."""
    warnings.warn(Note(text), stacklevel=2)


def terminal_text(text: str) -> str:
    """Somebody's text, fit for a line of a terminal: what steers it or breaks the line stands there escaped."""
    if text.isprintable():
        return text
    return "".join(
        one.encode("unicode_escape").decode() if unicodedata.category(one) in UNSEEN and one not in JOINERS else one
        for one in text
    )


def one_line(error: object) -> str:
    """What an error says, in one line; of pydantic's, the first thing that is wrong, and where in what was read."""
    if not hasattr(error, "error_count"):  # which pydantic's have; to import their class would take time
        return " ".join(str(error).split())
    first = error.errors(include_url=False, include_input=False)[0]  # type: ignore[attr-defined]
    where, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def did_you_mean(name: str, known: Iterable[str], form: str = "{}") -> str:
    """A hint at the known name that is most like a wrong one, in a form; empty when none is."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {form.format(close[0])}?)" if close else ""


def check_choice(what: str, value: str, choices: Collection[str]) -> None:
    """Raise UserError unless `value` is one of `choices`, naming them all and the closest one."""
    if value not in choices:
        hint = did_you_mean(value, choices, "'{}'")
        raise UserError(f"{what}: {value!r} does not exist{hint}; there is {', '.join(sorted(choices))}")

"""The one kind of error that is a user's to mend: shown as a single line, without a traceback."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """What is wrong, where (file, record or flag), what was expected and what exists, in one line."""


def did_you_mean(name: str, known: Iterable[str], form: str = "{}") -> str:
    """A hint at the known name that is most like a wrong one, in a form; empty when none is."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {form.format(close[0])}?)" if close else ""


def check_choice(what: str, value: str, choices: Collection[str]) -> None:
    """Raise UserError unless `value` is one of `choices`, naming them all and the closest one."""
    if value not in choices:
        hint = did_you_mean(value, choices, "'{}'")
        raise UserError(f"{what}: {value!r} does not exist{hint}; there is {', '.join(sorted(choices))}")


def check_at_least(what: str, value: float, least: float) -> None:
    """Raise UserError when `value` is below `least`."""
    if value < least:
        raise UserError(f"{what}: {value} is too small; the least is {least}")

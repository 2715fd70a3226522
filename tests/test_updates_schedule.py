"""The schedule's clock: cron's own rules, held against a plain reference for a year of random lines."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice

import pytest
from conftest import refusal

from pipeline.updates import trigger

DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
YEAR = datetime(2027, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the machine's zone: in others an hour is missing in spring."""
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def days(line: str, count: int, start: datetime = YEAR) -> list[datetime]:
    """The first times of a line after a start."""
    found: list[datetime] = []
    when = trigger(line, None)
    while len(found) < count:
        found.append(when.get_next_fire_time(found[-1] if found else None, (found or [start])[-1]))
    return found


@pytest.mark.parametrize(
    ("weekdays", "expected"),
    [
        ("0", "sun"), ("7", "sun"), ("1-5", "mon tue wed thu fri"), ("0-6", " ".join(DAYS)), ("5-7", "sun fri sat"),
        ("*/2", "sun tue thu sat"), ("1-5/2", "mon wed fri"), ("mon", "mon"), ("fri-sun", "sun fri sat"),
        ("SAT,0", "sun sat"), ("1,3", "mon wed"), ("0-7", " ".join(DAYS)),
    ],
)  # fmt: skip
def test_cases_of_weekdays(weekdays: str, expected: str) -> None:
    """As cron counts: 0 and 7 are Sunday."""
    found = {DAYS[(day.weekday() + 1) % 7] for day in days(f"0 3 * * {weekdays}", 14)}
    assert found == {*expected.split()}


@pytest.mark.parametrize("line", ["0 3 1 * 8", "0 3 * * 5-1", "0 3 * * *-3", "0 3 * * mond", "0 3 * * 1,", "* * *"])
def test_cases_of_what_is_no_line(line: str) -> None:
    assert f"cron: {line!r} is no cron line" in refusal(lambda: trigger(line, None))


def test_cases_of_day_of_month_and_weekday() -> None:
    """Either is enough where both are named; a star, with a step or not, names none."""
    assert {day.day == 13 or day.weekday() == 4 for day in days("0 0 13 * 5", 60)} == {True}
    assert len({day.weekday() for day in days("0 0 13 * 5", 60)}) > 1
    assert {(day.day % 2, day.weekday()) for day in days("0 0 */2 * 1", 20)} == {(1, 0)}


def field(chance: random.Random, low: int, high: int) -> tuple[str, set[int]]:
    """A random field of a cron line, and what it stands for."""
    parts, meant = [], set()
    for _ in range(chance.choice((1, 1, 2))):
        first, last = sorted(chance.choices(range(low, high + 1), k=2))
        step = chance.randint(1, 5)
        text, values = chance.choice(
            [
                ("*", range(low, high + 1)),
                (f"*/{step}", range(low, high + 1, step)),
                (str(first), [first]),
                (f"{first}-{last}", range(first, last + 1)),
                (f"{first}-{last}/{step}", range(first, last + 1, step)),
            ]
        )
        parts.append(text)
        meant |= {*values}
        if text.startswith("*"):
            return text, {*values}
    return ",".join(parts), meant


def reference(fields: list[tuple[str, set[int]]], start: datetime) -> Iterator[datetime]:
    """Cron's times from a start on, day by day."""
    (_, minutes), (_, hours), (day, of_month), (_, months), (weekday, of_week) = fields
    of_week = {one % 7 for one in of_week}
    for passed in range(366):
        date = start + timedelta(days=passed)
        first, second = date.day in of_month, date.isoweekday() % 7 in of_week
        starred = day.startswith("*") or weekday.startswith("*")
        if date.month in months and (first and second if starred else first or second):
            for hour in sorted(hours):
                for minute in sorted(minutes):
                    yield date.replace(hour=hour, minute=minute)


def test_cases_of_a_year_of_random_lines() -> None:
    chance = random.Random(18)
    for _ in range(150):
        fields = [field(chance, low, high) for low, high in ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))]
        line = " ".join(text for text, _ in fields)
        start = YEAR + timedelta(days=chance.randrange(365))
        expected = [*islice(reference(fields, start), 25)]
        assert days(line, len(expected), start) == expected, line

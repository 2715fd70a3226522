"""The schedule: an update at set times, by APScheduler's triggers; one that fails does not end it."""

from __future__ import annotations

import re
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from typing import Any

from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.combining import OrTrigger
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from pipeline.errors import DeviceError, UserError, one_line
from pipeline.options.updates import seconds
from pipeline.running.interrupts import interrupts
from pipeline.running.processes import on_first, world_size

FIELDS = {"minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "day_of_week": (0, 7)}
NAMES = {
    "month": ("", "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    "day_of_week": ("sun", "mon", "tue", "wed", "thu", "fri", "sat", "sun"),  # APScheduler's 0 is Monday
}
PART = re.compile(r"(?:\*|(\w+)(?:-(\w+))?)(?:/([1-9]\d?))?")
LOOKING = 1.0  # seconds between looks at the clock, which a sleeping machine moves


class Stopping(threading.Event):
    """Set by SIGTERM, which lets the batch at work finish; a second one ends it, and the batch is queued again."""

    def listening(self) -> AbstractContextManager[None]:
        """Inside the `with`, SIGTERM asks."""
        return interrupts.left_to(self._note, signal.SIGTERM)

    def _note(self, number: int, _: Any) -> None:
        if self.is_set():
            interrupts.end(number)
        self.set()


def trigger(cron: str | None, every: str | None) -> BaseTrigger:
    """When updates start: a day or a weekday is enough where a line names both. UserError for no cron line."""
    if cron is None:
        assert every is not None
        return IntervalTrigger(seconds=seconds("every", every))
    try:
        if len(cron.split()) != len(FIELDS):
            raise ValueError(f"it has {len(cron.split())}")
        given = dict(zip(FIELDS, cron.split(), strict=True))
        fields = {name: _listed(name, field) for name, field in given.items()}
        if given["day"].startswith("*") or given["day_of_week"].startswith("*"):
            return CronTrigger(**fields)
        return OrTrigger([CronTrigger(**fields | {name: "*"}) for name in ("day", "day_of_week")])
    except ValueError as error:
        line = f"cron: {cron!r} is no cron line ({one_line(error)}); expected five fields, such as '0 3 * * *'"
        raise UserError(line) from None


def _listed(name: str, field: str) -> str:
    """All that a field of a cron line stands for, one after another; ValueError when it is none."""
    (least, most), names = FIELDS[name], NAMES.get(name, ())
    found: list[int] = []
    number = {text: str(place) for place, text in reversed([*enumerate(names)])}
    for part in field.lower().split(","):
        matched = PART.fullmatch(part)
        first, last, step = matched.groups() if matched else ("", "", "")
        low, high = (number.get(one or "", one) for one in (first or str(least), last or first or str(most)))
        if name == "day_of_week" and high == "0" != low:
            high = "7"  # from Friday to Sunday
        if not (matched and f"{low}{high}".isdecimal() and least <= int(low) <= int(high) <= most):
            raise ValueError(f"{part!r}: expected {', '.join(filter(None, names)) or 'numbers'}, {least} to {most}")
        found += range(int(low), (int(high) if last or not step else most) + 1, int(step or 1))
    return ",".join(names[one] if name == "day_of_week" else str(one) for one in found)


def run_schedule(
    work: Callable[[], Any], when: BaseTrigger, say: Callable[[str], Any], stopping: Stopping, at_once: bool = False
) -> None:
    """Call `work` at every time of a trigger until the process is asked to end.

    Times during a call are left out; one that the machine slept through is made up for when it wakes. What `work`
    raises is said, and the schedule goes on. The first call is now where `at_once` says so. Of several processes
    the first looks at the clock and is asked to end, and what is no UserError ends them.
    UserError when the trigger has no time to come.
    """
    if at_once:
        say("updating now, and as asked")
        _attempt(work, say)
    while not on_first(stopping.is_set):
        due: datetime | None = on_first(lambda: when.get_next_fire_time(None, datetime.now().astimezone()))
        if due is None:
            raise UserError("cron: names a time that never comes")
        say(f"next update at {due:%Y-%m-%d %H:%M:%S}")
        while on_first(partial(_is_early, due, stopping)):
            pass
        if not on_first(stopping.is_set):
            _attempt(work, say)
    say("asked to end: ended between two batches")


def _is_early(due: datetime, stopping: Stopping) -> bool:
    """Wait a moment, and say whether to wait on."""
    return datetime.now(due.tzinfo) < due and not stopping.wait(LOOKING)


def _attempt(work: Callable[[], Any], say: Callable[[str], Any]) -> None:
    try:
        work()
    except (UserError, OSError) as error:
        if world_size() > 1 and isinstance(error, OSError | DeviceError):
            raise
        say(f"the update failed: {one_line(error)}")
    except Exception:  # a fault of ours must not end a schedule of months, nor be hidden
        if world_size() > 1:  # the others may wait for this one within the update
            raise
        traceback.print_exc()
        say("the update failed, as shown; the schedule goes on")

"""The schedule: an update at set times, by APScheduler's triggers; one that fails does not end it."""

from __future__ import annotations

import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from pipeline.errors import UserError
from pipeline.options.updates import seconds
from pipeline.running.interrupts import interrupts

WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat", "sun")  # cron's 0 to 7; APScheduler's 0 is Monday
LOOKING = 1.0  # seconds between looks at the clock, which a sleeping machine moves


class Stopping(threading.Event):
    """Set when the process was asked to end: by SIGTERM, which lets the batch at work finish.

    A second SIGTERM ends it at once: the batch goes back to the queue.
    """

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the `with`, SIGTERM asks."""
        with interrupts.left_to(self._note, signal.SIGTERM):
            yield

    def _note(self, number: int, _: Any) -> None:
        if self.is_set():
            interrupts.end(number)
        self.set()


def trigger(cron: str | None, every: str | None) -> BaseTrigger:
    """When updates start; UserError when the cron line is none."""
    if cron is None:
        assert every is not None
        return IntervalTrigger(seconds=seconds(every))
    others, _, weekdays = " ".join(cron.split()).rpartition(" ")
    weekdays = re.sub(r"(?<![\d/])[0-7](?!\d)", lambda number: WEEKDAYS[int(number[0])], weekdays)
    try:
        return CronTrigger.from_crontab(f"{others} {weekdays}")
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cron: {cron!r} is no cron line ({reason}); expected five fields, such as '0 3 * * *'"
        ) from None


def run_schedule(
    work: Callable[[], Any], when: BaseTrigger, say: Callable[[str], Any], stopping: Stopping, at_once: bool = False
) -> None:
    """Call `work` at every time of a trigger until the process is asked to end.

    Times during a call are left out; one that the machine slept through is made up for when it wakes. What `work`
    raises is said, and the schedule goes on. The first call is now where `at_once` says so.
    UserError when the trigger has no time to come.
    """
    if at_once:
        say("updating now, and as asked")
        _attempt(work, say)
    while not stopping.is_set():
        due: datetime | None = when.get_next_fire_time(None, datetime.now().astimezone())
        if due is None:
            raise UserError("cron: names a time that never comes")
        say(f"next update at {due:%Y-%m-%d %H:%M:%S}")
        while datetime.now(due.tzinfo) < due and not stopping.wait(LOOKING):
            pass
        if not stopping.is_set():
            _attempt(work, say)
    say("asked to end: ended between two batches")


def _attempt(work: Callable[[], Any], say: Callable[[str], Any]) -> None:
    try:
        work()
    except (UserError, OSError) as error:
        say(f"the update failed: {' '.join(str(error).split())}")
    except Exception:  # a fault of ours must not end a schedule of months, nor be hidden
        traceback.print_exc()
        say("the update failed, as shown; the schedule goes on")

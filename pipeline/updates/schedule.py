"""The schedule: an update at set times, by APScheduler; one that fails is told, and the next one comes."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from apscheduler.events import EVENT_JOB_MISSED
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from pipeline.errors import UserError
from pipeline.running.interrupts import interrupts
from pipeline.options import seconds

LATE = 3600  # seconds that a start may be late, after a machine slept, and still be made up for


class Stopping:
    """Whether the process was asked to end: by SIGTERM, which lets the batch at work finish.

    A second SIGTERM ends it at once: the batch goes back to the queue.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self) -> bool:
        return self.asked.is_set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the `with`, SIGTERM asks."""
        with interrupts.left_to(self._note, signal.SIGTERM):
            yield

    def _note(self, number: int, _: Any) -> None:
        if self():
            interrupts.end(number)
        self.asked.set()


def trigger(cron: str | None, every: str | None) -> BaseTrigger:
    """When updates start.

    Raises:
        UserError: when the cron line is none.
    """
    if cron is None:
        assert every is not None
        return IntervalTrigger(seconds=seconds(every))
    try:
        return CronTrigger.from_crontab(cron)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cron: {cron!r} is no cron line ({reason}); expected five fields, such as '0 3 * * *'"
        ) from None


def run_schedule(
    work: Callable[[], Any], when: BaseTrigger, say: Callable[[str], Any], stopping: Stopping, at_once: bool = False
) -> None:
    """Call `work` at every time of a trigger until the process is asked to end; one call at a time.

    The scheduler's own thread only says that it is time: work is done in this thread, where signals arrive.

    Args:
        work: an update; what it raises is told, and the schedule goes on.
        when: the times.
        say: tells one line.
        stopping: asked between calls.
        at_once: whether the first call is now.
    """
    due = threading.Event()
    if at_once:
        due.set()
    scheduler = BackgroundScheduler(job_defaults={"coalesce": True, "misfire_grace_time": LATE})
    scheduler.add_listener(
        lambda _: say("the machine slept through a start; waiting for the next"), EVENT_JOB_MISSED
    )
    job = scheduler.add_job(due.set, when)
    scheduler.start()
    say(f"next update at {job.next_run_time:%Y-%m-%d %H:%M:%S}" if not at_once else "updating now, and as asked")
    try:
        while not stopping():
            if not due.wait(timeout=0.2):
                continue
            due.clear()
            _attempt(work, say)
            if not stopping():
                say(f"next update at {job.next_run_time:%Y-%m-%d %H:%M:%S}")
    finally:
        scheduler.shutdown(wait=False)
    say("asked to end: ended between two batches")


def _attempt(work: Callable[[], Any], say: Callable[[str], Any]) -> None:
    try:
        work()
    except (UserError, OSError) as error:
        say(f"the update failed: {' '.join(str(error).split())}")
    except Exception:  # a fault of ours must not end a schedule of months, nor be hidden
        traceback.print_exc()
        say("the update failed, as shown; the schedule goes on")

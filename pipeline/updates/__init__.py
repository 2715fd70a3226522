"""Knowledge updates over time: the queue, the gates, versions that build on one another, the schedule."""

from pipeline.updates.history import counts, events, find, request_row, story, verify, versions
from pipeline.updates.lineage import check_number, difference, in_force, rollback
from pipeline.updates.live import Answers, LiveModel
from pipeline.updates.proving import BatchResult
from pipeline.updates.queue import Submitted, submit
from pipeline.updates.schedule import Stopping, run_schedule, trigger
from pipeline.updates.store import BusyError, Store
from pipeline.updates.update import retract, update
from pipeline.updates.versions import load_version, read_metrics, version_folder

__all__ = [
    "Answers",
    "BatchResult",
    "BusyError",
    "LiveModel",
    "Stopping",
    "Store",
    "Submitted",
    "check_number",
    "counts",
    "difference",
    "events",
    "find",
    "in_force",
    "load_version",
    "read_metrics",
    "request_row",
    "retract",
    "rollback",
    "run_schedule",
    "story",
    "submit",
    "trigger",
    "update",
    "verify",
    "version_folder",
    "versions",
]

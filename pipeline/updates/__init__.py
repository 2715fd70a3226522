"""Knowledge updates over time: the queue, the gates, versions that build on one another, the schedule."""

from pipeline.offered import offered

__getattr__, __all__ = offered(
    __name__,
    {
        "history": ("counts", "events", "find", "request_row", "story", "verify", "versions"),
        "lineage": ("check_number", "difference", "in_force", "load_version", "rollback"),
        "live": ("LiveModel",),
        "making": ("retract", "update"),
        "proving": ("BatchResult",),
        "queue": ("Submitted", "submit"),
        "schedule": ("Stopping", "run_schedule", "trigger"),
        "store": ("BusyError", "Store"),
        "folders": ("read_metrics", "version_folder"),
    },
)

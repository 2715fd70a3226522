"""Knowledge updates over time: the queue, the gates, versions that build on one another, the schedule."""

from pipeline.offered import offered

__getattr__, __all__ = offered(
    __name__,
    {
        "history": ("counts", "find", "load_version", "story", "verify", "versions"),
        "lineage": ("difference", "in_force", "prune", "rollback"),
        "making": ("retract", "update"),
        "proving": ("BatchResult",),
        "queue": ("Submitted", "submit"),
        "schedule": ("Stopping", "run_schedule", "trigger"),
        "store": ("BusyError", "Store"),
        "disk": ("read_metrics", "version_folder"),
    },
)

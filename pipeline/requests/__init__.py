"""What is to change: edit requests, the layouts they come in, and how they reach a Trainer."""

from typing import TYPE_CHECKING, Any

from pipeline.requests.batches import in_batches
from pipeline.requests.conflicts import fact, settle
from pipeline.requests.readers import load_requests, stream_requests
from pipeline.requests.schema import EditRequest, Probe
from pipeline.requests.sources import DEMO_REQUESTS
from pipeline.requests.split import split_by_subject

if TYPE_CHECKING:
    from pipeline.requests.datamodule import ListDataModule

__all__ = [
    "DEMO_REQUESTS",
    "EditRequest",
    "ListDataModule",
    "Probe",
    "fact",
    "in_batches",
    "load_requests",
    "settle",
    "split_by_subject",
    "stream_requests",
]


def __getattr__(name: str) -> Any:
    """The data module when it is used: requests are read and checked without torch."""
    if name == "ListDataModule":
        from pipeline.requests.datamodule import ListDataModule

        return ListDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

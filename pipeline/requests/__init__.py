"""What is to change: edit requests, the file layouts they come in, and how they reach a Trainer."""

from pipeline.requests.conflicts import fact, settle
from pipeline.requests.datamodule import ListDataModule
from pipeline.requests.readers import DEMO_REQUESTS, load_requests, stream_requests
from pipeline.requests.schema import EditRequest, Probe
from pipeline.requests.split import split_by_subject

__all__ = [
    "DEMO_REQUESTS",
    "EditRequest",
    "ListDataModule",
    "Probe",
    "fact",
    "load_requests",
    "settle",
    "split_by_subject",
    "stream_requests",
]

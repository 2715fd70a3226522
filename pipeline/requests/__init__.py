"""What is to change: edit requests, the file layouts they come in, and how they reach a Trainer."""

from pipeline.requests.datamodule import ListDataModule
from pipeline.requests.readers import DEMO_REQUESTS, load_requests
from pipeline.requests.schema import EditRequest, Probe
from pipeline.requests.split import split_by_subject

__all__ = ["DEMO_REQUESTS", "EditRequest", "ListDataModule", "Probe", "load_requests", "split_by_subject"]

"""What is to change: edit requests, the layouts they come in, how they become tokens and batches."""

from pipeline.offered import offered

__getattr__, __all__ = offered(
    __name__,
    {
        "conflicts": ("fact", "settle"),
        "data": ("EditRequests",),
        "readers": ("load_requests", "stream_requests"),
        "sources": ("DEMO_REQUESTS",),
        "rows": ("Batch", "Row", "collate"),
        "schema": ("EditRequest", "Probe"),
        "split": ("split_by_subject",),
        "tokens": ("Tokens",),
    },
)

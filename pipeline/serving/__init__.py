"""Serving: the live model, and publishing of versions into servers that run elsewhere."""

from pipeline.offered import offered

__getattr__, __all__ = offered(__name__, {"live": ("LiveModel",)})

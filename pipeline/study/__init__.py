"""Which layer would have been best, and who finds it: trial edits at every block, and selectors beside them."""

from pipeline.offered import offered

__getattr__, __all__ = offered(__name__, {"study": ("Study", "run_study"), "grid": ("Grid",), "sweep": ("Sweep",)})

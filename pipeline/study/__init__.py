"""Which layer would have been best, and who finds it: trial edits at every block, and selectors beside them."""

from pipeline.study.study import Study, run_study
from pipeline.study.sweep import Grid, Sweep

__all__ = ["Grid", "Study", "Sweep", "run_study"]

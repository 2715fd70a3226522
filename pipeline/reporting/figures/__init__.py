"""Figures, all in one look (`look.py`), a file an idea."""

from pipeline.reporting.figures.months import months_figure
from pipeline.reporting.figures.outcomes import by_cost, cost_figure, metrics_figure
from pipeline.reporting.figures.scores import agreement_figure, score_figure, stability_figure
from pipeline.reporting.figures.sweeps import block_means, selectors_figure, squares_figure, sweep_figure

__all__ = [
    "agreement_figure",
    "block_means",
    "by_cost",
    "cost_figure",
    "metrics_figure",
    "months_figure",
    "score_figure",
    "selectors_figure",
    "squares_figure",
    "stability_figure",
    "sweep_figure",
]

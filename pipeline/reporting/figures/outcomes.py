"""What edits come to: one before and after; a study's at every block, and how near selectors come to the best."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from pipeline.evaluation.evaluator import Evaluation
from pipeline.reporting.figures.look import BLUE, GOLD, INK, WHITE, look, short, whole_numbers
from pipeline.reporting.figures.scores import selector_name
from pipeline.reporting.groups import IN_SHORT, SHARES, grouped, label
from pipeline.reporting.tables import sides_of
from pipeline.study.grid import JUDGED_BY, mean_of

if TYPE_CHECKING:
    from pipeline.study.study import Study

MARKS = {"before": ("o", WHITE, 0.13), "after": ("D", BLUE, -0.13)}  # shape, filling, place beside the row


def metrics_figure(evaluation: Evaluation) -> Figure:
    """The chief shares before and after, a row a metric, with 95% bootstrap intervals."""
    metrics = evaluation.before.metrics
    groups = grouped([name for name in metrics if name in SHARES and name in IN_SHORT])
    rows = [row for group, members in groups.items() for row in (group, *members)]
    count = next(metrics[row].count for row in rows if row in metrics)
    title = "What the edit changed" if evaluation.after else "What the model does"
    caption = f"Requests: {count}. Lines: 95% bootstrap intervals."
    with look(0.9 + 0.215 * len(rows), title, caption) as figure:
        axes = figure.subplots()
        for side, measured in sides_of(evaluation).items():
            shape, filling, shift = MARKS[side]
            shown = {place: measured.metrics[row] for place, row in enumerate(rows) if row in measured.metrics}
            places, means = np.array(list(shown)) + shift, [one.mean for one in shown.values()]
            axes.hlines(
                places, [one.low for one in shown.values()], [one.high for one in shown.values()], color=INK
            )
            axes.plot(means, places, shape, markersize=6, color=INK, markerfacecolor=filling, label=side)
        axes.set_yticks(range(len(rows)), [label(row) for row in rows])
        for row, tick in zip(rows, axes.get_yticklabels(), strict=True):
            tick.set_fontweight("bold" if row in groups else "normal")
        axes.set_ylim(len(rows) - 0.4, -0.7)
        axes.set_xlim(-0.03, 1.03)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", linewidth=0.4)
        axes.set_xlabel("share, by the request")
        figure.legend(loc="outside lower left", ncols=5)
    return figure


def sweep_figure(study: Study, name: str, method: str) -> Figure:
    """What single edits come to, block by block: the mean of every figure, and of the score made of them."""
    grid, golden = study.grids[name][method], study.golden[name]
    caption = (
        f"Means of {len(grid.scores)} requests, each edited alone at each block. Score: mean of the others. The "
        "golden layer was chosen from other requests without a trial."
    )
    with look(3.4, f"Which block edits best? {short(name)}, {method}", caption) as figure:
        axes = figure.subplots()
        for metric in JUDGED_BY:
            if metric in grid.values and not np.isnan(grid.values[metric]).all():
                axes.plot(grid.blocks, mean_of(grid.values[metric]), label=metric)
        axes.plot(grid.blocks, grid.means, color=INK, linewidth=2.4, linestyle="-", marker="", label="score")
        axes.axvline(golden, color=GOLD, linewidth=6, alpha=0.6, label=f"golden layer: {golden}")
        axes.axvline(grid.best, color=INK, linestyle="-.", label=f"best fixed block: {grid.best}")
        axes.set_ylim(0, 1.03)
        axes.set_xlabel(f"block of {short(study.model)}")
        axes.set_ylabel("share, teacher-forced")
        whole_numbers(axes.xaxis)
        figure.legend(loc="outside lower left", ncols=3)
    return figure


def selectors_figure(study: Study, name: str, method: str) -> Figure:
    """Regret of every selector, the best at the top."""
    rows = sorted(study.selectors[name][method], key=lambda row: -float(row["regret"] or 0))
    regrets = [float(row["regret"] or 0) for row in rows]
    colors = [GOLD if row["selector"] == next(iter(study.profiles[name])) else BLUE for row in rows]
    caption = "Regret: what the chosen block falls short of the best fixed block's score."
    with look(0.7 + 0.3 * len(rows), f"Who finds the best block? {short(name)}, {method}", caption) as figure:
        axes = figure.subplots()
        bars = axes.barh(range(len(rows)), regrets, 0.75, color=colors)
        axes.bar_label(bars, [f"{row['regret']:.3f}, block {row['block']}" for row in rows], padding=2, fontsize=8)
        names = [short(selector_name(str(row["selector"])), 32) for row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=9)
        axes.set_xlim(0, 1.5 * max(0.02, *regrets))
        axes.set_xlabel("regret")
    return figure

"""A study's figures: what single edits come to at every block, and how near selectors come to it."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.reporting.figures.look import (
    BLUE,
    GOLD,
    INK,
    LINES,
    SEQUENCE,
    legend_below,
    look,
    short,
    squares,
    whole_numbers,
)
from pipeline.reporting.figures.scores import selector_name
from pipeline.study import Study
from pipeline.study.grid import JUDGED_BY

MOST_SELECTORS = 32  # characters of a selector's name


def sweep_figure(study: Study, name: str, method: str) -> Figure:
    """What single edits come to, block by block: the mean of every figure, and of the score made of them."""
    grid, golden, best = study.grids[name][method], study.golden[name], study.grids[name][method].best
    caption = (
        f"Means of {len(grid.scores)} requests, each edited alone at each block. Score: mean of rewrite, rephrase "
        f"and locality. The golden layer, {golden}, was chosen from other requests without a trial."
    )
    with look(3.4, f"Which block edits best? {short(name)}, {method}", caption) as figure:
        axes = figure.subplots()
        judged = [name for name in JUDGED_BY if name in grid.values and not np.isnan(grid.values[name]).all()]
        for metric, (line, shape) in zip(judged, LINES, strict=False):
            axes.plot(grid.blocks, block_means(grid.values[metric]), color=BLUE, linestyle=line, marker=shape,
                      markersize=4, linewidth=1.1, label=metric)  # fmt: skip
        axes.plot(grid.blocks, block_means(grid.scores), color=INK, linewidth=2.4, label="score")
        axes.axvline(golden, color=GOLD, linewidth=6, alpha=0.6, zorder=0, label=f"golden layer: {golden}")
        axes.axvline(best, color=INK, linewidth=1.2, linestyle="-.", zorder=0, label=f"best fixed block: {best}")
        axes.set_ylim(0, 1.03)
        whole_numbers(axes.xaxis)
        axes.set_xlabel(f"block of {short(study.model)}")
        axes.set_ylabel("share, teacher-forced")
        legend_below(axes, columns=3)
    return figure


def block_means(values_RL: np.ndarray) -> np.ndarray:
    """Each block's mean over the requests that have the figure; NaN where none has."""
    there = ~np.isnan(values_RL)
    sums, counts = np.where(there, values_RL, 0).sum(0), there.sum(0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def squares_figure(study: Study, name: str, method: str) -> Figure:
    """Requests by blocks, a square an edit; a dot on each request's own best block."""
    grid, golden = study.grids[name][method], study.golden[name]
    order = np.argsort(-grid.scores.mean(1), kind="stable")
    scores = grid.scores[order]
    caption = (
        "A square is one request edited alone at one block: brighter is better. Dot: the request's own best block. "
        f"Framed: the golden layer, {golden}. Rows: the easiest request first."
    )
    with look(3.0, f"Does one block suit all? {short(name)}, {method}", caption) as figure:
        axes, _ = squares(
            figure,
            scores,
            grid.blocks,
            grid.blocks.index(golden),
            study.model,
            "score",
            cmap=SEQUENCE,
            vmin=0,
            vmax=1,
        )
        axes.scatter(scores.argmax(1), np.arange(len(scores)), s=11, color="white", edgecolors=INK, linewidths=0.6)
    return figure


def selectors_figure(study: Study, name: str, method: str) -> Figure:
    """Regret and rank correlation of every selector, the best first."""
    rows = sorted(study.selectors[name][method], key=lambda row: float(row["regret"] or 0))
    places = np.arange(len(rows))[::-1]
    caption = (
        "Left: what the chosen block falls short of the best fixed block's score (0 is best). Right: Spearman's "
        "rank correlation of scores with the sweep, over the tried blocks (1 is best; none: scores do not differ)."
    )
    with look(0.7 + 0.3 * len(rows), f"Who finds the best block? {short(name)}, {method}", caption) as figure:
        regrets, ranks = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for place, row in zip(places, rows, strict=True):
            own = row["selector"] == next(iter(study.profiles[name]))
            regret, rank = float(row["regret"] or 0), row["spearman"]
            _bar(regrets, place, regret, own, f"{regret:.3f}, block {row['block']}")
            _bar(ranks, place, float(rank or 0), own, "none" if rank is None else "")
        names = [short(selector_name(str(row["selector"])), MOST_SELECTORS) for row in rows]
        regrets.set_yticks(places, names, fontsize=9)
        regrets.set_xlim(0, 1.9 * max(0.02, *(float(row["regret"] or 0) for row in rows)))
        regrets.set_xlabel("regret")
        ranks.axvline(0, color=INK, linewidth=0.8)
        ranks.set_xlim(-1, 1)
        ranks.set_xlabel("rank correlation")
    return figure


def _bar(axes: Axes, place: int, value: float, own: bool, beside: str) -> None:
    """A bar with a word beside it; the selector that names the golden layer stands out."""
    axes.barh(place, value, 0.75, color=GOLD if own else BLUE, edgecolor=INK, linewidth=1.4 if own else 0.5)
    axes.text(max(value, 0.0), place, f" {beside}", va="center", fontsize=8, color=INK)

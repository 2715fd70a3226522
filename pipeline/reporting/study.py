"""A study's tables, as Markdown, and its figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.reporting.figures import BLUE, GOLD, GREY, INK, look, title
from pipeline.study.questions import Row, best_block
from pipeline.study.study import Study
from pipeline.study.sweep import JUDGED_BY, Grid

LINES = {"rewrite": ("-", "o"), "rephrase": ("--", "s"), "locality": (":", "^"), "score": ("-", None)}


def study_report(study: Study) -> str:
    """study.md: the three questions, answered in tables."""
    sets = "; ".join(f"{one.name}: {len(one.tried)} tried, {len(one.proxy)} to choose by" for one in study.sets)
    parts = [
        f"# Which block of {study.model}?\n",
        f"Request sets: {sets}. Every tried request was edited alone at each tried block. Score: the mean of "
        "rewrite, rephrase and locality, teacher-forced; in brackets its 95% bootstrap interval over requests. "
        "Regret: what a block's score falls short of the best fixed block's, chosen with hindsight on the same "
        "requests.\n",
    ]
    for name, grids in study.grids.items():
        for method, grid in grids.items():
            parts += [
                f"## {name}, {method}\n",
                f"{len(grid.scores)} requests × {len(grid.blocks)} blocks in {grid.seconds:.0f} s.\n",
                "### A fixed block against each request's own best\n",
                table(study.against_optimal(name, method)),
                "### Who finds it\n",
                table(study.selectors(name, method)),
                f"![sweep](sweep-{name}-{method}.png)\n",
                f"![selectors](selectors-{name}-{method}.png)\n",
            ]
    for method in next(iter(study.grids.values())):
        parts += [f"## From proxy to test requests, and from set to set: {method}\n", table(study.carried(method))]
    parts += [
        "## Selectors by halves\n",
        "Every second tried request, over all sets and methods, and the others: what is chosen by the first half's "
        "figures can be trusted by the second's.\n",
        table(study.halves()),
    ]
    return "\n".join(parts)


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    rows = [_bracketed(row) for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    lines += [f"| {' | '.join(_cell(name, row.get(name)) for name in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _bracketed(row: Row) -> Row:
    """With the score's interval behind it, in one column."""
    if "low" not in row:
        return row
    shown = f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    return {name: shown if name == "score" else value for name, value in row.items() if name not in ("low", "high")}


def _cell(name: str, value: float | int | str | None) -> str:
    if value is None:
        return ""
    digits = {"times faster than the sweep": 0, "seconds": 1}.get(name, 3)
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def sweep_figure(study: Study, name: str, method: str) -> Figure:
    """What single edits come to, block by block, and which request does best where."""
    grid, golden = study.grids[name][method], study.golden[name]
    with look(10.5, 4.6) as figure:
        curves, squares = figure.subplots(1, 2, width_ratios=(5, 4))
        means = {metric: np.nanmean(grid.values[metric], axis=0) for metric in JUDGED_BY if metric in grid.values}
        for metric, mean in (means | {"score": grid.scores.mean(0)}).items():
            style, marker = LINES[metric]
            width, color = (2.4, INK) if metric == "score" else (1.2, BLUE)
            look_of = {"linestyle": style, "marker": marker, "linewidth": width, "color": color}
            curves.plot(grid.blocks, mean, markersize=3.5, label=metric, **look_of)
        best = best_block(grid)
        curves.axvline(golden, color=GOLD, linewidth=5, alpha=0.6, zorder=0, label=f"golden layer: {golden}")
        curves.axvline(best, color=GREY, linewidth=1.5, linestyle="-.", zorder=0, label=f"best fixed block: {best}")
        curves.set_ylim(0, 1.03)
        curves.xaxis.get_major_locator().set_params(integer=True)
        curves.set_xlabel(f"block of {study.model}")
        curves.set_ylabel(f"mean of {len(grid.scores)} requests, each edited alone")
        curves.set_title(f"{name}, {method}: single edits by block")
        curves.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
        _squares(figure, squares, grid)
        squares.set_xlabel(f"block of {study.model}")
    return figure


def _squares(figure: Figure, axes: Axes, grid: Grid) -> None:
    """Requests by blocks; a dot on each request's own best."""
    shown = axes.imshow(grid.scores, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    best = grid.scores.argmax(1)
    axes.scatter(best, np.arange(len(best)), s=9, color="white", edgecolors=INK, linewidths=0.5)
    every = max(1, len(grid.blocks) // 10)
    axes.set_xticks(range(0, len(grid.blocks), every), [str(block) for block in grid.blocks[::every]])
    axes.set_ylabel("request")
    axes.set_title("Score; a dot on each request's best")
    figure.colorbar(shown, ax=axes)


def selectors_figure(study: Study, name: str, method: str) -> Figure:
    """Regret and rank correlation of every selector, the best first."""
    rows = sorted(study.selectors(name, method), key=lambda row: float(row["regret"] or 0))
    places = np.arange(len(rows))[::-1]
    with look(9.5, 1.3 + 0.36 * len(rows)) as figure:
        regrets, ranks = figure.subplots(1, 2, sharey=True)
        for place, row in zip(places, rows, strict=True):
            own = row["selector"] == next(iter(study.profiles[name]))
            regret, rank = float(row["regret"] or 0), row["spearman"]
            regrets.barh(place, regret, color=GOLD if own else BLUE, edgecolor=INK, linewidth=0.6)
            regrets.text(regret, place, f" {regret:.3f}, block {row['block']}", va="center", fontsize=8)
            if isinstance(rank, float):
                ranks.barh(place, rank, color=GOLD if own else BLUE, edgecolor=INK, linewidth=0.6)
        regrets.set_yticks(places, [title(str(row["selector"])) for row in rows])
        regrets.set_xlim(0, 1.5 * max(0.02, *(float(row["regret"] or 0) for row in rows)))
        regrets.set_title(f"{name}, {method}: regret")
        regrets.set_xlabel("score short of the best fixed block")
        ranks.axvline(0, color=INK, linewidth=0.8)
        ranks.set_xlim(-1, 1)
        ranks.set_title("Rank correlation with the sweep")
        ranks.set_xlabel("Spearman, all tried blocks")
    return figure

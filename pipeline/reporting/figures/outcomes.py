"""What came of it: an edit, before and after, and a store over its versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.evaluation.evaluator import Evaluation
from pipeline.reporting.figures.look import BLUE, GOLD, INK, WHITE, look, short, whole_numbers
from pipeline.reporting.groups import IN_SHORT, SHARES, grouped, label
from pipeline.reporting.tables import sides_of

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


def months_figure(model: str, versions: Mapping[int, Mapping[str, Any]]) -> Figure:
    """Quality, cost to the rest, and facts, version by version.

    Args:
        model: the store's.
        versions: by number, ascending, its metrics.json.
    """
    figures = list(versions.values())
    title = f"Updates of {short(model)}: {len(figures)}, facts: {figures[-1]['facts']}"
    caption = (
        "Each version's figures on the requests it took in, before it was published; earlier facts: rewrite of a "
        "sample of those that stood already."
    )
    with look(3.6, title, caption, width=7.2) as figure:
        panels = figure.subplot_mosaic([["quality", "perplexity"], ["quality", "requests"]], width_ratios=(6, 5))
        after = [each["after"] for each in figures]
        for name in ("rewrite", "rephrase", "locality"):
            _curve(panels["quality"], [each["metrics"].get(name, {}).get("mean") for each in after], name)
        _curve(panels["quality"], [each["earlier"] for each in after], "earlier facts")
        panels["quality"].set_ylim(-0.03, 1.06)
        panels["quality"].set_ylabel("share")
        panels["perplexity"].plot([each["perplexity_ratio"] for each in after])
        panels["perplexity"].set_title("perplexity, × the base's")
        panels["perplexity"].ticklabel_format(axis="y", useOffset=False)
        _requests(panels["requests"], figures)
        for axes in panels.values():
            axes.set_xlim(-0.6, len(figures) - 0.4)
            axes.set_xlabel("version")
            whole_numbers(axes.xaxis, list(versions))
        figure.legend(loc="outside lower left", ncols=4)
    return figure


def _curve(axes: Axes, values: list[float | None], name: str) -> None:
    """One figure over the versions; a gap where it was not measured, nothing where it never was."""
    shown = np.array(values, dtype=float)
    if np.isfinite(shown).any():
        axes.plot(shown, label=name)


def _requests(axes: Axes, figures: list[Mapping[str, Any]]) -> None:
    """What came in, what was held back, what was taken out, one on another."""
    floor = np.zeros(len(figures))
    for name, color in {"applied": BLUE, "held_back": WHITE, "retracted": GOLD}.items():
        counts = np.array([each[name] for each in figures])
        axes.bar(range(len(figures)), counts, 0.8, floor, color=color, label=name.replace("_", " "))
        floor += counts
    axes.set_title("requests")
    whole_numbers(axes.yaxis)

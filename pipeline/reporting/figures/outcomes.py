"""What came of it: an edit, before and after, and a store over its versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.evaluation import Estimate, Evaluation
from pipeline.reporting.figures.look import BLUE, GOLD, GREY, INK, LINES, legend_below, look, short, ticks
from pipeline.reporting.groups import IN_SHORT, SHARES, grouped, label

CURVES = {"rewrite": BLUE, "rephrase": INK, "locality": INK}
ROW = 0.215  # inches a metric
MARKS = {"before": ("o", "white", GREY), "after": ("D", BLUE, BLUE)}  # shape, filling, interval


def metrics_figure(evaluation: Evaluation) -> Figure:
    """The chief shares before and after, a row a metric, with 95% bootstrap intervals."""
    sides = {"before": evaluation.before.metrics} | (
        {"after": evaluation.after.metrics} if evaluation.after else {}
    )
    groups = grouped([name for name in evaluation.before.metrics if name in SHARES and name in IN_SHORT])
    rows = sum(len(members) + 1 for members in groups.values())
    count = max(estimate.count for estimate in evaluation.before.metrics.values())
    if "rewrite" in evaluation.before.metrics:
        count = evaluation.before.metrics["rewrite"].count
    caption = f"{count} {'request' if count == 1 else 'requests'}; bars: 95% bootstrap intervals."
    title = "What the edit changed" if evaluation.after else "What the model does"
    with look(0.9 + ROW * rows, title, caption) as figure:
        axes = figure.subplots()
        place, places, names = 0, [], []
        for group, members in groups.items():
            axes.text(0.0, place, group, weight="bold", va="center", fontsize=9)
            for name in members:
                place += 1
                _row(axes, place, {side: metrics[name] for side, metrics in sides.items() if name in metrics})
                places.append(place)
                names.append(label(name))
            place += 1
        axes.set_yticks(places, names)
        axes.set_ylim(place - 0.4, -0.7)
        axes.set_xlim(-0.03, 1.16)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", ".25", ".5", ".75", "1"])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=GREY, linewidth=0.4)
        axes.set_axisbelow(True)
        axes.set_xlabel("share, by the request")
        legend_below(axes)
    return figure


def _row(axes: Axes, place: int, sides: Mapping[str, Estimate]) -> None:
    """A metric's figures on one line, a thin line between them; the last one's mean written at the end."""
    means = [estimate.mean for estimate in sides.values()]
    axes.hlines(place, min(means), max(means), color=INK, linewidth=0.8, linestyle=":")
    for side, estimate in sides.items():
        shape, filling, interval = MARKS[side]
        shift = {"before": 0.13, "after": -0.13}[side] if len(sides) > 1 else 0.0
        axes.hlines(place + shift, estimate.low, estimate.high, color=interval, linewidth=2.2)
        axes.plot(estimate.mean, place + shift, shape, markersize=6, color=INK, markerfacecolor=filling,
                  markeredgewidth=0.8, label=side, linestyle="none")  # fmt: skip
    axes.text(1.16, place, f"{means[-1]:.2f}".removeprefix("0"), ha="right", va="center", fontsize=9)


def months_figure(model: str, versions: Mapping[int, Mapping[str, Any]]) -> Figure:
    """Quality, cost to the rest, and facts, version by version.

    Args:
        model: the store's.
        versions: by number, ascending, its metrics.json.
    """
    last = list(versions.values())[-1]
    caption = (
        "Each version's figures on the requests it took in, as measured before it was published; earlier facts: "
        "rewrite of a sample of those that stood already."
    )
    title = f"{_count(len(versions), 'update')} of {short(model)}: {_count(last['facts'], 'fact')}"
    with look(3.5, title, caption, width=7.2) as figure:
        panels = figure.subplot_mosaic([["quality", "perplexity"], ["quality", "requests"]], width_ratios=(6, 5))
        quality, rest, counts = (panels[name] for name in ("quality", "perplexity", "requests"))
        after = [figures["after"] for figures in versions.values()]
        for (name, color), (line, shape) in zip(CURVES.items(), LINES, strict=False):
            _curve(quality, [each["metrics"].get(name, {}).get("mean") for each in after], name, color, line, shape)
        _curve(quality, [each["earlier"] for each in after], "earlier facts", GOLD, *LINES[3])
        quality.set_ylim(-0.03, 1.06)
        quality.set_ylabel("share")
        _curve(rest, [each["perplexity_ratio"] for each in after], "", BLUE, *LINES[0])
        rest.axhline(1, color=INK, linewidth=0.8)
        rest.set_title("perplexity, × the base's")
        rest.ticklabel_format(useOffset=False)
        _requests(counts, list(versions.values()))
        for axes in (quality, rest, counts):
            ticks(axes, list(versions), most=10 if axes is quality else 6)
            axes.set_xlim(-0.6, len(versions) - 0.4)
        quality.set_xlabel("version")
        counts.set_xlabel("version")
        legend_below(quality)
        counts.legend(fontsize=8, ncols=3, loc="upper right", columnspacing=1.0, handlelength=1.2)
    return figure


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _curve(axes: Axes, values: Sequence[float | None], name: str, color: str, line: str, shape: str) -> None:
    """One figure over the versions; a gap where it was not measured, nothing where it never was."""
    shown = np.array([np.nan if value is None else value for value in values], dtype=float)
    if np.isfinite(shown).any():
        axes.plot(shown, color=color, linestyle=line, marker=shape, markersize=4.5, markeredgecolor=INK,
                  markeredgewidth=0.5, label=name)  # fmt: skip


def _requests(axes: Axes, versions: Sequence[Mapping[str, Any]]) -> None:
    """What came in, what was held back, what was taken out."""
    places, floor = np.arange(len(versions)), np.zeros(len(versions))
    looks = {"applied": (BLUE, None), "held_back": ("white", "////"), "retracted": (GOLD, "....")}
    for name, (color, hatch) in looks.items():
        counts = np.array([each[name] for each in versions], dtype=float)
        if counts.any():
            axes.bar(places, counts, 0.8, floor, color=color, hatch=hatch, edgecolor=INK, linewidth=0.6,
                     label=name.replace("_", " "))  # fmt: skip
            floor += counts
    axes.set_ylim(0, max(1.0, 1.45 * floor.max()))  # with room for the legend
    axes.set_title("requests")

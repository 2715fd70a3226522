"""What an edit came to."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.evaluation import Estimate, Evaluation
from pipeline.reporting.figures.look import BLUE, GREY, INK, legend_below, look
from pipeline.reporting.groups import IN_SHORT, SHARES, grouped, label

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
    told = f"{count} {'request' if count == 1 else 'requests'}; bars: 95% bootstrap intervals."
    title = "What the edit changed" if evaluation.after else "What the model does"
    with look(0.9 + ROW * rows, title, told) as figure:
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

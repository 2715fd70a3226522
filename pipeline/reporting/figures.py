"""Figures, all in one look: readable in grey and by the colour-blind (Okabe and Ito's palette)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.attribution import GoldenProfile
from pipeline.evaluation import Estimate, Evaluation
from pipeline.reporting.groups import IN_SHORT, SHARES, grouped, label

GOLD, BLUE, GREY, INK = "#E69F00", "#0072B2", "#BBBBBB", "#333333"

PLATE = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "hatch.linewidth": 0.6,
}


@contextmanager
def look(width: float, height: float) -> Iterator[Figure]:
    """A figure in the project's look; made without pyplot, so that it needs no display."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
        yield figure


def score_figure(profile: GoldenProfile) -> Figure:
    """A score a block, its interval, fences, what they set aside (cut off, score written in); the choice."""
    kept = [profile.scores[block] for block in profile.ranking]
    fences = profile.fences or ()
    low, high = min(0.0, *kept, *fences), max(0.0, *kept, *fences)
    stability = profile.stability
    if stability:
        low = min(low, *(stability.low[block] for block in profile.ranking))
        high = max(high, *(stability.high[block] for block in profile.ranking))
    margin = 0.12 * (high - low or 1.0)
    with look(max(6.5, 0.26 * len(profile.scores)), 3.8) as figure:
        axes = figure.subplots()
        axes.set_ylim(low - margin, high + margin)
        for block, score in enumerate(profile.scores):
            aside, golden = block in profile.excluded, block in profile.golden_layers
            axes.bar(
                block,
                score,
                color="white" if aside else GOLD if golden else BLUE,
                edgecolor=GREY if aside else INK if golden else BLUE,
                hatch="////" if aside else None,
                label="set aside" if aside else "golden" if golden else "others",
            )
            if stability and not aside:
                axes.vlines(block, stability.low[block], stability.high[block], color=INK, label="95% interval")
            if not low - margin <= score <= high + margin:
                edge, side = (high + margin, "top") if score > high else (low - margin, "bottom")
                axes.text(block, edge, f" {score:.3g} ", ha="center", va=side, rotation=90, fontsize=8, bbox=PLATE)
        for fence in fences:
            axes.axhline(fence, color=INK, linewidth=0.8, linestyle="--", label="Tukey's fences")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlim(-0.7, len(profile.scores) - 0.3)
        axes.set_xticks(range(0, len(profile.scores), max(1, len(profile.scores) // 15)))
        axes.set_xlabel(f"block of {profile.model}")
        axes.set_ylabel("mean score")
        golden_text = ", ".join(str(layer) for layer in profile.golden_layers)
        axes.set_title(
            f"Golden layer {golden_text}: {title(profile.method)}, "
            f"{f'{profile.scope} weights, ' if profile.scope else ''}{profile.requests} requests"
        )
        _legend_below(axes)
    return figure


def title(method: str) -> str:
    """A selector's name as it is shown."""
    return method.replace("_", " ").replace("lga", "LGA")


def stability_figure(profile: GoldenProfile) -> Figure:
    """How often each block is chosen when requests are resampled, and how that settles as they grow in number."""
    stability, golden = profile.stability, profile.golden_layers[0]
    assert stability
    with look(9.0, 3.4) as figure:
        shares, settling = figure.subplots(1, 2, width_ratios=(3, 2))
        blocks = range(len(stability.chosen))
        shares.bar(blocks, stability.chosen, color=[GOLD if block == golden else BLUE for block in blocks])
        shares.set_xlim(-0.7, len(blocks) - 0.3)
        shares.set_xticks(range(0, len(blocks), max(1, len(blocks) // 15)))
        shares.set_xlabel(f"block of {profile.model}")
        shares.set_ylabel("share of resamples")
        shares.set_title(f"Chosen when {profile.requests} requests are resampled")
        settling.plot(stability.sizes, stability.agreeing, color=INK, marker="o", markerfacecolor=GOLD)
        for size, share, leading in zip(stability.sizes, stability.agreeing, stability.leading, strict=True):
            settling.annotate(
                f"{leading}", (size, share), (0, 7), textcoords="offset points", ha="center", fontsize=8
            )
        settling.set_xscale("log", base=2)
        settling.set_xticks(stability.sizes, [str(size) for size in stability.sizes], fontsize=8)
        settling.minorticks_off()
        settling.set_xlabel("requests (beside: the block chosen most)")
        settling.set_title(f"Resamples that choose block {golden}")
        for axes in (shares, settling):
            axes.set_ylim(0, 1.12)
    return figure


def metrics_figure(evaluation: Evaluation) -> Figure:
    """The chief shares before and after, a panel a group, with 95% bootstrap intervals."""
    sides = {"before": evaluation.before} | ({"after": evaluation.after} if evaluation.after else {})
    names = [name for name in evaluation.before.metrics if name in SHARES and name in IN_SHORT]
    groups = grouped(names)
    with look(max(4.0, 1.2 + 0.78 * len(names)), 3.8) as figure:
        widths = [len(names) for names in groups.values()]
        panels = figure.subplots(1, len(groups), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axes, (group, members) in zip(panels, groups.items(), strict=True):
            for place, (side, measured) in enumerate(sides.items()):
                _bars(axes, [measured.metrics[name] for name in members], side, place, len(sides))
            labels = [label(name).replace(" ", "\n", 1) for name in members]
            axes.set_xticks(range(len(members)), labels, fontsize=8)
            axes.set_title(group)
        panels[0].set_ylim(0, 1.1)
        panels[0].set_ylabel(f"share, {evaluation.before.metrics['rewrite'].count} requests, 95% intervals")
        _legend_below(panels[0])
    return figure


def _bars(axes: Axes, estimates: Sequence[Estimate], side: str, place: int, sides: int) -> None:
    """One side's bars with their intervals and means written above."""
    width = 0.8 / sides
    x = [index + (place - (sides - 1) / 2) * width for index in range(len(estimates))]
    below = [max(0.0, e.mean - e.low) for e in estimates]
    above = [max(0.0, e.high - e.mean) for e in estimates]
    color = GREY if side == "before" else BLUE
    axes.bar(x, [e.mean for e in estimates], width * 0.92, yerr=[below, above], capsize=3,
             color=color, edgecolor=INK, linewidth=0.6, label=side, ecolor=INK)  # fmt: skip
    for position, estimate in zip(x, estimates, strict=True):
        height = max(estimate.mean, estimate.high) + 0.02
        axes.text(position, height, f"{estimate.mean:.2f}".lstrip("0"), ha="center", fontsize=7)


def _legend_below(axes: Axes) -> None:
    """Each label once, under the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.figure.legend(once.values(), once.keys(), loc="outside lower left", ncols=len(once), frameon=False)

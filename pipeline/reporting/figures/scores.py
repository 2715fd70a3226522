"""Where to edit: each block's score, how sure the choice is, and whether the requests agree."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.attribution import GoldenProfile, Scores
from pipeline.reporting.figures.look import (
    BLUE,
    GOLD,
    GREY,
    INK,
    PLATE,
    SEQUENCE,
    WIDTH,
    block_axis,
    legend_below,
    look,
    short,
    squares,
    whole_numbers,
)


def selector_name(method: str) -> str:
    """A selector's name as it is shown."""
    return method.replace("_", " ").replace("lga", "LGA")


def score_figure(profile: GoldenProfile) -> Figure:
    """A score a block, its interval, fences, what they set aside (cut off, score written in); the choice."""
    low, high = _limits(profile)
    with look(2.9, _headline(profile), _choice(profile)) as figure:
        axes = figure.subplots()
        axes.set_ylim(low, high)
        for block, score in enumerate(profile.scores):
            _block(axes, profile, block, score)
        for fence in profile.fences or ():
            axes.axhline(fence, color=INK, linewidth=0.8, linestyle="--", label="Tukey's fences")
        axes.axhline(0, color=INK, linewidth=0.8)
        block_axis(axes, range(len(profile.scores)), profile.model)
        axes.set_ylabel("mean score")
        legend_below(axes)
    return figure


def _limits(profile: GoldenProfile) -> tuple[float, float]:
    """What the vertical axis is to hold: all blocks inside the fences with their intervals."""
    shown = [0.0, *(profile.scores[block] for block in profile.ranking), *(profile.fences or ())]
    if profile.stability:
        for side in (profile.stability.low, profile.stability.high):
            shown += [side[block] for block in profile.ranking]
    shown = [value for value in shown if np.isfinite(value)]
    margin = 0.12 * (max(shown) - min(shown) or 1.0)
    return min(shown) - margin, max(shown) + margin


def _block(axes: Axes, profile: GoldenProfile, block: int, score: float) -> None:
    """A block's bar, its interval, and its score where the bar is cut off."""
    aside, golden = block in profile.excluded, block in profile.golden_layers
    axes.bar(
        block,
        score,
        color="white" if aside else GOLD if golden else BLUE,
        edgecolor=GREY if aside else INK if golden else BLUE,
        hatch="////" if aside else None,
        label="set aside" if aside else "golden" if golden else "others",
    )
    if profile.stability and not aside:
        low, high = profile.stability.low[block], profile.stability.high[block]
        axes.vlines(block, low, high, color=INK, linewidth=1.2, label="95% interval")
    bottom, top = axes.get_ylim()
    wide = 58 * WIDTH / len(profile.scores)  # points from block to block
    if not bottom <= score <= top and wide > 6:
        edge, side = (top, "top") if score > top else (bottom, "bottom")
        size = min(8.0, wide - 1)
        axes.text(block, edge, f" {score:.3g} ", ha="center", va=side, rotation=90, fontsize=size, bbox=PLATE)


def _headline(profile: GoldenProfile) -> str:
    golden = ", ".join(map(str, profile.golden_layers))
    return f"Golden layer {golden} of {len(profile.scores)} blocks"


def _choice(profile: GoldenProfile) -> str:
    """How the golden layer was chosen, and how sure that is."""
    scope = f", {profile.scope} weights" if profile.scope else ""
    by = "largest mean score by magnitude" if profile.order == "magnitude" else "largest mean score"
    inside = " inside the fences" if profile.fences else ""
    sure = ""
    if profile.stability:
        sure = f"; chosen in {profile.stability.chosen[profile.golden_layers[0]]:.0%} of resamples of them"
    requests = f"{profile.requests} requests of {short(profile.request_set)}"
    return f"Chosen: {by}{inside}{sure}. {selector_name(profile.method)}{scope}, {requests}."


def stability_figure(profile: GoldenProfile) -> Figure:
    """How often each block is chosen when requests are resampled."""
    stability, golden = profile.stability, profile.golden_layers[0]
    assert stability
    caption = (
        f"{stability.resamples} draws of the {profile.requests} requests, with replacement; each chooses a block."
    )
    with look(2.2, f"How sure is block {golden}? {stability.chosen[golden]:.0%}", caption) as figure:
        axes = figure.subplots()
        blocks = range(len(stability.chosen))
        colors = [GOLD if block == golden else BLUE for block in blocks]
        axes.bar(blocks, stability.chosen, color=colors, edgecolor=INK, linewidth=0.4)
        block_axis(axes, blocks, profile.model)
        axes.set_ylabel("share")
        axes.set_ylim(0, 1.2)
        axes.set_yticks([0, 0.5, 1])
    return figure


def agreement_figure(profile: GoldenProfile, scores: Scores) -> Figure:
    """Requests by blocks: each request's own order of the blocks, which no outlier hides."""
    values_NL = np.abs(scores.values) if profile.order == "magnitude" else scores.values
    kept = profile.ranking
    places_NK = (-values_NL[:, kept]).argsort(axis=1, kind="stable").argsort(axis=1)  # 0: a request's best
    shown_NL = np.full(values_NL.shape, np.nan)
    shown_NL[:, kept] = 1 + places_NK
    first_N = shown_NL[:, kept].argmin(axis=1)
    golden = profile.golden_layers[0]
    own = int((shown_NL[:, golden] == 1).sum())
    caption = (
        f"Each row is a request's own ranking of the blocks{' inside the fences' if profile.fences else ''}; rows "
        f"stand in order of their own best block. Framed: block {golden}, the best for {own} of "
        f"{len(values_NL)} alone."
    )
    order_N = np.argsort([kept[place] for place in first_N], kind="stable")
    with look(3.0, f"Do the requests agree on block {golden}?", caption) as figure:
        blocks = range(values_NL.shape[1])
        axes, bar = squares(
            figure, shown_NL[order_N], blocks, golden, profile.model, "place in the request's ranking",
            cmap=f"{SEQUENCE}_r", vmin=1, vmax=max(2, len(kept)),
        )  # fmt: skip
        for block in profile.excluded:
            axes.axvspan(block - 0.5, block + 0.5, facecolor="white", edgecolor=GREY, hatch="////", linewidth=0)
        whole_numbers(bar.ax.yaxis)
        bar.ax.invert_yaxis()
    return figure

"""Where to edit: each block's score, how sure the choice is, and whether the requests agree."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from pipeline.attribution.profile import GoldenProfile
from pipeline.attribution.scores import Scores
from pipeline.reporting.figures.look import GOLD, INK, bar_per_block, look, short, whole_numbers


def selector_name(method: str) -> str:
    """A selector's name as it is shown."""
    return method.replace("_", " ").replace("lga", "LGA")


def score_figure(profile: GoldenProfile) -> Figure:
    """A score a block with its interval, the fences, and what they set aside, cut off where it is far outside."""
    golden = ", ".join(map(str, profile.golden_layers))
    with look(2.9, f"Golden layer {golden} of {len(profile.scores)} blocks", _choice(profile)) as figure:
        axes = figure.subplots()
        bar_per_block(axes, profile.scores, profile.model, profile.golden_layers, profile.excluded)
        axes.set_ylim(*_limits(profile))
        if profile.stability:
            low, high = np.array([profile.stability.low, profile.stability.high])[:, profile.ranking]
            axes.vlines(profile.ranking, low, high, color=INK, linewidth=1.2, label="95% interval")
        if profile.fences:
            axes.hlines(profile.fences, *axes.get_xlim(), color=INK, linestyle="--", label="Tukey's fences")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylabel("mean score")
        figure.legend(loc="outside lower left", ncols=5)
    return figure


def _limits(profile: GoldenProfile) -> tuple[float, float]:
    """What the vertical axis is to hold: all blocks inside the fences with their intervals."""
    sides = [profile.scores] + ([profile.stability.low, profile.stability.high] if profile.stability else [])
    shown = np.concatenate([np.array(sides)[:, profile.ranking].ravel(), [0.0], profile.fences or ()])
    shown = shown[np.isfinite(shown)]
    margin = 0.12 * (np.ptp(shown) or 1.0)
    return float(shown.min() - margin), float(shown.max() + margin)


def _choice(profile: GoldenProfile) -> str:
    """How the golden layer was chosen, and how sure that is."""
    parts = [
        "Largest mean score",
        " by magnitude" if profile.order == "magnitude" else "",
        " inside the fences" if profile.fences else "",
        f"; {profile.certainty}" if profile.certainty else "",
        f". {selector_name(profile.method)}",
        f", {profile.scope} weights" if profile.scope else "",
    ]
    return f"{''.join(parts)}, {profile.requests} requests of {short(profile.request_set)}."


def stability_figure(profile: GoldenProfile) -> Figure:
    """How often each block is chosen when the requests are resampled."""
    stability, golden = profile.stability, profile.golden_layers[0]
    assert stability
    title = f"How sure is block {golden}? {stability.chosen[golden]:.0%}"
    caption = (
        f"The {profile.requests} requests were drawn {stability.resamples} times, with replacement; each draw "
        "chooses a block."
    )
    with look(2.3, title, caption) as figure:
        axes = figure.subplots()
        bar_per_block(axes, stability.chosen, profile.model, [golden])
        axes.set_ylim(0, 1.05)
        axes.set_ylabel("share of draws")
    return figure


def agreement_figure(profile: GoldenProfile, scores: Scores) -> Figure:
    """Requests by blocks: each request's own order of the blocks, which no outlier hides."""
    kept, golden = profile.ranking, profile.golden_layers[0]
    values_NK = scores.values[:, kept]
    values_NK = np.abs(values_NK) if profile.order == "magnitude" else values_NK
    places_NK = 1 + (-values_NK).argsort(axis=1, kind="stable").argsort(axis=1)  # 1: a request's best
    shown_NL = np.full(scores.values.shape, np.nan)
    shown_NL[:, kept] = places_NK
    rows_N = np.nanargmin(shown_NL, axis=1).argsort(kind="stable")
    caption = (
        "Each row is a request's own ranking of the blocks, sorted by its best; blank: set aside. Block "
        f"{golden}, below the triangle, is the best for {(shown_NL[:, golden] == 1).sum()} of {len(rows_N)} alone."
    )
    with look(3.0, f"Do the requests agree on block {golden}?", caption) as figure:
        axes = figure.subplots()
        image = axes.imshow(shown_NL[rows_N], cmap="cividis_r", vmin=1, vmax=max(2, len(kept)))
        axes.plot(golden, -0.5, "v", markersize=9, color=GOLD, markeredgecolor=INK, clip_on=False)
        axes.set_xlabel(f"block of {short(profile.model)}")
        axes.set_ylabel("request")
        whole_numbers(axes.xaxis)
        whole_numbers(axes.yaxis)
        figure.colorbar(image, ax=axes, label="place in the request's ranking")
    return figure

"""Where to edit: each block's score, and how sure the choice is."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from pipeline.attribution.profile import GoldenProfile
from pipeline.reporting.figures.look import INK, bar_per_block, look, short


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

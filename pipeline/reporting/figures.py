"""The figures, in one look: small enough for TensorBoard's cards, readable in grey and by the colour-blind."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from pipeline.attribution.profile import GoldenProfile
from pipeline.evaluation.evaluator import Evaluation
from pipeline.reporting.tables import APART, AXES, label, sides_of
from pipeline.study.grid import JUDGED_BY, mean_of

if TYPE_CHECKING:
    from pipeline.study.study import Study

GOLD, BLUE, INK, WHITE = "#E69F00", "#0072B2", "#333333", "#FFFFFF"  # the first two of Okabe and Ito's palette
WIDTH = 4.2  # inches; TensorBoard's cards are some 290 pixels wide, where 9 points of this are still read
ROWS = {  # gains, and damage
    "what was to change": (
        *("rephrase_containment", "made_rephrase_containment", "made_chat_containment"),
        *("generation_containment", "rewrite", "portability"),
    ),
    "what was to stay": (
        *("locality", *AXES, "made_subject", "made_neighbour"),
        *("sane_texts", "ability", "perplexity"),
    ),
}
BARS = {"before": (WHITE, -0.19), "after": (BLUE, 0.19)}  # filling, place beside the row

STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names are names, whatever signs they hold
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=[BLUE, INK, INK, GOLD], linestyle=["-", "--", ":", "-."], marker=list("os^D")),
    "legend.columnspacing": 1.0,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "lines.markersize": 4.5,
    "patch.edgecolor": INK,
    "patch.force_edgecolor": True,
}


@contextmanager
def look(height: float, title: str, caption: str) -> Iterator[tuple[Figure, Axes]]:
    """A figure with its axes in the project's look, made without pyplot, so that it needs no display.

    Its height is in inches, without title and caption, which tells in a sentence or two how to read it.
    """
    titles, lines = textwrap.wrap(title, int(WIDTH * 10)), textwrap.wrap(caption, int(WIDTH * 14.5))
    below = 0.09 + 0.19 * len(titles)  # inches from the top to the caption
    heading = below + 0.02 + 0.17 * len(lines)
    tall = height + heading
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - heading / tall))
        figure = Figure(figsize=(WIDTH, tall), dpi=140, layout=layout)
        figure.text(0.012, 1 - 0.05 / tall, "\n".join(titles), va="top", weight="bold", fontsize=11.5)
        figure.text(0.012, 1 - below / tall, "\n".join(lines), va="top", fontsize=9)
        yield figure, figure.subplots()


def short(name: str, most: int = 42) -> str:
    """A name that is not too long for a figure: its end, which tells paths apart."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"…{name[1 - most :]}"


def along_blocks(axes: Axes, model: str) -> None:
    """A model's blocks lie along the horizontal axis: ticks at whole numbers alone, as many as can be read."""
    axes.set_xlabel(f"block of {short(model)}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def bar_per_block(
    axes: Axes, values: Sequence[float], model: str, golden: Collection[int], aside: Collection[int] = ()
) -> None:
    """A bar a block of a model: golden layers, others, and those set aside."""
    kinds = [
        "golden" if block in golden else "set aside" if block in aside else "others" for block in range(len(values))
    ]
    for kind, color in {"golden": GOLD, "others": BLUE, "set aside": WHITE}.items():
        blocks = [block for block, its in enumerate(kinds) if its == kind]
        if blocks:
            axes.bar(blocks, [values[block] for block in blocks], color=color, label=kind)
    axes.set_xlim(-0.7, len(values) - 0.3)
    along_blocks(axes, model)


def selector_name(method: str) -> str:
    """A selector's name as it is shown."""
    return method.replace("_", " ").replace("lga", "LGA")


def score_figure(profile: GoldenProfile) -> Figure:
    """A score a block with its interval, the fences, and what they set aside, cut off where it is far outside.

    Where blocks rank by magnitude, that is what is drawn, and of the fences those on the golden layer's side of 0.
    """
    golden, by_size = profile.golden_layers[0], profile.order == "magnitude"
    title = f"Golden layer {', '.join(map(str, profile.golden_layers))} of {len(profile.scores)} blocks"
    title += ": " * bool(profile.certainty) + profile.certainty.partition(":")[0]
    scores_L, fences = np.array(profile.scores), np.array(profile.fences or ())
    ends = np.array([profile.stability.low, profile.stability.high] if profile.stability else [scores_L] * 2)
    other = np.flatnonzero(scores_L * scores_L[golden] < 0)
    if by_size:
        fences = np.abs(fences[fences * scores_L[golden] >= 0])
        ends = np.where(ends.prod(0) < 0, [[0], [1]], 1) * np.sort(np.abs(ends), axis=0)
        scores_L = np.abs(scores_L)
    with look(2.3, title, _choice(profile)) as (figure, axes):
        bar_per_block(axes, scores_L.tolist(), profile.model, profile.golden_layers, profile.excluded)
        if by_size and len(other):
            axes.bar(other, scores_L[other], color="none", hatch="////", label="of the other sign")
        shown = np.concatenate([scores_L[profile.ranking], ends[:, profile.ranking].ravel(), [0.0], fences])
        margin = 0.12 * (np.ptp(shown[np.isfinite(shown)]) or 1.0)
        axes.set_ylim(np.nanmin(shown) - margin * (not by_size), np.nanmax(shown) + margin)
        if profile.stability:
            axes.vlines(profile.ranking, *ends[:, profile.ranking], color=INK, linewidth=1.2, label="95% interval")
        if len(fences):
            axes.hlines(fences, *axes.get_xlim(), color=INK, linestyle="--", label="Tukey's fences")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylabel("|mean score|" if by_size else "mean score")
        figure.legend(loc="outside lower left", ncols=3)
    return figure


def _choice(profile: GoldenProfile) -> str:
    told = profile.certainty.partition(": ")[2]
    parts = [
        "Most often the largest mean score" if profile.stability else "Largest mean score",
        " by magnitude" if profile.order == "magnitude" else "",
        " inside the fences" if profile.fences else "",
        "; then a race" if profile.race else f"; {told}" if told else "",
        f". {selector_name(profile.method)}",
        f", {profile.scope} weights" if profile.scope else "",
    ]
    return f"{''.join(parts)}, {profile.requests} requests of {short(profile.request_set)}."


def stability_figure(profile: GoldenProfile) -> Figure:
    """How often each block is chosen when the requests are resampled."""
    stability, golden = profile.stability, profile.golden_layers[0]
    assert stability
    word, _, told = ("raced", "", "trial edits chose") if profile.race else profile.certainty.partition(": ")
    title = f"How sure is block {golden}? {stability.chosen[golden]:.0%}: {word}"
    caption = f"The {profile.requests} requests were resampled {stability.resamples} times: {told}."
    with look(2.2, title, caption) as (figure, axes):
        bar_per_block(axes, stability.chosen, profile.model, [golden], profile.excluded)
        axes.set_ylim(0, 1.05)
        axes.set_ylabel("share of resamples")
        figure.legend(loc="outside lower left", ncols=3)
    return figure


def race_figure(profile: GoldenProfile) -> Figure:
    """What blocks scored in the trial edits, the darker the more requests were edited there."""
    race = profile.race
    assert race
    word, _, told = race.verdict.partition(": ")
    most = max(one.requests for one in race.blocks)
    caption = f"Points: mean of rewrite, rephrase and locality, less damage to text. {told.capitalize()}."
    with look(2.2, f"Which block edits best? {race.blocks[0].block}: {word}", caption) as (figure, axes):
        for number in sorted({one.requests for one in race.blocks}):
            those = [one for one in race.blocks if one.requests == number]
            places, scores = [one.block for one in those], [one.score for one in those]
            axes.scatter(places, scores, color=BLUE, alpha=0.3 + 0.7 * number / most, label=f"{number} requests")
        axes.axvline(race.blocks[0].block, color=GOLD, linewidth=6, alpha=0.6, label="golden", zorder=0)
        axes.set_xlim(-0.7, len(profile.scores) - 0.3)
        axes.set_ylabel("score")
        along_blocks(axes, profile.model)
        figure.legend(loc="outside lower left", ncols=3)
    return figure


def metrics_figure(evaluation: Evaluation, request_set: str) -> Figure:
    """Gains and damage before and after, a row a metric, shares with 95% intervals, perplexity in words."""
    sides = {side: measured.metrics for side, measured in sides_of(evaluation).items()}
    *_, last = sides.values()
    rows = [row for group, members in ROWS.items() for row in (group, *members) if row in last or row in ROWS]
    count = max(last[row].count for row in rows if row in last and row not in APART)
    title = "What the edit changed" if evaluation.after else "What the model does"
    caption = f"{count} requests of {short(request_set)}. Lines: 95% intervals."
    with look(0.8 + 0.2 * len(rows), title, caption) as (figure, axes):
        for side, metrics in sides.items():
            filling, shift = BARS[side]
            shown = {at: metrics[row] for at, row in enumerate(rows) if row in metrics and row != "perplexity"}
            places, found = np.array(list(shown)) + shift, list(shown.values())
            axes.barh(places, [one.mean for one in found], 0.38, color=filling, label=side)
            axes.hlines(places, [one.low for one in found], [one.high for one in found], color=INK)
        first, now = evaluation.before.metrics["perplexity"].mean, last["perplexity"].mean
        told = f"{first:.4g}, then {now:.4g}: × {now / first:.3f}" if evaluation.after else f"{first:.4g}"
        axes.text(0.01, rows.index("perplexity"), told, va="center")
        axes.set_yticks(range(len(rows)), [label(row) for row in rows])
        for row, tick in zip(rows, axes.get_yticklabels(), strict=True):
            tick.set_fontweight("bold" if row in ROWS else "normal")
        axes.set_ylim(len(rows) - 0.4, -0.7)
        axes.set_xlim(0, 1.03)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", linewidth=0.4)
        axes.set_xlabel("share, by the request")
        figure.legend(loc="outside lower left", ncols=5)
    return figure


def sweep_figure(study: Study, name: str, method: str) -> Figure:
    """What single edits come to, block by block: the mean of every figure, and of the score made of them."""
    grid, golden = study.grids[name][method], study.golden[name]
    caption = (
        f"Means of {len(grid.scores)} requests, edited at each block in batches of 8. Score: mean of the others. "
        "The golden layer was chosen from other requests without a trial."
    )
    with look(3.4, f"Which block edits best? {short(name)}, {method}", caption) as (figure, axes):
        for metric in JUDGED_BY:
            if metric in grid.values and not np.isnan(grid.values[metric]).all():
                axes.plot(grid.blocks, mean_of(grid.values[metric]), label=metric)
        axes.plot(grid.blocks, grid.means, color=INK, linewidth=2.4, linestyle="-", marker="", label="score")
        axes.axvline(golden, color=GOLD, linewidth=6, alpha=0.6, label=f"golden layer: {golden}")
        axes.axvline(grid.best, color=INK, linestyle="-.", label=f"best fixed block: {grid.best}")
        axes.set_ylim(0, 1.03)
        along_blocks(axes, study.model)
        axes.set_ylabel("share, teacher-forced")
        figure.legend(loc="outside lower left", ncols=2)
    return figure


def selectors_figure(study: Study, name: str, method: str) -> Figure:
    """Regret of every selector, the best at the top."""
    rows = sorted(study.selectors[name][method], key=lambda row: -float(row["regret"] or 0))
    regrets = [float(row["regret"] or 0) for row in rows]
    colors = [GOLD if row["selector"] == next(iter(study.profiles[name])) else BLUE for row in rows]
    caption = "Regret: what the chosen block falls short of the best fixed block's score."
    with look(0.7 + 0.3 * len(rows), f"Who finds the best block? {short(name)}, {method}", caption) as (
        figure,
        axes,
    ):
        bars = axes.barh(range(len(rows)), regrets, 0.75, color=colors)
        axes.bar_label(bars, [f"{row['regret']:.3f}, block {row['block']}" for row in rows], padding=2, fontsize=8)
        names = [short(selector_name(str(row["selector"])), 22) for row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=9)
        axes.set_xlim(0, 2.0 * max(0.02, *regrets))
        axes.set_xlabel("regret")
    return figure


STUDY_FIGURES = {"sweep": sweep_figure, "selectors": selectors_figure}  # of each set and method

"""The figures' one look: small enough for TensorBoard's cards, readable in grey and by the colour-blind."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

GOLD, BLUE, INK, WHITE = "#E69F00", "#0072B2", "#333333", "#FFFFFF"  # the first two of Okabe and Ito's palette
WIDTH = 5.8  # inches; TensorBoard's cards are some 400 pixels wide, where 10 points of this are still read

STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names are names, whatever signs they hold
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
def look(height: float, title: str, caption: str) -> Iterator[Figure]:
    """A figure in the project's look, made without pyplot, so that it needs no display.

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
        yield figure


def short(name: str, most: int = 42) -> str:
    """A name that is not too long for a figure: its end, which tells paths apart."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"…{name[1 - most :]}"


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers alone, as many as can be read."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


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
    axes.set_xlabel(f"block of {short(model)}")
    whole_numbers(axes.xaxis)

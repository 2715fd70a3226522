"""The figures' one look: small enough for TensorBoard's cards, readable in grey and by the colour-blind.

Colours are of Okabe and Ito's palette, and none says anything alone: shape, hatching, line or a label says it too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

GOLD, BLUE, GREY, INK = "#E69F00", "#0072B2", "#BBBBBB", "#333333"
LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # what tells curves apart without colour
SEQUENCE = "cividis"  # from dark to bright for everyone

WIDTH = 5.8  # inches; TensorBoard's cards are some 400 pixels wide, where 10 points of this are still read
MOST_TICKS = 12
NAME = 42  # characters of a name that may be a path

PLATE = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.parse_math": False,  # names are names, whatever signs they hold
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.linewidth": 0.6,
}


@contextmanager
def look(height: float, title: str, caption: str = "", width: float = WIDTH) -> Iterator[Figure]:
    """A figure in the project's look; made without pyplot, so that it needs no display.

    Args:
        height: in inches, without the heading.
        title: what is seen, in a few words.
        caption: how to read it, in a sentence or two, under the title.
        width: in inches.
    """
    titles = textwrap.wrap(title, int(width * 10))
    lines = textwrap.wrap(caption, int(width * 14.5))
    with matplotlib.rc_context(STYLE):
        below = 0.06 + 0.19 * len(titles)  # inches from the top to the caption
        heading = below + 0.05 + 0.17 * len(lines)
        tall = height + heading
        figure = Figure(figsize=(width, tall), dpi=140, layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - heading / tall))  # type: ignore[call-arg, union-attr]
        figure.text(0.012, 1 - 0.05 / tall, "\n".join(titles), va="top", weight="bold", fontsize=11.5)
        figure.text(0.012, 1 - (below + 0.03) / tall, "\n".join(lines), va="top", fontsize=9)
        yield figure


def short(name: str, most: int = NAME) -> str:
    """A name that is not too long for a figure: its end, which tells paths apart."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"…{name[1 - most :]}"


def ticks(axes: Axes, names: Sequence[object], most: int = MOST_TICKS) -> None:
    """Name places 0, 1, 2 … on the horizontal axis, as many as can be read."""
    every = max(1, -(-len(names) // most))
    axes.set_xticks(range(0, len(names), every), [str(name) for name in names[::every]])


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers alone: of blocks and requests there are no halves."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def block_axis(axes: Axes, blocks: Sequence[int], model: str) -> None:
    """A horizontal axis of blocks, at places 0, 1, 2 …"""
    axes.set_xlim(-0.7, len(blocks) - 0.3)
    ticks(axes, blocks)
    axes.set_xlabel(f"block of {short(model)}")


def legend_below(axes: Axes, columns: int = 5) -> None:
    """Each label once, under the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.figure.legend(
        once.values(),
        once.keys(),
        loc="outside lower left",
        ncols=min(columns, len(once)),
        columnspacing=1.0,
        handlelength=1.6,
        handletextpad=0.5,
    )


def squares(
    figure: Figure,
    values_NL: np.ndarray,
    blocks: Sequence[int],
    golden: int,
    model: str,
    label: str,
    **colors: Any,
) -> tuple[Axes, Colorbar]:
    """Requests by blocks, a square each, the golden layer's column framed.

    Args:
        figure: an empty one.
        values_NL: what the squares' colours stand for.
        blocks: the columns' numbers.
        golden: the golden layer's column.
        model: its name.
        label: what the colours stand for.
        colors: imshow's cmap, vmin and vmax.
    """
    axes = figure.subplots()
    image = axes.imshow(values_NL, aspect="auto", interpolation="nearest", **colors)
    for side in (golden - 0.5, golden + 0.5):
        axes.axvline(side, color="white", linewidth=2.6)
        axes.axvline(side, color=INK, linewidth=1.2)
    block_axis(axes, blocks, model)
    axes.set_ylabel("request")
    whole_numbers(axes.yaxis)
    return axes, figure.colorbar(image, ax=axes, label=label)

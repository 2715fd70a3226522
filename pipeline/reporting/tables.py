"""Tables of metrics and of anything else: what the terminal, the report and TensorBoard show in the same rows.

A row of one cell is a heading over those below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.evaluation import Estimate
from pipeline.reporting.groups import IN_SHORT, figure_text, grouped, label, meaning

Rows = list[list[str]]


def metric_table(
    sides: Mapping[str, Mapping[str, Estimate]], short: bool = False, intervals: bool = True, meanings: bool = False
) -> tuple[list[str], Rows]:
    """Columns and rows of metrics, in their groups: a row a metric.

    Args:
        sides: by column its figures; the last one's counts are shown, and of a difference those of the one before.
        short: the chief metrics alone.
        intervals: whether the 95% intervals stand behind the means.
        meanings: whether a column says what each metric counts.
    """
    final = [figures for name, figures in sides.items() if name != "difference"][-1]
    rows: Rows = []
    for group, names in grouped([name for name in final if not short or name in IN_SHORT]).items():
        rows.append([group])
        for name in names:
            figures = [figure_text(name, side.get(name)) for side in sides.values()]
            cells = figures if intervals else [figure.partition(" ")[0] for figure in figures]
            rows.append([label(name), *([meaning(name)] if meanings else []), str(final[name].count), *cells])
    return ["metric", *(["what it is"] if meanings else []), "count", *sides], rows


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; no cell can break its row."""
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = row if len(row) > 1 else [f"**{row[0]}**", *[""] * (len(columns) - 1)]
        cells = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

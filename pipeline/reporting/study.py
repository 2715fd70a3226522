"""A study's tables, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.study.questions import Row
from pipeline.study.study import Study


def study_report(study: Study) -> str:
    """study.md: the three questions, answered in tables."""
    sets = "; ".join(f"{one.name}: {len(one.tried)} tried, {len(one.proxy)} to choose by" for one in study.sets)
    parts = [
        f"# Which block of {study.model}?\n",
        f"Request sets: {sets}. Every tried request was edited alone at each tried block. Score: the mean of "
        "rewrite, rephrase and locality, teacher-forced; in brackets its 95% bootstrap interval over requests. "
        "Regret: what a block's score falls short of the best fixed block's, chosen with hindsight on the same "
        "requests.\n",
    ]
    for name, grids in study.grids.items():
        for method, grid in grids.items():
            parts += [
                f"## {name}, {method}\n",
                f"{len(grid.scores)} requests × {len(grid.blocks)} blocks in {grid.seconds:.0f} s.\n",
                "### A fixed block against each request's own best\n",
                table(study.against_optimal(name, method)),
                "### Who finds it\n",
                table(study.selectors(name, method)),
                f"![sweep](sweep-{name}-{method}.png)\n",
                f"![squares](squares-{name}-{method}.png)\n",
                f"![selectors](selectors-{name}-{method}.png)\n",
            ]
    for method in next(iter(study.grids.values())):
        parts += [f"## From proxy to test requests, and from set to set: {method}\n", table(study.carried(method))]
    parts += [
        "## Selectors by halves\n",
        "Every second tried request, over all sets and methods, and the others: what is chosen by the first half's "
        "figures can be trusted by the second's.\n",
        table(study.halves()),
    ]
    return "\n".join(parts)


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    rows = [_bracketed(row) for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    lines += [f"| {' | '.join(_cell(name, row.get(name)) for name in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _bracketed(row: Row) -> Row:
    """With the score's interval behind it, in one column."""
    if "low" not in row:
        return row
    shown = f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    return {name: shown if name == "score" else value for name, value in row.items() if name not in ("low", "high")}


def _cell(name: str, value: float | int | str | None) -> str:
    if value is None:
        return ""
    digits = {"times faster than the sweep": 0, "seconds": 1}.get(name, 3)
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

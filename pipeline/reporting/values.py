"""values.csv: a row a request, for one's own analysis."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO

from pipeline.evaluation.evaluator import Evaluation
from pipeline.reporting.tables import sides_of
from pipeline.requests.schema import EditRequest

BY_WINDOW = ("perplexity", "text_kl")  # values of ordinary text, not of requests


def values_csv(requests: Sequence[EditRequest], evaluation: Evaluation) -> str:
    """Each request's value of every metric, and what the model said, before and after, as CSV.

    A metric that a request has no text for is empty; several answers of a kind stand in one cell, ` | ` between.
    """
    rows = [_row(number, request, evaluation) for number, request in enumerate(requests)]
    written = StringIO()
    table = csv.DictWriter(written, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return written.getvalue()


def _row(number: int, request: EditRequest, evaluation: Evaluation) -> dict[str, str]:
    """A request's cells by column; the columns are every request's."""
    row = {name: getattr(request, name) or "" for name in ("id", "prompt", "new_answer", "old_answer")}
    sides = sides_of(evaluation)
    *_, final = sides.values()
    for name in final.values:
        for side, measured in sides.items():
            if name in measured.values and name not in BY_WINDOW:
                value = measured.values[name].values.get(number)
                row[f"{name} {side}"] = "" if value is None else f"{value:.6g}"
    for kind in final.said:
        for side, measured in sides.items():
            row[f"{kind} answer {side}"] = " | ".join(
                " ".join(text.split()) for text in measured.said[kind][number]
            )
    return row

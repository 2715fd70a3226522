"""values.csv: a row a request, for one's own analysis."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO

from pipeline.evaluation import Evaluation
from pipeline.requests import EditRequest

BY_WINDOW = ("perplexity", "text_kl")  # values of ordinary text, not of requests


def values_csv(requests: Sequence[EditRequest], evaluation: Evaluation) -> str:
    """Each request's value of every metric, and what the model said, before and after, as CSV.

    A metric that a request has no text for is empty; several answers of a kind stand in one cell, ` | ` between.
    """
    sides = {"before": evaluation.before} | ({"after": evaluation.after} if evaluation.after else {})
    final = evaluation.after or evaluation.before
    columns: dict[str, list[object]] = {
        "id": [request.id for request in requests],
        "prompt": [request.prompt for request in requests],
        "new_answer": [request.new_answer for request in requests],
        "old_answer": [request.old_answer or "" for request in requests],
    }
    units = range(len(requests))
    for name in final.values:
        for side, measured in sides.items():
            if name in measured.values and name not in BY_WINDOW:
                values = measured.values[name].values
                columns[f"{name} {side}"] = [f"{values[unit]:.6g}" if unit in values else "" for unit in units]
    for kind in final.said:
        for side, measured in sides.items():
            columns[f"{kind} answer {side}"] = [_one_line(texts) for texts in measured.said[kind]]
    written = StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(columns)
    table.writerows(zip(*columns.values(), strict=True))
    return written.getvalue()


def _one_line(texts: Sequence[str]) -> str:
    return " | ".join(" ".join(text.split()) for text in texts)

"""Metrics in their groups, and tables of them: the terminal, the reports and TensorBoard show the same rows.

How the model really behaves stands first. A row of one cell is a heading over those below it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError, terminal_text
from pipeline.evaluation.made import HOLDS, OF_SUBJECT
from pipeline.evaluation.metrics import Estimate

if TYPE_CHECKING:
    from pipeline.evaluation.evaluator import Evaluation, Measurement
    from pipeline.requests.schema import EditRequest
    from pipeline.study.grid import Row

GROUPS: dict[str, dict[str, str]] = {
    "by generation": {
        "rephrase_containment": "rephrases in whose answer, by the model itself, the new answer stands",
        "made_rephrase_containment": "the same of rephrases made for requests that bring none",
        "made_chat_containment": "the same, asked as in a chat",
        "generation_containment": "requests in whose answer it stands",
        "generation_exact_match": "requests answered with the new answer and nothing more",
        "rephrase_exact_match": "rephrases answered with the new answer and nothing more",
        "made_rephrase_exact_match": "made rephrases answered so",
        "made_chat_exact_match": "the same, asked as in a chat",
        "made_subject": "other prompts made about the subject, whose next token is what it was",
        "made_neighbour": "requests' prompts with another name made the subject, whose next token is what it was",
        "portability_exact_match": "portability probes answered with their answer and nothing more",
        "portability_containment": "portability probes in whose answer it stands",
        "distractor_exact_match": "requests after a sentence about something else, answered with that alone",
        "distractor_containment": "the same, in whose answer it stands",
    },
    "teacher-forced": {
        "rewrite": "tokens of the new answer that come first to the model, prompt as given",
        "rephrase": "the same, prompt in other words",
        "locality": "tokens of unrelated answers that did not change",
        "portability": "tokens of what follows from the new answer",
    },
    "by probability": {
        "efficacy_success": "prompts to which the new answer is likelier than the old one",
        "efficacy_magnitude": "by how much, as a difference of probabilities a token",
        "paraphrase_success": "rephrases to which the new answer is likelier than the old one",
        "paraphrase_magnitude": "by how much",
        "neighbourhood_success": "unrelated prompts to which the right answer is likelier than the new one",
        "neighbourhood_magnitude": "by how much",
        "rome_score": "harmonic mean of the three successes",
    },
    "damage": {
        "perplexity": "on ordinary text; lower is better, unchanged is the aim",
        "locality_kl": "how far next-token distributions after unrelated prompts moved, in nats",
        "text_kl": "the same in ordinary text",
        "sane_texts": "long generations in which no word or phrase comes over and over",
        "ability": "items of arithmetic, grammar, reading and common sense whose right choice is the likeliest",
    },
    "evaluation harness": {"harness": "a task's items, by its own measure"},
}
AXES = ("locality/subject", "locality/relation")  # probes about the subject itself, and of the same relation
LONG_ONLY = re.compile(r"(_magnitude|portability_containment|distractor_\w+|(rephrase|chat)_exact_match|text_kl)$")
ASKED_FOR = ("ability", "harness")  # and with all their axes, where they were measured
IN_SHORT = tuple(name for members in (*GROUPS.values(), AXES) for name in members if not LONG_ONLY.search(name))
# what tells whether an edit holds, each request by one of these figures: what of it is not known is said
EXPECTED = {
    "generation containment": ("generation_containment",),
    "exact match": ("generation_exact_match",),
    "chat": ("made_chat_containment",),
    "rephrase containment": ("rephrase_containment", "made_rephrase_containment"),
    "rewrite": ("rewrite",),
    "rephrase": ("rephrase", "made_rephrase_containment"),
    "the rest of the subject": ("made_subject", *(f"locality/{axis}" for axis in OF_SUBJECT)),
    "locality": ("locality", "made_neighbour"),
    "portability": ("portability",),
}
MARKS = re.compile(r"[\\`*_{}<>#|!~$&]|\](?=\s*[(\[:])|:(?=//)|(?<=www)\.")  # what Markdown and HTML begin with
FORMULA = re.compile(r"[=@\t\r]|[+-](?!\d+(\.\d+)?$)")  # what a spreadsheet's formulas begin with; not numbers
APART = ("perplexity", "text_kl", *ASKED_FOR)  # values of no request

Table = tuple[list[str], list[list[str]]]  # columns, and rows


def kind_of(name: str) -> str:
    """What a metric's axes (`portability/Reasoning`) have in common."""
    return name.partition("/")[0]


def grouped(names: Collection[str]) -> dict[str, list[str]]:
    """Names by group; a kind's axes (`portability/Reasoning`) stand behind it."""
    found: dict[str, list[str]] = {}
    for group, members in GROUPS.items():
        there = [name for member in members for name in names if kind_of(name) == member]
        if there:
            found[group] = there
    return found


def meaning(name: str) -> str:
    """What a metric counts, in a line."""
    kind, _, axis = name.partition("/")
    counted = next(members[kind] for members in GROUPS.values() if kind in members)
    return f"of them {axis}" if axis else counted


def label(name: str) -> str:
    """A metric's name as it is shown; tasks of the harness keep theirs."""
    if kind_of(name) == "harness":
        return name
    return name.replace("_", " ").replace("rome score", "ROME's score").replace(" kl", " KL")


def figure_text(name: str, estimate: Estimate | None, interval: bool = True) -> str:
    """A metric's mean, with or without its interval; nothing where there is none."""
    if estimate is None:
        return ""
    digits = 2 if name == "perplexity" else 3
    mean = f"{estimate.mean:.{digits}f}"
    return f"{mean} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]" if interval else mean


def sides_of(evaluation: Evaluation) -> dict[str, Measurement]:
    """What was measured: before and, of an edit, after."""
    return {"before": evaluation.before} | ({"after": evaluation.after} if evaluation.after else {})


def metrics_of(evaluation: Evaluation) -> dict[str, dict[str, Estimate]]:
    """The metrics of each side and, of an edit, the paired difference."""
    sides = {side: measured.metrics for side, measured in sides_of(evaluation).items()}
    return sides | ({"difference": evaluation.difference} if evaluation.after else {})


def metric_table(
    sides: Mapping[str, Mapping[str, Estimate]], short: bool = False, intervals: bool = True, meanings: bool = False
) -> Table:
    """Metrics in their groups, a row a metric: all, or in `short` the chief ones.

    `sides` are figures by column; the last one's counts are shown, and of a difference those of the one before.
    """
    final = [figures for name, figures in sides.items() if name != "difference"][-1]
    rows: list[list[str]] = []
    shown = [name for name in final if not short or name in IN_SHORT or kind_of(name) in ASKED_FOR]
    for group, names in grouped(shown).items():
        rows.append([group])
        for name in names:
            figures = [figure_text(name, side.get(name), intervals) for side in sides.values()]
            rows.append([label(name), *([meaning(name)] if meanings else []), str(final[name].count), *figures])
    return ["metric", *(["what it is"] if meanings else []), "count", *sides], rows


def not_measured(metrics: Mapping[str, Estimate]) -> str:
    """A line that names what would tell whether an edit holds, and was not measured; empty where all was.

    What was measured of a part of the requests alone stands there with the number of the others.
    """
    counts = {name: metrics[name].count for names in EXPECTED.values() for name in names if name in metrics}
    found = {what: sum(counts.get(name, 0) for name in names) for what, names in EXPECTED.items()}
    most = max(counts.values(), default=1)
    missing = [f"{what} of {most - count}" if count else what for what, count in found.items() if count < most]
    if "sane_texts" not in metrics:
        missing.append("sane texts")
    return f"NOT MEASURED: {', '.join(missing)}" if missing else ""


def study_table(rows: Sequence[Row], only: Sequence[str] = ()) -> Table:
    """A study's answer as a table: its rows' columns, or some of them; a score's interval stands behind it."""
    columns = list(only) or list(dict.fromkeys(name for row in rows for name in row if name not in ("low", "high")))
    return columns, [[_cell(row, name) for name in columns] for row in rows]


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if name == "score" and "low" in row:
        return figure_text(name, Estimate(value, 0, float(row["low"] or 0), float(row["high"] or 0)))
    digits = {"times faster than the sweep": 0, "seconds": 1}.get(name, 3)
    return f"{value:.{digits}f}"


def markdown_text(text: str) -> str:
    """Somebody's text, fit for a line of Markdown: it reads as it is, and marks up, links and fetches nothing."""
    return MARKS.sub(lambda mark: f"&#{ord(mark[0])};", terminal_text(" ".join(text.split())))


def csv_text(text: str) -> str:
    """Somebody's text, fit for a cell: no spreadsheet takes it for a formula."""
    return f"'{text}" if FORMULA.match(text) else text


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; no cell can break its row."""
    lines = [f"| {' | '.join(map(markdown_text, columns))} |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = list(map(markdown_text, row))
        cells = cells if len(row) > 1 else [f"**{cells[0]}**", *[""] * (len(columns) - 1)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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


def missed_of(requests: Sequence[EditRequest], folder: Path) -> list[EditRequest]:
    """An update's requests that do not hold, by its values.csv; UserError when that cannot tell, or all hold."""
    names, file = [f"{kind}_containment after" for kind in HOLDS], folder / "values.csv"
    try:
        rows = list(csv.DictReader(StringIO(file.read_text(encoding="utf-8"), newline="")))
        if not {*names} & {*rows[0]}:
            raise ValueError("no answers in it")
        shares = [min(float(row.get(name) or 1) for name in names) for row in rows]
        missed = [one for one, share in zip(requests, shares, strict=True) if share < 1]
    except (OSError, ValueError) as error:
        raise UserError(f"requests: missed: {file} does not tell ({error})") from None
    if not missed:
        raise UserError(f"requests: missed: none; all {len(requests)} of {folder} hold")
    return missed


def _row(number: int, request: EditRequest, evaluation: Evaluation) -> dict[str, str]:
    """A request's cells by column; the columns are every request's."""
    row = {name: csv_text(getattr(request, name) or "") for name in ("id", "prompt", "new_answer", "old_answer")}
    for side, measured in sides_of(evaluation).items():
        for name, column in measured.values.items():
            if kind_of(name) not in APART:
                row[f"{name} {side}"] = f"{column.values[number]:.6g}" if number in column.values else ""
        for kind, texts in measured.said.items():
            row[f"{kind} answer {side}"] = csv_text(" | ".join(" ".join(text.split()) for text in texts[number]))
    return row

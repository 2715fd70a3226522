"""What is in a source of requests, counted while it is read once, and told in lines."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.errors import UserError, one_line, terminal_text
from pipeline.requests.guessing import as_fields
from pipeline.requests.readers import Reading
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import alike, fact

NAMED = 20  # bad records that are spelt out
IN_A_LINE = 5  # places that are named in a line


class RequestCheck:
    """What was found in a source: how many there are of what, and what is wrong, or where."""

    def __init__(self, source: str | Path) -> None:
        self.source = source
        self.layouts: Counter[str] = Counter()  # records by layout
        self.counts: Counter[str] = Counter()
        self.probes: dict[str, Counter[str]] = {"locality": Counter(), "portability": Counter()}  # by axis
        self.found: dict[str, list[str]] = defaultdict(list)
        self.fields: dict[str, str] = {}  # which are probably which, in every record without a layout
        self.facts: dict[str, tuple[str, str]] = {}  # place and new answer of the last about each

    def count(self, reading: Reading) -> None:
        """Count one record."""
        self.counts.update({"records": 1, "left out": reading.left_out})
        if as_fields(reading.fields):  # a record for which none would do stays bad
            earlier = self.fields or reading.fields
            self.fields = {name: path for name, path in earlier.items() if reading.fields.get(name) == path}
        if reading.layout:
            self.layouts[reading.layout] += 1
        if isinstance(reading.requests, UserError):
            self.found["bad"].append(one_line(reading.requests))
            return
        for request in reading.requests:
            self._count_request(request, reading.place)

    def _count_request(self, request: EditRequest, place: str) -> None:
        having = {"subject": request.subject, "old_answer": request.old_answer, "rephrase": request.rephrases}
        self.counts.update(["requests", *(name for name, value in having.items() if value)])
        self.counts["rephrases"] += len(request.rephrases)
        for kind, axes in self.probes.items():
            axes.update(probe.axis or "no axis" for probe in getattr(request, kind))
        if request.subject and not request.names_subject:  # which locate-then-edit needs
            self.found["astray"].append(place)
        if alike(request.old_answer, request.new_answer):
            self.found["unchanged"].append(place)
        earlier, answer = self.facts.get(fact(request), (None, None))
        self.facts[fact(request)] = place, request.new_answer
        if earlier and alike(answer, request.new_answer):
            self.found["duplicates"].append(f"{place} as {earlier}")
        elif earlier:
            self.found["contradictions"].append(f"{place} ({request.new_answer!r}) against {earlier} ({answer!r})")


def check_requests(source: str | Path, readings: Iterable[Reading]) -> RequestCheck:
    """Read a source to its end and count what is in it; bad records are counted."""
    checked = RequestCheck(source)
    for reading in readings:
        checked.count(reading)
    return checked


def require_good(checked: RequestCheck, skip_bad: bool) -> None:
    """Raise UserError when records are bad and may not be left out, or nothing good is left."""
    bad, records = len(checked.found["bad"]), checked.counts["records"]
    if bad == records:
        raise UserError(f"requests: {checked.source}: all {records} records are bad")
    if bad and not skip_bad:
        raise UserError(
            f"requests: {checked.source}: {bad} of {records} records are bad; correct them, "
            "or leave them out with --skip-bad"
        )


def summary(checked: RequestCheck) -> str:
    """What was found as a table of two columns, then what is wrong with each bad record."""
    counts, found, bad = checked.counts, checked.found, checked.found["bad"]
    more = f"; {counts['requests']} requests" if counts["requests"] > counts["records"] - len(bad) else ""
    rows = {
        "requests": checked.source,
        "records": f"{counts['records']}, {len(bad)} bad" + more,
        "layout": _by_name(checked.layouts),
        "subject": _share(counts, "subject") + _places("; ", found["astray"], " not in their prompts"),
        "old answer": _share(counts, "old_answer") + _places("; ", found["unchanged"], " the same as the new one"),
        "rephrases": f"{counts['rephrases']}; {_share(counts, 'rephrase')}",
        **{kind: _by_name(axes) for kind, axes in checked.probes.items()},
        "left out": f"{counts['left out']} probes or rephrases with an empty text",
        "duplicates": _places("", found["duplicates"]) or "none",
        "contradictions": _places("", found["contradictions"]) or "none",
    }
    if not checked.layouts and (told := as_fields(checked.fields)):
        rows["try"] = f"--{told}"
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {text}" for name, text in rows.items()]
    lines += [f"bad: {reason}" for reason in bad[:NAMED]]
    if len(bad) > NAMED:
        lines.append(f"bad: and {len(bad) - NAMED} more")
    return "\n".join(map(terminal_text, lines))


def _by_name(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"


def _share(counts: Counter[str], name: str) -> str:
    return f"{counts[name]} with, {counts['requests'] - counts[name]} without"


def _places(before: str, places: Sequence[str], what: str = "") -> str:
    """How many there are of what, and the first few places; empty where there are none."""
    more = ", …" if len(places) > IN_A_LINE else ""
    return f"{before}{len(places)}{what}: {', '.join(places[:IN_A_LINE])}{more}" if places else ""

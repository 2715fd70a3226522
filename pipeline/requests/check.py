"""What is in a source of requests, counted while it is read once, and told in lines."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median_low

from pipeline.errors import UserError
from pipeline.requests.readers import Reading, read_requests
from pipeline.requests.schema import EditRequest

NAMED = 20  # bad records that are spelt out
IN_A_LINE = 5  # places that are named in a line


class Found:
    """How often something was found, and the first few places, in words."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(place)

    def listed(self, what: str = "") -> str:
        """How many there are of what, and where."""
        more = ", …" if self.count > IN_A_LINE else ""
        return f"{self.count}{what}: {', '.join(self.first[:IN_A_LINE])}{more}" if self.count else "none"


class RequestCheck:
    """What was found in a source.

    Attributes:
        source: what was read.
        records: how many records there are.
        layouts: records by layout; those of no layout are left out.
        left_out: probes and rephrases left out because a text is empty.
        having: requests with a `subject`, an `old_answer`, `rephrases`; and how many there are in `all`.
        rephrases: how many there are.
        probes: how many there are by kind (locality, portability) and axis.
        words: by `prompt` and `new_answer`, how many texts have so many words.
        found: `bad` records, with what is wrong; requests that are `astray`: the prompt lacks the subject, which
            locate-then-edit needs; `unchanged`: the new answer is the old one; `duplicates` and `contradictions` of
            one before with the same subject and prompt.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.records = self.left_out = self.rephrases = 0
        self.layouts: Counter[str] = Counter()
        self.having: Counter[str] = Counter()
        self.probes: dict[str, Counter[str]] = {"locality": Counter(), "portability": Counter()}
        self.words: dict[str, Counter[int]] = {"prompt": Counter(), "new_answer": Counter()}
        self.found: dict[str, Found] = defaultdict(Found)

    def count(self, reading: Reading) -> None:
        """Count one record."""
        self.records += 1
        if reading.layout:
            self.layouts[reading.layout] += 1
        self.left_out += reading.left_out
        if isinstance(reading.request, EditRequest):
            self._count_request(reading.request)
            self._note_flaws(reading.request, reading)
        else:
            self.found["bad"].add(" ".join(str(reading.request).split()))

    def _count_request(self, request: EditRequest) -> None:
        self.having["all"] += 1
        self.having.update(name for name in ("subject", "old_answer", "rephrases") if getattr(request, name))
        self.rephrases += len(request.rephrases)
        for kind, axes in self.probes.items():
            axes.update(probe.axis or "no axis" for probe in getattr(request, kind))
        for text, lengths in self.words.items():
            lengths[len(getattr(request, text).split())] += 1

    def _note_flaws(self, request: EditRequest, reading: Reading) -> None:
        if request.subject and not request.names_subject:
            self.found["astray"].add(reading.place)
        if request.old_answer == request.new_answer:
            self.found["unchanged"].add(reading.place)
        if reading.earlier:
            place, answer = reading.earlier
            if answer == request.new_answer:
                self.found["duplicates"].add(f"{reading.place} as {place}")
            else:
                against = f"against {place} ({answer!r})"
                self.found["contradictions"].add(f"{reading.place} ({request.new_answer!r}) {against}")


def check_requests(
    source: str | Path,
    limit: int | None = None,
    offset: int = 0,
    keep: Callable[[EditRequest], object] | None = None,
) -> RequestCheck:
    """Read a source to its end and count what is in it; bad records are counted, not raised.

    Args:
        source: what `load_requests` takes.
        limit: take at most this many records.
        offset: leave out this many records first.
        keep: called with each request.

    Raises:
        UserError: when there is no such source, it holds no records, or reading cannot go on.
    """
    checked = RequestCheck(str(source))
    for reading in read_requests(source, limit, offset):
        checked.count(reading)
        if keep and isinstance(reading.request, EditRequest):
            keep(reading.request)
    return checked


def require_good(checked: RequestCheck, skip_bad: bool) -> None:
    """Raise UserError when records are bad and may not be left out, or nothing good is left."""
    bad = checked.found["bad"].count
    if bad and not skip_bad:
        raise UserError(
            f"requests: {checked.source}: {bad} of {checked.records} records are bad; correct them, "
            "or leave them out with --skip-bad"
        )
    if not checked.having["all"]:
        raise UserError(f"requests: {checked.source}: all {checked.records} records are bad")


def summary(checked: RequestCheck) -> str:
    """What was found as a table of two columns, then what is wrong with each bad record."""
    found, bad = checked.found, checked.found["bad"]
    rows = {
        "requests": checked.source,
        "records": f"{checked.records}, {bad.count} bad",
        "layout": _counts(checked.layouts),
        "subject": _share(checked, "subject") + _places(found["astray"], "not in their prompts"),
        "old answer": _share(checked, "old_answer") + _places(found["unchanged"], "the same as the new one"),
        "rephrases": f"{checked.rephrases}; {_share(checked, 'rephrases')}",
        **{kind: _counts(axes) for kind, axes in checked.probes.items()},
        "left out": f"{checked.left_out} probes or rephrases with an empty text" if checked.left_out else "none",
        "words in prompts": _lengths(checked.words["prompt"]),
        "in new answers": _lengths(checked.words["new_answer"]),
        "duplicates": found["duplicates"].listed(),
        "contradictions": found["contradictions"].listed(),
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {text}" for name, text in rows.items()]
    lines += [f"bad: {reason}" for reason in bad.first]
    if bad.count > NAMED:
        lines.append(f"bad: and {bad.count - NAMED} more")
    return "\n".join(lines)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"


def _share(checked: RequestCheck, name: str) -> str:
    return f"{checked.having[name]} with, {checked.having['all'] - checked.having[name]} without"


def _places(found: Found, what: str) -> str:
    return f"; {found.listed(f' {what}')}" if found.count else ""


def _lengths(words: Counter[int]) -> str:
    """Fewest and most words, and the median, from how many texts have so many."""
    if not words:
        return "none"
    return f"{min(words)} to {max(words)}, median {median_low(words.elements())}"

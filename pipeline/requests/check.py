"""What is in a source of requests, counted while it is read once, in constant memory, and told in lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

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


@dataclass
class RequestCheck:
    """What was found in a source.

    Attributes:
        source: what was read.
        records: how many records there are.
        good: how many of them are requests.
        bad: the others, with what is wrong.
        layouts: records by layout; those of no layout are left out.
        subjects: requests with a subject.
        astray: requests whose prompt does not hold their subject, which locate-then-edit needs.
        old_answers: requests with an old answer.
        unchanged: requests whose new answer is their old one.
        rephrased: requests with a rephrase.
        rephrases: rephrases in all.
        probes: by kind (locality, portability) and axis, how many there are.
        left_out: probes and rephrases left out because a text is empty.
        prompt_words, answer_words: how many prompts and new answers have so many words.
        duplicates: same subject, prompt and new answer as one before.
        contradictions: same subject and prompt as one before, another new answer.
    """

    source: str
    records: int = 0
    good: int = 0
    bad: Found = field(default_factory=Found)
    layouts: Counter[str] = field(default_factory=Counter)
    subjects: int = 0
    astray: Found = field(default_factory=Found)
    old_answers: int = 0
    unchanged: Found = field(default_factory=Found)
    rephrased: int = 0
    rephrases: int = 0
    probes: dict[str, Counter[str]] = field(
        default_factory=lambda: {"locality": Counter(), "portability": Counter()}
    )
    left_out: int = 0
    prompt_words: Counter[int] = field(default_factory=Counter)
    answer_words: Counter[int] = field(default_factory=Counter)
    duplicates: Found = field(default_factory=Found)
    contradictions: Found = field(default_factory=Found)

    def count(self, reading: Reading) -> None:
        """Count one record."""
        self.records += 1
        if reading.layout:
            self.layouts[reading.layout] += 1
        self.left_out += reading.left_out
        if isinstance(reading.request, EditRequest):
            self.good += 1
            self._count_request(reading.request, reading.place)
            self._count_earlier(reading.request, reading)
        else:
            self.bad.add(" ".join(str(reading.request).split()))

    def _count_request(self, request: EditRequest, place: str) -> None:
        if request.subject:
            self.subjects += 1
            if not request.names_subject:
                self.astray.add(place)
        if request.old_answer:
            self.old_answers += 1
            if request.old_answer == request.new_answer:
                self.unchanged.add(place)
        self.rephrased += bool(request.rephrases)
        self.rephrases += len(request.rephrases)
        for kind, axes in self.probes.items():
            axes.update(probe.axis or "no axis" for probe in getattr(request, kind))
        self.prompt_words[len(request.prompt.split())] += 1
        self.answer_words[len(request.new_answer.split())] += 1

    def _count_earlier(self, request: EditRequest, reading: Reading) -> None:
        if not reading.earlier:
            return
        place, answer = reading.earlier
        if answer == request.new_answer:
            self.duplicates.add(f"{reading.place} as {place}")
        else:
            self.contradictions.add(f"{reading.place} ({request.new_answer!r}) against {place} ({answer!r})")


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
    found = RequestCheck(str(source))
    for reading in read_requests(source, limit, offset):
        found.count(reading)
        if keep and isinstance(reading.request, EditRequest):
            keep(reading.request)
    return found


def require_good(found: RequestCheck, skip_bad: bool) -> None:
    """Raise UserError when records are bad and may not be left out, or nothing good is left."""
    if found.bad.count and not skip_bad:
        raise UserError(
            f"requests: {found.source}: {found.bad.count} of {found.records} records are bad; correct them, "
            "or leave them out with --skip-bad"
        )
    if not found.good:
        raise UserError(f"requests: {found.source}: all {found.records} records are bad")


def summary(found: RequestCheck) -> str:
    """What was found as a table of two columns, then what is wrong with each bad record."""
    rows = {
        "requests": found.source,
        "records": f"{found.records}, {found.bad.count} bad",
        "layout": _counts(found.layouts),
        "subject": _share(found.subjects, found) + _places(found.astray, "not in their prompts"),
        "old answer": _share(found.old_answers, found) + _places(found.unchanged, "the same as the new one"),
        "rephrases": f"{found.rephrases}; {_share(found.rephrased, found)}",
        **{kind: _counts(axes) for kind, axes in found.probes.items()},
        "left out": f"{found.left_out} probes or rephrases with an empty text" if found.left_out else "none",
        "words in prompts": _lengths(found.prompt_words),
        "in new answers": _lengths(found.answer_words),
        "duplicates": found.duplicates.listed(),
        "contradictions": found.contradictions.listed(),
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {text}" for name, text in rows.items()]
    lines += [f"bad: {reason}" for reason in found.bad.first]
    if found.bad.count > NAMED:
        lines.append(f"bad: and {found.bad.count - NAMED} more")
    return "\n".join(lines)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"


def _share(having: int, found: RequestCheck) -> str:
    return f"{having} with, {found.good - having} without"


def _places(found: Found, what: str) -> str:
    return f"; {found.listed(f' {what}')}" if found.count else ""


def _lengths(words: Counter[int]) -> str:
    """Fewest and most words, and the median, from how many texts have so many."""
    if not words:
        return "none"
    lengths = sorted(words)
    passed = zip(lengths, accumulate(words[length] for length in lengths), strict=True)
    median = next(length for length, texts in passed if 2 * texts >= words.total())
    return f"{lengths[0]} to {lengths[-1]}, median {median}"

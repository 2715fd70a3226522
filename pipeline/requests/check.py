"""What is in a source of requests, counted while it is read once, in constant memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import UserError
from pipeline.requests.readers import Reading, read_requests
from pipeline.requests.schema import EditRequest
from pipeline.requests.seen import Pair, Seen

NAMED = 20  # places that are kept of what is wrong


@dataclass
class Places:
    """How often something was found, and the first few places."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(place)


@dataclass
class Pairs:
    """How many requests say again what an earlier one is about, and the first few with the earlier one."""

    count: int = 0
    first: list[Pair] = field(default_factory=list)


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
    bad: Places = field(default_factory=Places)
    layouts: Counter[str] = field(default_factory=Counter)
    subjects: int = 0
    astray: Places = field(default_factory=Places)
    old_answers: int = 0
    unchanged: Places = field(default_factory=Places)
    rephrased: int = 0
    rephrases: int = 0
    probes: dict[str, Counter[str]] = field(
        default_factory=lambda: {"locality": Counter(), "portability": Counter()}
    )
    left_out: int = 0
    prompt_words: Counter[int] = field(default_factory=Counter)
    answer_words: Counter[int] = field(default_factory=Counter)
    duplicates: Pairs = field(default_factory=Pairs)
    contradictions: Pairs = field(default_factory=Pairs)

    def count(self, reading: Reading) -> None:
        """Count one record."""
        self.records += 1
        if reading.layout:
            self.layouts[reading.layout] += 1
        self.left_out += reading.left_out
        if isinstance(reading.request, EditRequest):
            self.good += 1
            self._count_request(reading.request, reading.place)
        else:
            self.bad.add(str(reading.request))

    def _count_request(self, request: EditRequest, place: str) -> None:
        if request.subject:
            self.subjects += 1
            if request.subject not in request.prompt:
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
    with closing(Seen()) as seen:
        for reading in read_requests(source, limit, offset):
            found.count(reading)
            if isinstance(reading.request, EditRequest):
                seen.add(reading.request, reading.place)
                if keep:
                    keep(reading.request)
        found.duplicates = Pairs(*seen.pairs(same_answer=True, named=NAMED))
        found.contradictions = Pairs(*seen.pairs(same_answer=False, named=NAMED))
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

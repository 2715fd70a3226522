"""What was found in a source of requests, in lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pipeline.requests.check import Pairs, Places, RequestCheck

NAMED = 5  # places in a line


def summary(found: RequestCheck) -> str:
    """A table of two columns, then what is wrong with each bad record."""
    rows = [
        ("requests", found.source),
        ("records", f"{found.records}, {found.bad.count} bad"),
        ("layout", _counts(found.layouts)),
        ("subject", f"{_share(found.subjects, found)}{_places(found.astray, 'not in their prompts')}"),
        ("old answer", f"{_share(found.old_answers, found)}{_places(found.unchanged, 'the same as the new one')}"),
        ("rephrases", f"{found.rephrases}; {_share(found.rephrased, found)}"),
        *((kind, _counts(axes)) for kind, axes in found.probes.items()),
        ("left out", f"{found.left_out} probes or rephrases with an empty text" if found.left_out else "none"),
        ("words in prompts", _lengths(found.prompt_words)),
        ("in new answers", _lengths(found.answer_words)),
        ("duplicates", _pairs(found.duplicates)),
        ("contradictions", _pairs(found.contradictions)),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    lines += [f"bad: {_one_line(reason)}" for reason in found.bad.first]
    if found.bad.count > len(found.bad.first):
        lines.append(f"bad: and {found.bad.count - len(found.bad.first)} more")
    return "\n".join(lines)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"


def _share(having: int, found: RequestCheck) -> str:
    return f"{having} with, {found.good - having} without"


def _places(places: Places, what: str) -> str:
    return f"; {places.count} {what}: {_listed(places.first, places.count)}" if places.count else ""


def _pairs(pairs: Pairs) -> str:
    """Each pair as the later place and the earlier, and what they answer where that differs."""
    texts = []
    for pair in pairs.first:
        differ = pair.answer != pair.later_answer
        later = f"{pair.later_place} ({pair.later_answer!r})" if differ else pair.later_place
        earlier = f"{pair.place} ({pair.answer!r})" if differ else pair.place
        texts.append(f"{later} {'against' if differ else 'as'} {earlier}")
    return f"{pairs.count}: {_listed(texts, pairs.count)}" if texts else "none"


def _listed(texts: Sequence[str], count: int) -> str:
    more = ", …" if count > NAMED else ""
    return ", ".join(texts[:NAMED]) + more


def _lengths(words: Counter[int]) -> str:
    """Fewest and most words, and the median, from how many texts have so many."""
    if not words:
        return "none"
    middle, passed = words.total() / 2, 0
    for length in sorted(words):
        passed += words[length]
        if passed >= middle:
            return f"{min(words)} to {max(words)}, median {length}"
    raise AssertionError("a median lies among the texts")


def _one_line(text: str) -> str:
    return " ".join(text.split())

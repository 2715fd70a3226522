"""When a generation says an answer: compared without case, a leading article and punctuation around it."""

from __future__ import annotations

import re
import string

OUTER = string.whitespace + string.punctuation + "“”‘’"
ARTICLE = re.compile(r"(a|an|the)[^\S\n]+(?=\S)")
CLOSING = r"[\"'”’)*_`]*"
END = re.compile(rf"{CLOSING}\s*($|\n|[.!?;]{CLOSING}($|\s))")


def _bare(text: str) -> str:
    """Lower case, without what stands before the first word of substance."""
    text = text.casefold().lstrip(OUTER)
    return text[match.end() :] if (match := ARTICLE.match(text)) else text


def is_exact_answer(generated: str, answer: str) -> bool:
    """Whether a generation is the answer and then ends its statement (or itself), saying nothing more.

    The longest answer wins nothing: "Paris, France" is not "Paris", and "Romeo" is not "Rome".
    """
    said, whole = _bare(generated), _bare(answer)
    return any(
        said.startswith(wanted) and END.match(said, len(wanted)) is not None
        for wanted in (whole, whole.rstrip(OUTER))  # "C++" ends in what "Yahoo!" may lose
        if wanted
    )

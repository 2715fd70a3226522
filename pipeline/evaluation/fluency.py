"""Fluency: whether a long generation says new things or repeats itself."""

from __future__ import annotations

import math
import re
from collections import Counter

WORD = re.compile(r"\w+|[^\w\s]")
WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # of 2- and 3-grams


def ngram_entropy(text: str) -> float:
    """ROME's fluency: the mean of the weighted entropies, in bits, of a text's 2- and 3-grams of words.

    Repetition lowers it. A text too short for any 2-gram has none: 0.
    """
    words = WORD.findall(text)
    return sum(weight * _entropy(words, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def _entropy(words: list[str], n: int) -> float:
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())

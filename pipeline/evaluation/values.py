"""From what a model said to figures: a value a request and metric, and their means with intervals."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.evaluation.made import MADE_TEXTS
from pipeline.evaluation.metrics import Resampled, bootstrap_mean
from pipeline.evaluation.plan import APART, Asked, Plan, Prompt, Text
from pipeline.evaluation.reading import Readings, TextReadings
from pipeline.requests.answers import contains_answer, is_exact_answer
from pipeline.requests.rows import Row

# as ROME calls them
BY_PROBABILITY = {"rewrite": "efficacy", "rephrase": "paraphrase", "locality": "neighbourhood"}
THRICE = re.compile(r"(?<!\w)(\w+(?: \w+)*?)(?: \1){2}(?!\w)")  # a phrase, one space between words
FIVE_TIMES = re.compile(r"(.+?)\1{4}")
IN_SCORE = tuple(f"{name}_success" for name in BY_PROBABILITY.values())


@dataclass
class Column:
    """One metric's values by unit (the number of a request, window or item), with weights where they differ."""

    values: dict[int, float]
    weights: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of_means(cls, pairs: Iterable[tuple[int, float]]) -> Column:
        """From (unit, value) pairs: each unit's mean."""
        found: dict[int, list[float]] = defaultdict(list)
        for unit, value in pairs:
            found[unit].append(value)
        return cls({unit: sum(values) / len(values) for unit, values in sorted(found.items())})

    def mean(self) -> Resampled:
        """The mean over units."""
        weights = [self.weights.get(unit, 1) for unit in self.values]
        return bootstrap_mean(list(self.values.values()), weights, list(self.values))


Values = dict[str, Column]


def values_of(plan: Plan, readings: Readings, base: TextReadings) -> Values:
    """Every metric's values, the headline first; `base` is what was read first of the same texts."""
    return (
        generation_values(plan.prompts, readings.answers)
        | teacher_forced_values(plan.texts, readings.texts, base)
        | probability_values([row.tag for row in plan.texts], readings.texts)
        | damage_values(plan.texts, readings)
        | ability_values(plan.texts, readings.texts)
    )


def generation_values(prompts: Sequence[Prompt], answers: Mapping[Asked, str]) -> Values:
    """Exact match and containment of the model's own greedy answers, by kind of prompt.

    `generation` are the requests' prompts, `distractor` the same after a sentence about something else, `made_…`
    the same in words that `pipeline.evaluation.made` has.
    """
    columns: Values = {}
    for kind in dict.fromkeys(one.kind for one in prompts):
        for metric, judge in (("exact_match", is_exact_answer), ("containment", contains_answer)):
            columns[f"{kind}_{metric}"] = Column.of_means(
                (one.request, float(judge(answers[one.asked], one.answer))) for one in prompts if one.kind == kind
            )
    return columns


def teacher_forced_values(texts: Sequence[Row], now: TextReadings, base: TextReadings) -> Values:
    """Share of an answer's tokens that are the model's first choice when the answer so far is given.

    As EasyEdit computes them: rewrite, rephrase and portability against the answer's own tokens, locality (and what
    is made, at its next token) against the base model's; a mean over a request's texts, then over requests.
    """
    pairs: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in texts:
        text: Text = row.tag
        if text.rival or text.kind in APART:
            continue
        expected = base[text].choices if text.kind in ("locality", *MADE_TEXTS) else row.targets
        hits = [a == b for a, b in zip(now[text].choices, expected, strict=True)]
        share = sum(hits) / len(hits)
        pairs[text.kind].append((text.request, share))
        if text.axis:
            pairs[f"{text.kind}/{text.axis}"].append((text.request, share))
    order = ("rewrite", "rephrase", "locality", "portability", *MADE_TEXTS)
    names = sorted(pairs, key=lambda name: (order.index(name.partition("/")[0]), name))
    return {name: Column.of_means(pairs[name]) for name in names}


def probability_values(texts: Collection[Text], now: TextReadings) -> Values:
    """ROME's success and magnitude: an answer against its rival to the same prompt.

    P is exp of the mean log-probability over an answer's tokens, as in ROME, so that answers of any length compare.
    For efficacy (prompts) and paraphrase (rephrases) the new answer is to be likelier than the old one; for
    neighbourhood (locality prompts) the right answer than the new one. Success is the share of prompts where it is,
    magnitude the mean difference of P.
    """
    rivals = {text._replace(rival=False): now[text].loss for text in texts if text.rival}
    columns: Values = {}
    for kind, name in BY_PROBABILITY.items():
        compared = [
            (text.request, now[text].loss, rivals[text]) for text in texts if text.kind == kind and text in rivals
        ]
        if compared:
            columns[f"{name}_success"] = Column.of_means(
                (unit, float(own < rival)) for unit, own, rival in compared
            )
            columns[f"{name}_magnitude"] = Column.of_means(
                (unit, math.exp(-own) - math.exp(-rival)) for unit, own, rival in compared
            )
    return columns


def damage_values(texts: Sequence[Row], readings: Readings) -> Values:
    """Perplexity's losses by window, divergences from the base's distributions, and repetition."""
    windows = {row.tag: len(row.targets) for row in texts if row.tag.kind == "text"}
    columns: Values = {}
    if windows:
        losses = {text.request: readings.texts[text].loss for text in windows}
        columns["perplexity"] = Column(losses, {text.request: tokens for text, tokens in windows.items()})
    for name, kind in (("locality_kl", "locality"), ("text_kl", "text")):
        moved = {row.tag: readings.texts[row.tag].divergence for row in texts if row.tag.kind == kind}
        column = Column.of_means((text.request, kl) for text, kl in moved.items() if kl is not None)
        if column.values:
            columns[name] = column
    if readings.long:
        columns["sane_texts"] = Column({unit: float(is_sane(said)) for unit, said in readings.long.items()})
    return columns


def ability_values(texts: Sequence[Row], now: TextReadings) -> Values:
    """Whether the right choice of each item has the largest log P (the sum over its tokens), in all and by kind."""
    nats: dict[tuple[int, str], list[float]] = defaultdict(list)  # by item, −log P of its choices
    for row in texts:
        if row.tag.kind == "ability":
            nats[row.tag.request, row.tag.axis].append(now[row.tag].loss * len(row.targets))
    columns: Values = {}
    for (item, kind), (right, *others) in nats.items():
        for name in ("ability", f"ability/{kind}"):
            columns.setdefault(name, Column({})).values[item] = float(right < min(others))
    return columns


def figures(values: Values) -> dict[str, Resampled]:
    """The mean of every column, perplexity from its losses, and ROME's score after what it is made of."""
    found: dict[str, Resampled] = {}
    for name, column in values.items():
        found[name] = column.mean()
        if name == "perplexity":
            found[name].values = np.exp(found[name].values)
        if name == "neighbourhood_magnitude" and all(part in found for part in IN_SCORE):
            found["rome_score"] = harmonic_mean([found[part] for part in IN_SCORE])
    return found


def harmonic_mean(parts: Sequence[Resampled]) -> Resampled:
    """Of figures place by place; nought where one of them is."""
    with np.errstate(divide="ignore"):
        values = len(parts) / sum(1 / part.values for part in parts)
    return Resampled(np.asarray(values), min(part.count for part in parts))


def is_sane(text: str) -> bool:
    """Whether a text has words, and no word or phrase comes three times in a row, numbers between them or not.

    Letters may do so four times: what a script without spaces repeats is no word of its own.
    """
    words, unnumbered = (" ".join(re.findall(kind, text.casefold())) for kind in (r"\w+", r"[^\W\d_]+"))
    repeated = THRICE.search(words) or THRICE.search(unnumbered) or FIVE_TIMES.search(unnumbered.replace(" ", ""))
    return bool(words) and not repeated

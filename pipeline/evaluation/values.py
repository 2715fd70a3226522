"""From what a model said to figures: a value a request and metric, and their means with intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.requests.answers import contains_answer, is_exact_answer
from pipeline.evaluation.fluency import ngram_entropy
from pipeline.evaluation.metrics import BootstrapMean, Resampled
from pipeline.evaluation.plan import Plan
from pipeline.evaluation.readings import Readings
from pipeline.evaluation.texts import Asked, ScoredTexts

BY_PROBABILITY = {
    "rewrite": "efficacy",
    "rephrase": "paraphrase",
    "locality": "neighbourhood",
}  # as ROME calls them
IN_SCORE = tuple(f"{name}_success" for name in BY_PROBABILITY.values())


@dataclass
class Column:
    """One metric's values by unit (the request's number, or the text window's), with weights where they differ."""

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
        """The mean over units.

        Every process holds all values, so that there is nothing to add up between processes.
        """
        units = list(self.values)
        weights = [self.weights.get(unit, 1) for unit in units]
        mean = BootstrapMean(sync_on_compute=False)
        mean.update(list(self.values.values()), weights, units, weights)
        return mean.compute()


Values = dict[str, Column]


def values_of(plan: Plan, readings: Readings, base: Readings) -> Values:
    """Every metric's values, the headline first.

    Args:
        plan: what was read.
        readings: of the model as it is.
        base: of the base model.
    """
    said = {number: readings.said[question] for number, question in enumerate(plan.question_of)}
    return (
        generation_values(plan.asked, said)
        | teacher_forced_values(plan.texts, readings, base)
        | probability_values(plan.texts, readings)
        | damage_values(plan.texts, readings, plan.essays)
    )


def generation_values(asked: Sequence[Asked], said: Mapping[int, str]) -> Values:
    """Exact match and containment of the model's own greedy answers, by kind of prompt.

    `generation` are the requests' prompts, `distractor` the same after a sentence about something else.
    """
    columns: Values = {}
    for kind in dict.fromkeys(one.kind for one in asked):
        for metric, judge in (("exact_match", is_exact_answer), ("containment", contains_answer)):
            columns[f"{kind}_{metric}"] = Column.of_means(
                (one.request, float(judge(said[number], one.answer)))
                for number, one in enumerate(asked)
                if one.kind == kind
            )
    return columns


def teacher_forced_values(texts: ScoredTexts, readings: Readings, base: Readings) -> Values:
    """Share of an answer's tokens that are the model's first choice when the answer so far is given.

    As EasyEdit computes them: rewrite, rephrase and portability against the answer's own tokens, locality against
    the base model's first choices; a mean over a request's texts, then over requests.

    Args:
        texts: scored texts and their target tokens, by number.
        readings: of the model as it is.
        base: of the base model.
    """
    pairs: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for number, (text, targets) in texts.items():
        if text.rival or text.kind == "text":
            continue
        expected = base.choices[number] if text.kind == "locality" else targets
        hits = [a == b for a, b in zip(readings.choices[number], expected, strict=True)]
        share = sum(hits) / len(hits)
        pairs[text.kind].append((text.request, share))
        if text.axis:
            pairs[f"{text.kind}/{text.axis}"].append((text.request, share))
    order = ("rewrite", "rephrase", "locality", "portability")
    names = sorted(pairs, key=lambda name: (order.index(name.partition("/")[0]), name))
    return {name: Column.of_means(pairs[name]) for name in names}


def probability_values(texts: ScoredTexts, readings: Readings) -> Values:
    """ROME's success and magnitude: an answer against its rival to the same prompt.

    P is exp of the mean log-probability over an answer's tokens, as in ROME, so that answers of any length compare.
    For efficacy (prompts) and paraphrase (rephrases) the new answer is to be likelier than the old one; for
    neighbourhood (locality prompts) the right answer than the new one. Success is the share of prompts where it is,
    magnitude the mean difference of P.
    """
    rivals = {text[:3]: number for number, (text, _) in texts.items() if text.rival}
    columns: Values = {}
    for kind, name in BY_PROBABILITY.items():
        compared = [
            (text.request, readings.losses[number], readings.losses[rivals[text[:3]]])
            for number, (text, _) in texts.items()
            if text.kind == kind and not text.rival and text[:3] in rivals
        ]
        if compared:
            columns[f"{name}_success"] = Column.of_means(
                (unit, float(own < rival)) for unit, own, rival in compared
            )
            columns[f"{name}_magnitude"] = Column.of_means(
                (unit, math.exp(-own) - math.exp(-rival)) for unit, own, rival in compared
            )
    return columns


def damage_values(texts: ScoredTexts, readings: Readings, essays: Mapping[int, int]) -> Values:
    """Perplexity's losses by window, divergences from the base's distributions, and fluency.

    Args:
        texts: scored texts and their target tokens, by number.
        readings: of the model as it is.
        essays: the requests of long generations, by their question's number.
    """
    windows = {number: (text, len(targets)) for number, (text, targets) in texts.items() if text.kind == "text"}
    sizes = {text.request: tokens for text, tokens in windows.values()}
    columns: Values = {}
    if windows:
        losses = {text.request: readings.losses[number] for number, (text, _) in windows.items()}
        columns["perplexity"] = Column(losses, sizes)
    for name, kind in (("locality_kl", "locality"), ("text_kl", "text")):
        moved = [(texts[n][0], kl) for n, kl in sorted(readings.divergences.items()) if texts[n][0].kind == kind]
        if moved:
            columns[name] = Column.of_means((text.request, kl) for text, kl in moved)
    if essays:
        columns["fluency"] = Column({unit: ngram_entropy(readings.said[n]) for n, unit in essays.items()})
    return columns


def figures(values: Values) -> dict[str, Resampled]:
    """The mean of every column, perplexity from its losses, and ROME's score after what it is made of."""
    found: dict[str, Resampled] = {}
    for name, column in values.items():
        found[name] = column.mean().then(np.exp) if name == "perplexity" else column.mean()
        if name == "neighbourhood_magnitude" and all(part in found for part in IN_SCORE):
            found["rome_score"] = harmonic_mean([found[part] for part in IN_SCORE])
    return found


def harmonic_mean(parts: Sequence[Resampled]) -> Resampled:
    """Of figures place by place; nought where one of them is."""
    with np.errstate(divide="ignore"):
        values = len(parts) / sum(1 / part.values for part in parts)
    return Resampled(np.asarray(values), min(part.count for part in parts))

"""Stage one: score every block by the method asked for, choose the golden one, and say how sure the choice is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer

from pipeline.attribution import lga, tracing  # noqa: F401  # they enter themselves among the selectors
from pipeline.attribution.callback import GradientAttribution
from pipeline.attribution.profile import GoldenProfile, Scores, judge, select
from pipeline.attribution.selector import SELECTORS, Selector
from pipeline.errors import UserError, check_choice
from pipeline.files import digest
from pipeline.model.fingerprints import fingerprint
from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.options.shared import TrainerOptions
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import check_subjects
from pipeline.running.trainer import Runtime


def find_golden_layer(
    llm: LLM,
    requests: Sequence[EditRequest],
    options: AttributionOptions | None = None,
    trainer: TrainerOptions | Trainer | None = None,
    request_set: str = "",
    seed: int = 0,
) -> GoldenProfile:
    """Score every block and choose the golden ones: `score_requests`, then `choose`.

    Example:
        >>> profile = find_golden_layer(llm, requests, AttributionOptions(scope="down"))
        >>> profile.golden_layers == profile.ranking[:1]
        True
    """
    return choose(score_requests(llm, requests, options, trainer, seed), options, request_set, seed)


def check_selector(
    requests: Sequence[EditRequest], options: AttributionOptions, selectors: Mapping[str, Selector] = SELECTORS
) -> None:
    """Raise UserError for an unknown method, or requests without the subject that it needs."""
    check_choice("method", options.method, selectors)
    if selectors[options.method].needs_subject:
        check_subjects(requests, f"method: {options.method}", instead="lga")


def score_requests(
    llm: LLM,
    requests: Sequence[EditRequest],
    options: AttributionOptions | None = None,
    trainer: TrainerOptions | Trainer | None = None,
    seed: int = 0,
    work: Path | None = None,
    selectors: Mapping[str, Selector] = SELECTORS,
) -> Scores:
    """Every request's score of every block, in the requests' order.

    Args:
        trainer: what it runs on: a Trainer, or options to make one of.
        work: a folder for half-done work; scoring that finds its own there goes on from it.
        selectors: the ways to score that there are.

    UserError for an unknown method, requests that it cannot score, a prompt longer than the context, an old answer
    that is missing and cannot be found, or scores that are not numbers.
    """
    options = options or AttributionOptions()
    if not requests:
        raise UserError("requests: none to find a layer by")
    check_selector(requests, options, selectors)
    started = time.perf_counter()
    own = [getattr(options, field.name) for field in fields(AttributionOptions)]  # of a command's options, too
    about = digest(llm.fingerprint, llm.chat, own, seed, *requests)
    runtime = Runtime(trainer or TrainerOptions(), seed=seed, work=work / about if work else None)
    values_NL = selectors[options.method].score(llm, requests, options, runtime)
    ids = [request.id for request in requests]
    broken = [ids[number] for number in np.flatnonzero(~np.isfinite(values_NL).all(1)).tolist()]
    if broken:
        raise UserError(
            f"attribution: scores of {len(broken)} of {len(ids)} requests are not numbers: {', '.join(broken[:5])}"
        )
    seconds = time.perf_counter() - started
    return Scores(options.method, ids, values_NL, seconds, llm.name, llm.fingerprint, llm.chat)


def choose(
    found: Scores | GradientAttribution,
    options: AttributionOptions | None = None,
    request_set: str = "",
    seed: int = 0,
    selectors: Mapping[str, Selector] = SELECTORS,
) -> GoldenProfile:
    """The golden profile that scores lead to; fences and order count where the method's scores ask for them.

    Of the blocks inside the fences, that one comes first that does so most often when the requests are resampled,
    by a `seed`. `request_set` is what the profile calls them.
    UserError for more golden layers than lie inside the fences, or a callback that has watched nothing.
    """
    options = options or AttributionOptions()
    scope = options.scope
    if isinstance(found, GradientAttribution):
        scope, found = found.scope, scores_of(found)
    selector = selectors[found.method]
    fences = options.fences if selector.fenced else 0.0
    order = options.order if selector.of_gradients else "signed"
    means = found.values.mean(0).tolist()
    chosen = select(means, fences, order)
    stability = judge(found.values, fences, order, seed) if selector.reads_requests else None
    if stability:  # a fence next to a block's score would let a single request decide
        first = max(chosen.ranking, key=lambda block: stability.chosen[block])
        chosen = chosen._replace(ranking=[first, *(block for block in chosen.ranking if block != first)])
    if options.top_k > len(chosen.ranking):
        raise UserError(
            f"top_k: {options.top_k} golden layers asked for; {len(chosen.ranking)} lie inside the fences"
        )
    return GoldenProfile(
        model=found.model,
        fingerprint=found.fingerprint,
        method=found.method,
        scope=scope if selector.of_gradients else "",
        order=order,
        scores=means,
        golden_layers=chosen.ranking[: options.top_k],
        request_set=request_set,
        requests=len(found.ids),
        seconds=round(found.seconds, 3),
        chat=found.chat,
        stability=stability,
        **chosen._asdict(),
    )


def scores_of(watch: GradientAttribution) -> Scores:
    """What the callback has found in a Trainer of one's own."""
    if not len(watch.scores) or watch.model is None:
        raise UserError("attribution: no scores; run a Trainer that has the callback first")
    name = getattr(getattr(watch.model, "config", None), "name_or_path", "") or type(watch.model).__name__
    ids = [str(number) for number in range(len(watch.scores))]
    return Scores("lga", ids, watch.scores, model=name, fingerprint=fingerprint(watch.model))

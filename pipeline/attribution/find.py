"""Stage one: score every block by the method asked for, choose the golden one, and say how sure the choice is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

from pipeline.attribution.estimators import ESTIMATORS
from pipeline.attribution.fixed import score_fixed, score_middle
from pipeline.attribution.lga import score_gradients
from pipeline.attribution.profile import GoldenProfile
from pipeline.attribution.scores import Scores
from pipeline.attribution.scoring import ScoreLog, check_finite
from pipeline.attribution.selection import select
from pipeline.attribution.selector import Runtime, Selector
from pipeline.attribution.stability import judge
from pipeline.attribution.tracing import score_tracing
from pipeline.attribution.trying import check_trial, score_by_trial
from pipeline.errors import UserError, check_choice
from pipeline.files import claim
from pipeline.model import LLM
from pipeline.options import AttributionOptions, TrainerOptions
from pipeline.requests import EditRequest

FENCED = ("lga", "lga_past_first", "lga_subject", "gradient_norm", "gradient_norm_subject")

METHODS: dict[str, Selector] = {
    name: Selector(
        partial(score_gradients, estimator),
        needs_subject=estimator.needs_subject,
        of_gradients=True,
        fenced=name in FENCED,
    )
    for name, estimator in ESTIMATORS.items()
} | {
    "causal_tracing": Selector(score_tracing, needs_subject=True),
    "sweep": Selector(score_by_trial, check=check_trial),
    "middle": Selector(score_middle, reads_requests=False),
    "fixed": Selector(score_fixed, reads_requests=False),
}


def find_golden_layer(
    llm: LLM,
    requests: Sequence[EditRequest],
    options: AttributionOptions | None = None,
    trainer: TrainerOptions | None = None,
    request_set: str = "",
    seed: int = 0,
) -> GoldenProfile:
    """Score every block and choose the golden ones.

    Args:
        llm: the model; its weights stay as they are.
        requests: the proxy set.
        options: how blocks are scored and chosen.
        trainer: what it runs on.
        request_set: what the profile calls the proxy set.
        seed: of every draw.

    Raises:
        UserError: as `score_requests` and `choose` do.

    Example:
        >>> profile = find_golden_layer(llm, requests, AttributionOptions(order="magnitude"))
        >>> profile.golden_layers == profile.ranking[:1]
        True
    """
    options = options or AttributionOptions()
    scores = score_requests(llm, requests, options, trainer, seed)
    return choose(llm, scores, options, request_set, seed)


def check_method(requests: Sequence[EditRequest], options: AttributionOptions) -> None:
    """Raise UserError for an unknown method, or requests without the subject that it needs."""
    check_choice("method", options.method, METHODS)
    missing = [r.id for r in requests if not r.names_subject]
    if missing and METHODS[options.method].needs_subject:
        raise UserError(
            f"method: {options.method} needs each request's subject in its prompt; not so in {len(missing)} of "
            f"{len(requests)}: {', '.join(missing[:5])}; the method lga does without"
        )
    if check := METHODS[options.method].check:
        check(requests, options)


def score_requests(
    llm: LLM,
    requests: Sequence[EditRequest],
    options: AttributionOptions | None = None,
    trainer: TrainerOptions | None = None,
    seed: int = 0,
    work: Path | None = None,
) -> Scores:
    """Every request's score of every block, in the requests' order.

    Args:
        llm: the model; its weights stay as they are.
        requests: the proxy set.
        options: how blocks are scored.
        trainer: what it runs on.
        seed: of every draw.
        work: a folder for work in progress; scoring that finds its own there goes on from it, to the same scores.

    Raises:
        UserError: for an unknown method, requests that it cannot score, a prompt longer than the context, or work
            of other requests or options in the folder.
    """
    options = options or AttributionOptions()
    check_method(requests, options)
    started = time.perf_counter()
    if work:
        own = [getattr(options, field.name) for field in fields(AttributionOptions)]
        claim(work, "attribution", [llm.fingerprint, llm.chat, own, seed, *requests])
    earlier = float(ScoreLog(work, len(llm.blocks)).read()["seconds"].sum())
    runtime = Runtime(trainer or TrainerOptions(), seed, work)
    values_NL = METHODS[options.method].score(llm, requests, options, runtime)
    ids = [request.id for request in requests]
    check_finite(values_NL, ids)
    return Scores(options.method, ids, values_NL, earlier + time.perf_counter() - started)


def choose(
    llm: LLM, scores: Scores, options: AttributionOptions | None = None, request_set: str = "", seed: int = 0
) -> GoldenProfile:
    """The golden profile that scores lead to; fences and order count where the method's scores ask for them.

    Args:
        llm: the model.
        scores: of requests.
        options: fences, order, top_k and scope.
        request_set: what the profile calls the requests.
        seed: of the resampling.

    Raises:
        UserError: for more golden layers than lie inside the fences.
    """
    options = options or AttributionOptions()
    selector = METHODS[scores.method]
    fences = options.fences if selector.fenced else 0.0
    order = options.order if selector.of_gradients else "signed"
    means = scores.values.mean(0).tolist()
    chosen = select(means, fences, order)
    if options.top_k > len(chosen.ranking):
        raise UserError(
            f"top_k: {options.top_k} golden layers asked for; {len(chosen.ranking)} lie inside the fences"
        )
    golden = chosen.ranking[: options.top_k]
    return GoldenProfile(
        model=llm.name,
        fingerprint=llm.fingerprint,
        method=scores.method,
        scope=options.scope if selector.of_gradients else "",
        order=order,
        scores=means,
        fences=(chosen.low, chosen.high) if fences > 0 else None,
        excluded=chosen.excluded,
        ranking=chosen.ranking,
        raw_ranking=chosen.raw_ranking,
        golden_layers=golden,
        request_set=request_set,
        requests=len(scores.ids),
        seconds=round(scores.seconds, 3),
        chat=llm.chat,
        stability=judge(scores.values, golden[0], fences, order, seed) if selector.reads_requests else None,
    )

"""Where a new store edits: a choice that its few requests leave open is settled by trial edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.attribution.profile import GoldenProfile
from pipeline.editing.editor import choose_layers, edit
from pipeline.evaluation.evaluator import Evaluator
from pipeline.model.llm import LLM
from pipeline.options import ProvingOptions
from pipeline.requests.schema import EditRequest
from pipeline.shipped import program

CLEAR = 0.9  # of resamples name the golden layer
POSSIBLE = 0.05  # of resamples
TRIED = 4  # blocks
TAUGHT = 12  # requests
ENOUGH = 4  # requests that a doubt needs


def is_clear(profile: GoldenProfile) -> bool:
    """Whether the requests that found the golden layer say plainly which it is."""
    return profile.stability is None or profile.stability.chosen[profile.golden_layers[0]] >= CLEAR


def questioned(profile: GoldenProfile, missed: int, tried: int) -> list[str]:
    """A line that doubts the golden layer and says what to do, where most of a batch misses a gate; else none."""
    if tried < ENOUGH or 2 * missed <= tried:
        return []
    return [
        f"{missed} of {tried} requests miss a gate; block {profile.golden_layers[0]}, which earlier ones chose, "
        f"may be the wrong one for these, or full: `{program()} attribute` on these finds theirs, `submit --again` "
        "queues them anew, and `update --profile` edits there from then on"
    ]


def settle_layer(
    llm: LLM, profile: GoldenProfile, requests: Sequence[EditRequest], options: ProvingOptions
) -> tuple[GoldenProfile, str]:
    """The profile with the block that edits best among those that may be golden, and a line that says so.

    A block's trial edits a few of the requests; what counts is the mean of rewrite, rephrase and locality.
    """
    assert profile.stability
    chosen = np.array(profile.stability.chosen)
    likely = [block for block in np.argsort(-chosen, kind="stable").tolist() if chosen[block] >= POSSIBLE]
    fit = dict.fromkeys([*likely, *profile.ranking])
    found: dict[int, float] = {}
    for block in list(fit)[: TRIED + 1]:
        (layer,) = choose_layers(llm, profile.model_copy(update={"golden_layers": [block]}), options.edit)
        if layer not in found and len(found) < TRIED:
            found[layer] = _worth(llm, layer, requests[:TAUGHT], options)
    best = max(found, key=lambda block: found[block])
    told = ", ".join(f"{block} {worth:.3f}" for block, worth in found.items())
    golden = profile.golden_layers[0]
    note = (
        f"{len(requests)} requests leave the golden layer unclear (block {golden} in {chosen[golden]:.0%} of "
        f"resamples); trial edits of {min(TAUGHT, len(requests))}: {told}; block {best} it is"
    )
    return profile.model_copy(update={"golden_layers": [best]}), note


def _worth(llm: LLM, layer: int, requests: Sequence[EditRequest], options: ProvingOptions) -> float:
    evaluator = Evaluator(llm, requests, options.evaluation, options.trainer, ("probes",))
    evaluator.measure("Trial: base")
    how = replace(options.edit, layers=[layer])
    with edit(llm, requests, None, how, options.trainer, seed=options.seed).applied(llm):
        metrics = evaluator.measure(f"Trial: block {layer}").metrics
    return float(np.mean([metrics[name].mean for name in ("rewrite", "rephrase", "locality") if name in metrics]))

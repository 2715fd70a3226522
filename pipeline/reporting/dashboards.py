"""What stands where in TensorBoard: tags in the order of reading, charts of several figures, columns of HPARAMS.

TensorBoard sorts by name: numbers in tags put stages, groups and figures in the order that people want them in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.attribution import GoldenProfile
from pipeline.editing import WeightUpdate
from pipeline.reporting.groups import GROUPS, label

Layout = dict[str, dict[str, list[Any]]]

CHIEF = ("rewrite", "rephrase", "locality")
COMPARED = ("generation_exact_match", *CHIEF, "portability", "rome_score", "perplexity", "locality_kl", "text_kl")
COLUMNS: dict[str, type] = {  # of HPARAMS, the first five being shown at once
    "method": str,
    "block": float,
    "requests": float,
    "block chosen by": str,
    "request set": str,
    "model": str,
    "chat": bool,
    "learning rate": float,
    "epochs": float,
    "rank": float,
    "steps": float,
    "bound": float,
    "strength": float,
    "devices": str,
    "seed": float,
}


def tag(name: str, stage: str = "evaluation") -> str:
    """A metric's tag: stage and group, then its place among them."""
    kind = name.partition("/")[0]
    for number, (group, members) in enumerate(GROUPS.items(), start=1):
        if kind in members:
            return f"{stage}_{number}_{group.replace(' ', '_')}/{list(members).index(kind) + 1}_{name}"
    raise KeyError(name)


def columns(
    model: str,
    requests: int,
    options: Mapping[str, Any],
    update: WeightUpdate | None,
    profile: GoldenProfile | None,
) -> dict[str, Any]:
    """A run's row in HPARAMS: what was done where, and the settings that its method looks at."""
    row: dict[str, Any] = {"requests": requests, "model": model}
    row |= {"request set": options.get("requests"), "chat": options.get("chat"), "seed": options.get("seed")}
    row["devices"] = str(options.get("trainer", {}).get("devices", ""))
    if update:
        row |= {"method": update.method, "block": update.layers[0], "block chosen by": "hand"}
        settings = update.options
        row |= {
            name: settings.get(name.replace(" ", "_")) for name in ("epochs", "rank", "steps", "bound", "strength")
        }
        row["learning rate"] = settings.get("learning_rate", settings.get("step", settings.get("rate")))
    if update and profile and update.layers[0] in profile.golden_layers:
        row["block chosen by"] = f"{profile.method}, {profile.order}"
    return {name: kind(row[name]) for name, kind in COLUMNS.items() if row.get(name) is not None}


def edit_charts() -> Layout:
    """Chief figures side by side, from step 0, before the edit, to step 1, after it."""
    own = ("generation_exact_match", "generation_containment", "rephrase_exact_match", "distractor_exact_match")
    damage = ("locality_kl", "text_kl")
    return {
        "The edit: before (step 0) and after (step 1)": {
            "rewrite, rephrase, locality": _chart(map(tag, CHIEF)),
            "the model's own answers": _chart(map(tag, own)),
            "perplexity": _chart([tag("perplexity")]),
            "divergence from the base, nats": _chart(map(tag, damage)),
        }
    }


def study_charts(study: Mapping[str, Sequence[str]]) -> Layout:
    """What edits come to block by block (a step is a block), a chart a set and method, and the scores in one.

    Args:
        study: by set its methods.
    """
    pairs = [(name, method) for name, methods in study.items() for method in methods]
    charts = {"score, of every set and method": _chart(study_tag(*pair, "score") for pair in pairs)}
    for name, method in pairs:
        charts[f"{name}, {method}: rewrite, rephrase, locality"] = _chart(study_tag(name, method, m) for m in CHIEF)
    return {"Single edits at every block (step: block)": charts}


def store_charts() -> Layout:
    """A store's figures over its versions (a step is a version)."""
    return {
        "A store (step: version)": {
            "rewrite, rephrase, locality": _chart(tag(name, "version") for name in CHIEF),
            "perplexity over the base's": _chart(["version_4_damage/perplexity_ratio"]),
            "facts": _chart(["version_0_requests/4_facts"]),
        }
    }


def study_tag(name: str, method: str, metric: str) -> str:
    """The tag of a figure by block."""
    places = {"score": 1} | {known: place for place, known in enumerate(CHIEF, start=2)}
    return f"study_{name}_{method}/{places.get(metric, 5)}_{metric.replace('/', '_')}_by_block"


def _chart(tags: Any) -> list[Any]:
    """A chart of these tags and no others: TensorBoard takes patterns, which match from the beginning."""
    return ["Multiline", [f"{re.escape(each)}$" for each in tags]]


def metric_names() -> dict[str, str]:
    """The compared metrics' tags, with their names as shown."""
    return {tag(name): label(name) for name in COMPARED}

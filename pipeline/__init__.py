"""Golden Layers: find the layer of a language model where facts are best edited, edit there, prove it, keep it.

    from pipeline import edit, evaluate, find_golden_layer, load_model, load_requests

    llm = load_model("smollm2")
    requests = load_requests("demo")
    profile = find_golden_layer(llm, requests[:80])
    update = edit(llm, requests[80:], profile)
    print(evaluate(llm, requests[80:], update).after.metrics)

Names are looked up when they are used, so that importing the package costs nothing. Each has an example in its
docstring; options are shown where they are given. Stores of updates over time have a package of their own,
`pipeline.updates`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "pipeline.attribution": ("GoldenProfile", "find_golden_layer"),
    "pipeline.editing": ("WeightUpdate", "edit", "export_merged"),
    "pipeline.errors": ("UserError",),
    "pipeline.evaluation": ("evaluate",),
    "pipeline.model": ("LLM", "generate", "load_model"),
    "pipeline.options": (
        "AttributionOptions",
        "EditOptions",
        "EvaluationOptions",
        "FinetuneOptions",
        "LocateOptions",
        "LoraOptions",
        "OnePassOptions",
        "StatisticsOptions",
        "TrainerOptions",
    ),
    "pipeline.updates": ("LiveModel",),
    "pipeline.requests": ("EditRequest", "Probe", "load_requests", "split_by_subject"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")

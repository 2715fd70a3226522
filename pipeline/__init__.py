"""Golden Layers: find the layer of a language model where facts are best edited, edit there, prove it, keep it.

    from pipeline import edit, evaluate, find_golden_layer, load_model, load_requests, split_by_subject

    llm = load_model("smollm2")
    proxy, edits = split_by_subject(load_requests("demo"), 0.9)
    profile = find_golden_layer(llm, proxy)
    update = edit(llm, edits, profile)
    print(evaluate(llm, edits, update).after.metrics)

Names are looked up when they are used, so that importing the package costs nothing. Each has an example in its
docstring. Stores of updates over time have a package of their own, `pipeline.updates`.
"""

from pipeline.offered import offered

__version__ = "0.1.0"

__getattr__, __all__ = offered(
    __name__,
    {
        "attribution.callback": ("GradientAttribution",),
        "attribution.find": ("choose", "find_golden_layer"),
        "attribution.profile": ("GoldenProfile",),
        "editing.editor": ("edit",),
        "editing.export": ("export_merged",),
        "editing.finetune": ("FineTune",),
        "editing.update": ("WeightUpdate",),
        "errors": ("UserError",),
        "evaluation.evaluator": ("evaluate",),
        "model.blocks": ("find_blocks",),
        "model.generation": ("generate",),
        "model.llm": ("LLM",),
        "model.loading": ("load_model",),
        "options.attribution": ("AttributionOptions",),
        "options.editing": ("EditOptions", "StatisticsOptions"),
        "options.shared": ("EvaluationOptions", "TrainerOptions"),
        "requests.data": ("EditRequests",),
        "requests.readers": ("load_requests",),
        "requests.schema": ("EditRequest", "Probe"),
        "requests.sets": ("split_by_subject",),
        "serving.live": ("LiveModel",),
        "study.race": ("race",),
    },
)

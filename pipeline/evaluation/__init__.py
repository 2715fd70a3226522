"""Did it work, what else moved: answers, probabilities and damage, before and after an edit."""

from pipeline.offered import offered

__getattr__, __all__ = offered(
    __name__,
    {
        "evaluator": ("Evaluation", "Evaluator", "Measurement", "evaluate"),
        "known": ("Known", "find_known"),
        "metrics": ("Estimate", "Resampled"),
    },
)

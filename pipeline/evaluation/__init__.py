"""Did it work, what else moved: answers, probabilities and damage, before and after an edit."""

from pipeline.evaluation.evaluate import Evaluation, Evaluator, Measurement, evaluate
from pipeline.evaluation.known import Known, find_known
from pipeline.evaluation.metrics import BootstrapMean, Estimate, Resampled

__all__ = [
    "BootstrapMean",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "Known",
    "Measurement",
    "Resampled",
    "evaluate",
    "find_known",
]

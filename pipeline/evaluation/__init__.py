"""Did it work, what else moved: probes, generation and perplexity, before and after an edit."""

from pipeline.evaluation.evaluate import Evaluation, Evaluator, evaluate
from pipeline.evaluation.known import Known, find_known
from pipeline.evaluation.metrics import BootstrapMean, Estimate

__all__ = ["BootstrapMean", "Estimate", "Evaluation", "Evaluator", "Known", "evaluate", "find_known"]

"""What stands above editing and evaluation: measurements of the methods themselves."""

from pipeline.study.attribution import benchmark_attribution
from pipeline.study.editing import benchmark_editing
from pipeline.study.evaluation import benchmark_evaluation
from pipeline.study.updates import benchmark_updates

BENCHMARKS = {
    "attribution": benchmark_attribution,
    "editing": benchmark_editing,
    "evaluation": benchmark_evaluation,
    "updates": benchmark_updates,
}

__all__ = ["BENCHMARKS", "benchmark_attribution", "benchmark_editing", "benchmark_evaluation", "benchmark_updates"]

"""What stands above editing and evaluation: trial edits, studies, and measurements of the methods themselves."""

from pipeline.study.attribution import benchmark_attribution
from pipeline.study.editing import benchmark_editing
from pipeline.study.evaluation import benchmark_evaluation
from pipeline.study.study import Study, run_study
from pipeline.study.sweep import Grid, Sweep
from pipeline.study.updates import benchmark_updates

BENCHMARKS = {
    "attribution": benchmark_attribution,
    "editing": benchmark_editing,
    "evaluation": benchmark_evaluation,
    "updates": benchmark_updates,
}

__all__ = [
    "BENCHMARKS",
    "Grid",
    "Study",
    "Sweep",
    "benchmark_attribution",
    "benchmark_editing",
    "benchmark_evaluation",
    "benchmark_updates",
    "run_study",
]

"""What stands above editing and evaluation: measurements of the methods themselves."""

from pipeline.study.editing import benchmark_editing
from pipeline.study.evaluation import benchmark_evaluation

BENCHMARKS = {"editing": benchmark_editing, "evaluation": benchmark_evaluation}

__all__ = ["BENCHMARKS", "benchmark_editing", "benchmark_evaluation"]

"""What stands above editing and evaluation: measurements of the methods themselves."""

from pipeline.study.editing import benchmark_editing
from pipeline.study.updates import benchmark_updates

BENCHMARKS = {"editing": benchmark_editing, "updates": benchmark_updates}

__all__ = ["BENCHMARKS", "benchmark_editing", "benchmark_updates"]

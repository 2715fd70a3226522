"""What stands above editing and evaluation: measurements of the methods themselves."""

from pipeline.study.editing import benchmark_editing

__all__ = ["benchmark_editing"]

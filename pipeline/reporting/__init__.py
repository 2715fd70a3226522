"""What people see: TensorBoard, figures, the report, and the tables in the terminal."""

from pipeline.reporting.run_log import RunLog, run_log
from pipeline.reporting.terminal import say, show_answers, show_benchmark, show_tokens

__all__ = ["RunLog", "run_log", "say", "show_answers", "show_benchmark", "show_tokens"]

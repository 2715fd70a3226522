"""What people see: TensorBoard, figures, the report, and the tables in the terminal."""

from pipeline.reporting.board import show_on_board
from pipeline.reporting.run_log import RunLog, run_log
from pipeline.reporting.terminal import show_answers, show_benchmark

__all__ = ["RunLog", "run_log", "show_answers", "show_benchmark", "show_on_board"]

"""What people see: TensorBoard, figures, the report, and the tables in the terminal."""

from pipeline.reporting.board import show_on_board
from pipeline.reporting.run_log import RunLog, run_log
from pipeline.reporting.stores import (
    show_batch,
    show_facts,
    show_history,
    show_story,
    show_submitted,
    show_version,
)
from pipeline.reporting.terminal import say, show_answers, show_plan, show_tokens

__all__ = [
    "RunLog",
    "run_log",
    "say",
    "show_answers",
    "show_batch",
    "show_facts",
    "show_history",
    "show_on_board",
    "show_plan",
    "show_story",
    "show_submitted",
    "show_tokens",
    "show_version",
]

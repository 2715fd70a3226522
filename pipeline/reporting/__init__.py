"""What people see: TensorBoard, figures, the report, and the tables in the terminal."""

from pipeline.offered import offered

__getattr__, __all__ = offered(
    __name__,
    {
        "board": ("show_on_board",),
        "run_log": ("RunLog",),
        "stores": (
            "show_batch",
            "show_facts",
            "show_history",
            "show_story",
            "show_submitted",
            "show_version",
        ),
        "terminal": ("say", "show_answers", "show_plan", "show_tokens"),
    },
)

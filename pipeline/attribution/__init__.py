"""Where to change it: selectors score every block, request by request; the golden profile says what is chosen."""

from pipeline.offered import offered

__getattr__, __all__ = offered(
    __name__,
    {
        "callback": ("GradientAttribution",),
        "find": ("SELECTORS", "check_selector", "choose", "find_golden_layer", "score_requests"),
        "profile": ("GoldenProfile", "Scores"),
        "selector": ("Selector",),
        "selection": ("Selection", "Stability", "judge", "select"),
    },
)

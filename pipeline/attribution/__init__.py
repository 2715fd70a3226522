"""Where to change it: selectors score every block, request by request; the golden profile says what is chosen."""

from pipeline.attribution.callback import GradientAttribution
from pipeline.attribution.find import METHODS, check_method, choose, find_golden_layer, score_requests
from pipeline.attribution.profile import GoldenProfile
from pipeline.attribution.scores import Scores
from pipeline.attribution.selection import Selection, select
from pipeline.attribution.selector import Runtime, Selector
from pipeline.attribution.stability import Stability, judge

__all__ = [
    "METHODS",
    "GoldenProfile",
    "GradientAttribution",
    "Runtime",
    "Scores",
    "Selection",
    "Selector",
    "Stability",
    "check_method",
    "choose",
    "find_golden_layer",
    "judge",
    "score_requests",
    "select",
]

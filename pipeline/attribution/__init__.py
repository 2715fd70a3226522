"""Where to change it: layer gradient analysis, Tukey's fences, and the golden profile they lead to."""

from pipeline.attribution.callback import GradientAttribution
from pipeline.attribution.lga import METHODS, find_golden_layer
from pipeline.attribution.profile import GoldenProfile
from pipeline.attribution.selection import Selection, select

__all__ = ["METHODS", "GoldenProfile", "GradientAttribution", "Selection", "find_golden_layer", "select"]

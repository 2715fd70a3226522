"""Blocks that are named without looking at requests: the middle one, and one that the user names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.attribution.selector import Runtime, Values
from pipeline.errors import UserError
from pipeline.model import LLM
from pipeline.options import AttributionOptions
from pipeline.requests import EditRequest


def score_middle(llm: LLM, requests: Sequence[EditRequest], _: AttributionOptions, __: Runtime) -> Values:
    """1 at block ⌊L / 2⌋, 0 elsewhere."""
    return _one(llm, len(requests), len(llm.blocks) // 2)


def score_fixed(llm: LLM, requests: Sequence[EditRequest], options: AttributionOptions, _: Runtime) -> Values:
    """1 at the block of `options.layer`, 0 elsewhere.

    Raises:
        UserError: when there is no such block.
    """
    assert options.layer is not None
    if options.layer >= len(llm.blocks):
        raise UserError(f"layer: {options.layer} is not a block of {llm.name}; it has 0 to {len(llm.blocks) - 1}")
    return _one(llm, len(requests), options.layer)


def _one(llm: LLM, requests: int, block: int) -> Values:
    values_NL = np.zeros((requests, len(llm.blocks)))
    values_NL[:, block] = 1
    return values_NL

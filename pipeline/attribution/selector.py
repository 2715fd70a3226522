"""What a selector is: the interface of every way to score blocks, and the table of those that users have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.requests.schema import EditRequest
from pipeline.running.sharding import is_sharded
from pipeline.running.trainer import Runtime

Values = NDArray[np.float64]  # (N, L): N requests, L blocks
LITTLE = 1 << 24  # numbers: 64 MB of them in float32


class Selector(NamedTuple):
    """A way to score blocks."""

    # from model, requests, options and runtime to each request's score of every block, in the requests' order
    score: Callable[[LLM, Sequence[EditRequest], AttributionOptions, Runtime], Values]
    needs_subject: bool = False  # whether each request must name a subject that its prompt holds
    of_gradients: bool = False  # whether it scores gradients of the scope's weights: scope and order count
    fenced: bool = False  # whether blocks may score high for the model's sake (massive activations): fences count
    reads_requests: bool = True  # whether the scores depend on the requests at all


SELECTORS: dict[str, Selector] = {}


def register(name: str, selector: Selector) -> None:
    """Enter a selector under a name for `--method`; ValueError for one that is taken, or no plain word."""
    if not name.isidentifier() or name in SELECTORS:
        raise ValueError(f"selector {name!r}: expected a new name of letters, digits and underscores")
    SELECTORS[name] = selector


def tokens_at_once(llm: LLM, kept: int, spread: bool = False) -> int:
    """How many tokens may run together so that what is kept of them takes at most half of the weights' memory.

    It is a quarter where devices share them, as `spread` says of a shape.

    Of each, `kept` numbers are in each block. Of small models, `LITTLE` numbers may be kept in any case.
    """
    weights = sum(parameter.numel() for parameter in llm.model.parameters())
    return max(weights // (4 if spread or is_sharded(llm.model) else 2), LITTLE) // (kept * len(llm.blocks))


def score_one(llm: LLM, requests: Sequence[EditRequest], options: AttributionOptions, _: Runtime) -> Values:
    """1 at block `options.layer`, by default ⌊L / 2⌋, and 0 elsewhere; UserError when there is no such block."""
    block = len(llm.blocks) // 2 if options.layer is None else options.layer
    llm.check_layers([block], "layer")
    values_NL = np.zeros((len(requests), len(llm.blocks)))
    values_NL[:, block] = 1
    return values_NL


for _name in ("middle", "fixed"):  # which alone is given a layer
    register(_name, Selector(score_one, reads_requests=False))

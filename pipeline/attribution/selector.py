"""What a selector is: the interface of every way to score blocks, and the table of those that users have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime

Values = NDArray[np.float64]  # (N, L): N requests, L blocks
LITTLE = 1 << 24  # numbers: 64 MB of them in float32


class Selector(NamedTuple):
    """A way to score blocks.

    Attributes:
        score: from model, requests, options and runtime to each request's score of every block, in the requests'
            order.
        needs_subject: whether each request must name a subject that its prompt holds.
        of_gradients: whether it scores gradients of the scope's weights: then scope and order mean something.
        fenced: whether single blocks' scores may be large for reasons of the model alone (massive activations),
            so that Tukey's fences set them aside.
        reads_requests: whether the scores depend on the requests at all.
    """

    score: Callable[[LLM, Sequence[EditRequest], AttributionOptions, Runtime], Values]
    needs_subject: bool = False
    of_gradients: bool = False
    fenced: bool = False
    reads_requests: bool = True


SELECTORS: dict[str, Selector] = {}


def register(name: str, selector: Selector) -> None:
    """Enter a selector under the name that `--method` takes.

    Raises:
        ValueError: when there is one of that name already, or the name is no plain word.
    """
    if not name.isidentifier() or name in SELECTORS:
        raise ValueError(f"selector {name!r}: expected a new name of letters, digits and underscores")
    SELECTORS[name] = selector


def tokens_at_once(llm: LLM, kept: int) -> int:
    """How many tokens may run together so that what is kept of them takes at most half of the weights' memory.

    Of each, `kept` numbers are in each block. Of small models, `LITTLE` numbers may be kept in any case.
    """
    weights = sum(parameter.numel() for parameter in llm.model.parameters())
    return max(weights // 2, LITTLE) // (kept * len(llm.blocks))


def one_block(llm: LLM, requests: int, block: int) -> Values:
    """1 at a block, 0 elsewhere, for every request."""
    values_NL = np.zeros((requests, len(llm.blocks)))
    values_NL[:, block] = 1
    return values_NL


def score_middle(llm: LLM, requests: Sequence[EditRequest], _: AttributionOptions, __: Runtime) -> Values:
    """The block in the middle, ⌊L / 2⌋."""
    return one_block(llm, len(requests), len(llm.blocks) // 2)


def score_fixed(llm: LLM, requests: Sequence[EditRequest], options: AttributionOptions, _: Runtime) -> Values:
    """The block of `options.layer`; UserError when there is none."""
    assert options.layer is not None
    llm.check_layers([options.layer], "layer")
    return one_block(llm, len(requests), options.layer)


register("middle", Selector(score_middle, reads_requests=False))
register("fixed", Selector(score_fixed, reads_requests=False))

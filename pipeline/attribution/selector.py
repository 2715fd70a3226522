"""What a selector is: the interface of every way to score blocks, and what it is given to run with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.model import LLM
from pipeline.options import AttributionOptions, TrainerOptions
from pipeline.requests import EditRequest

Values = NDArray[np.float64]  # (N, L): N requests, L blocks


class Runtime(NamedTuple):
    """What a selector runs with.

    Attributes:
        trainer: what it runs on.
        seed: of every draw.
        work: a folder for work in progress; what is found there is not done again.
    """

    trainer: TrainerOptions
    seed: int = 0
    work: Path | None = None


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
        check: raises UserError for requests or options that it cannot work with, before a model is loaded.
    """

    score: Callable[[LLM, Sequence[EditRequest], AttributionOptions, Runtime], Values]
    needs_subject: bool = False
    of_gradients: bool = False
    fenced: bool = False
    reads_requests: bool = True
    check: Callable[[Sequence[EditRequest], AttributionOptions], None] | None = None

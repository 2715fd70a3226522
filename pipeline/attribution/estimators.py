"""Estimators: what a block's score is, made of inner products of a request's weight gradients.

g_old and g_new are the gradients of ℓ(x, y_old) and ℓ(x, y_new) with respect to the block's weights. What enters is
their inner products summed over the block's projections; what comes out is one score a request and block. An
estimator may leave positions of the text out: then both gradients are sums over the others alone.

An edit acts where a fact is looked up: at its subject's last token (ROME, arXiv 2202.05262). That is where
locate-then-edit changes what a block puts out, and the part of any other edit that rephrases share. So the gradient
at that token alone says what a block can do for the fact; the first token's massive activations, and the last
blocks' gradients at the prompt's end, where nothing is looked up, have no part in it.

Shapes: R rows of all sides, T tokens, K of them kept, Q pairs of sides, P requests, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.attribution.inner_products import Pair
from pipeline.requests.rows import Batch

OLD, NEW = 0, 1  # numbers of the sides


class Estimator(NamedTuple):
    """How inner products become a score.

    Attributes:
        pairs: which sides' gradients are multiplied.
        combine: from those products (Q, P, L) to scores (P, L).
        positions: from a batch, and how many tokens all prompts begin with, to the positions (R, K) that count;
            None: all do.
        sides: how many answers of a request are run: both, or the new one alone, which then has number 0.
        needs_subject: whether `positions` asks where a request's subject ends.
    """

    pairs: tuple[Pair, ...]
    combine: Callable[[Tensor], Tensor]
    positions: Callable[[Batch, int], Tensor] | None = None
    sides: int = 2
    needs_subject: bool = False


def product(products_QPL: Tensor) -> Tensor:
    """⟨g_old, g_new⟩."""
    return products_QPL[0]


def norm(products_QPL: Tensor) -> Tensor:
    """‖g‖."""
    return products_QPL[0].clamp(min=0).sqrt()


def last_of_subject(batch: Batch, _: int) -> Tensor:
    """The subject's last token alone."""
    places = [text.subject[1] for text in batch.texts if text.subject]
    return torch.tensor(places, device=batch.row_N.device)[:, None]


LGA = Estimator(((OLD, NEW),), product)
GRADIENT_NORM_SUBJECT = Estimator(((0, 0),), norm, last_of_subject, sides=1, needs_subject=True)

"""Estimators: what a block's score is, made of inner products of a request's weight gradients.

g_old and g_new are the gradients of ℓ(x, y_old) and ℓ(x, y_new) with respect to the block's weights. What enters is
their inner products summed over the block's projections; what comes out is one score a request and block. An
estimator may leave positions of the text out: then both gradients are sums over the others alone.

Blocks with massive activations (at the first token, which is the same in every request) dominate ⟨g_old, g_new⟩ for
reasons that have nothing to do with the facts. Fences cut them off; leaving that token out, or taking the cosine,
in which a large input counts in numerator and denominator alike, keeps what such blocks say about the facts.

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
from pipeline.model import TargetBatch

OLD, NEW = 0, 1  # numbers of the sides


class Estimator(NamedTuple):
    """How inner products become a score.

    Attributes:
        pairs: which sides' gradients are multiplied.
        combine: from those products (Q, P, L) to scores (P, L).
        positions: from a batch, and how many tokens all prompts begin with, to the positions (R, K) that count;
            None: all do.
        sides: how many answers of a request are run: both, or the new one alone, which then has number 0.
        needs_subject: whether `positions` asks where a request's subject ends: then the batch's tags say so.
    """

    pairs: tuple[Pair, ...]
    combine: Callable[[Tensor], Tensor]
    positions: Callable[[TargetBatch, int], Tensor] | None = None
    sides: int = 2
    needs_subject: bool = False


def product(products_QPL: Tensor) -> Tensor:
    """⟨g_old, g_new⟩."""
    return products_QPL[0]


def cosine(products_QPL: Tensor) -> Tensor:
    """⟨g_old, g_new⟩ / (‖g_old‖ ‖g_new‖): every request counts alike, and so does every block."""
    across, old, new = products_QPL
    return across / (old.clamp(min=0).sqrt() * new.clamp(min=0).sqrt()).clamp(min=torch.finfo(across.dtype).tiny)


def norm(products_QPL: Tensor) -> Tensor:
    """‖g‖."""
    return products_QPL[0].clamp(min=0).sqrt()


def past_shared(batch: TargetBatch, shared: int) -> Tensor:
    """All positions but those that every prompt of a model begins with: a chat's opening, or the first token."""
    rows, tokens = batch.input_ids_BT.shape
    return torch.arange(shared, tokens, device=batch.input_ids_BT.device).expand(rows, -1)


def last_of_prompt(batch: TargetBatch, _: int) -> Tensor:
    """The prompt's last token alone: the one that predicts the answer's first."""
    rows, tokens = batch.input_ids_BT.shape
    first_R = torch.full((rows,), tokens, device=batch.row_N.device)
    return first_R.scatter_reduce(0, batch.row_N, batch.position_N, "amin")[:, None]


def last_of_subject(batch: TargetBatch, _: int) -> Tensor:
    """The subject's last token alone."""
    return torch.tensor(batch.tags, device=batch.row_N.device)[:, None]


COSINE = ((OLD, NEW), (OLD, OLD), (NEW, NEW))

ESTIMATORS = {
    "lga": Estimator(((OLD, NEW),), product),
    "lga_past_first": Estimator(((OLD, NEW),), product, past_shared),
    "lga_cosine": Estimator(COSINE, cosine),
    "lga_cosine_past_first": Estimator(COSINE, cosine, past_shared),
    "lga_cosine_last": Estimator(COSINE, cosine, last_of_prompt),
    "lga_subject": Estimator(((OLD, NEW),), product, last_of_subject, needs_subject=True),
    "gradient_norm": Estimator(((0, 0),), norm, sides=1),
    "gradient_norm_subject": Estimator(((0, 0),), norm, last_of_subject, sides=1, needs_subject=True),
}

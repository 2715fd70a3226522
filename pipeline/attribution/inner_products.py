"""Inner products of weight gradients that are never formed, and the scores of blocks that are made of them.

For y_t = W a_t a request's gradient of W is Σ_t δ_t a_tᵀ with δ_t = ∂ℓ/∂y_t, so the inner product of two
such gradients is Σ_s Σ_t (a_s · a'_t)(δ_s · δ'_t): two small Gram matrices.

A batch holds sides of P requests each, one behind the other: with two, the old answers' rows and then the new
answers'. Shapes: R rows of all sides, P requests, S and T positions, K of them kept, I inputs and O outputs of W,
Q pairs of sides, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.model.activations import wide
from pipeline.requests.rows import Batch

Pair = tuple[int, int]  # numbers of two sides
OLD, NEW = 0, 1


class CapturedInput:
    """What went into a projection, the sides' rows one behind the other, and its Gram matrices."""

    def __init__(self, input_RTI: Tensor, sides: int = 2) -> None:
        self.inputs = inputs = wide(input_RTI).chunk(sides)
        self.gram = cache(lambda one, other: inputs[one] @ inputs[other].mT)  # dot products of inputs, (P, S, T)

    def products(self, grad_RTO: Tensor, pairs: Sequence[Pair] = ((0, 1),)) -> Tensor:
        """Inner products of the requests' weight gradients, given the gradients at the outputs, shape (Q, P)."""
        grads = wide(grad_RTO).chunk(len(self.inputs))
        found = [(self.gram(*pair) * (grads[pair[0]] @ grads[pair[1]].mT)).sum((1, 2)) for pair in pairs]
        return torch.stack(found)


class Estimator(NamedTuple):
    """How inner products, summed over a block's projections, become its score."""

    pairs: tuple[Pair, ...]  # which sides' gradients are multiplied
    combine: Callable[[Tensor], Tensor]  # from those products (Q, P, L) to scores (P, L)
    # from a batch, and how many tokens all prompts begin with, to the positions (R, K) that count; None: all do
    positions: Callable[[Batch, int], Tensor] | None = None
    sides: int = 2  # answers of a request that are run: both, or the new one alone, which then has number 0
    needs_subject: bool = False  # whether `positions` asks where a request's subject ends


def product(products_QPL: Tensor) -> Tensor:
    """⟨g_old, g_new⟩."""
    return products_QPL[0]


def norm(products_QPL: Tensor) -> Tensor:
    """‖g‖."""
    return products_QPL[0].clamp(min=0).sqrt()


def cosine(products_QPL: Tensor) -> Tensor:
    """⟨g_old, g_new⟩ / (‖g_old‖ ‖g_new‖): every request counts alike, and so does every block."""
    across, old, new = products_QPL
    return across / (old.clamp(min=0).sqrt() * new.clamp(min=0).sqrt()).clamp(min=torch.finfo(across.dtype).tiny)


def last_of_subject(batch: Batch, _: int) -> Tensor:
    """The subject's last token alone: that is where a fact is looked up (ROME, arXiv 2202.05262)."""
    places = [text.subject[1] for text in batch.texts if text.subject]
    return torch.tensor(places, device=batch.row_N.device)[:, None]


def past_shared(batch: Batch, shared: int) -> Tensor:
    """All positions but those that every prompt of a model begins with: a chat's opening, or the first token."""
    rows, tokens = batch.input_ids_BT.shape
    return torch.arange(shared, tokens, device=batch.input_ids_BT.device).expand(rows, -1)


def last_of_prompt(batch: Batch, _: int) -> Tensor:
    """The prompt's last token alone: the one that predicts the answer's first."""
    places = [text.target_start - 1 for text in batch.texts]
    return torch.tensor(places, device=batch.row_N.device)[:, None]


ACROSS = ((OLD, NEW),)
COSINE = ((OLD, NEW), (OLD, OLD), (NEW, NEW))

LGA = Estimator(ACROSS, product)
GRADIENT_NORM_SUBJECT = Estimator(((0, 0),), norm, last_of_subject, sides=1, needs_subject=True)

# Under research, for studies alone. Blocks with massive activations (at the first token, which is the same in every
# request) dominate ⟨g_old, g_new⟩ for reasons that have nothing to do with the facts. Fences cut them off; leaving
# that token out, or taking the cosine, in which a large input counts in numerator and denominator alike, keeps what
# such blocks say about the facts.
ESTIMATORS = {
    "lga_past_first": Estimator(ACROSS, product, past_shared),
    "lga_subject": Estimator(ACROSS, product, last_of_subject, needs_subject=True),
    "lga_cosine": Estimator(COSINE, cosine),
    "lga_cosine_past_first": Estimator(COSINE, cosine, past_shared),
    "lga_cosine_last": Estimator(COSINE, cosine, last_of_prompt),
    "gradient_norm": Estimator(((0, 0),), norm, sides=1),
}

"""Selectors under research: kin of LGA (`pipeline.attribution` has those that users take).

Blocks with massive activations (at the first token, which is the same in every request) dominate ⟨g_old, g_new⟩ for
reasons that have nothing to do with the facts. Fences cut them off; leaving that token out, or taking the cosine,
in which a large input counts in numerator and denominator alike, keeps what such blocks say about the facts.

Shapes: R rows of all sides, T tokens, K of them kept, Q pairs of sides, P requests, L blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.attribution.find import SELECTORS
from pipeline.attribution.inner_products import NEW, OLD, Estimator, last_of_subject, norm, product
from pipeline.attribution.lga import of_gradients
from pipeline.attribution.selector import Selector
from pipeline.requests.rows import Batch


def cosine(products_QPL: Tensor) -> Tensor:
    """⟨g_old, g_new⟩ / (‖g_old‖ ‖g_new‖): every request counts alike, and so does every block."""
    across, old, new = products_QPL
    return across / (old.clamp(min=0).sqrt() * new.clamp(min=0).sqrt()).clamp(min=torch.finfo(across.dtype).tiny)


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

ESTIMATORS = {
    "lga_past_first": Estimator(ACROSS, product, past_shared),
    "lga_subject": Estimator(ACROSS, product, last_of_subject, needs_subject=True),
    "lga_cosine": Estimator(COSINE, cosine),
    "lga_cosine_past_first": Estimator(COSINE, cosine, past_shared),
    "lga_cosine_last": Estimator(COSINE, cosine, last_of_prompt),
    "gradient_norm": Estimator(((0, 0),), norm, sides=1),
}

RESEARCH: dict[str, Selector] = SELECTORS | {  # a cosine has a bound, and needs no fences
    name: of_gradients(estimator, fenced=estimator.combine is not cosine) for name, estimator in ESTIMATORS.items()
}

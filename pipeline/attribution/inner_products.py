"""Inner products of weight gradients that are never formed.

For y_t = W a_t a request's gradient of W is Σ_t δ_t a_tᵀ with δ_t = ∂ℓ/∂y_t, so the inner product of two
such gradients is Σ_s Σ_t (a_s · a'_t)(δ_s · δ'_t): two small Gram matrices. Where texts are so long that these
would cost more than the gradients themselves, one request's gradients are formed at a time.

Shapes: P pairs, S and T positions, I inputs and O outputs of W.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram(first_PSD: Tensor, second_PTD: Tensor) -> Tensor:
    """All dot products between two rows' positions, pair by pair, shape (P, S, T)."""
    return first_PSD @ second_PTD.mT


def forming_is_cheaper(positions: int, inputs: int, outputs: int) -> bool:
    """Whether 2·T·I·O multiplications (two gradients) are fewer than T²·(I + O) (two Gram matrices)."""
    return 2 * inputs * outputs < positions * (inputs + outputs)


def formed_products(
    input_old_PSI: Tensor, grad_old_PSO: Tensor, input_new_PTI: Tensor, grad_new_PTO: Tensor
) -> Tensor:
    """The same inner products by way of the gradients, one pair at a time, shape (P,)."""
    return torch.stack(
        [
            ((g_old.mT @ a_old) * (g_new.mT @ a_new)).sum()
            for a_old, g_old, a_new, g_new in zip(
                input_old_PSI, grad_old_PSO, input_new_PTI, grad_new_PTO, strict=True
            )
        ]
    )


class CapturedInput:
    """What went into a projection for P pairs, old rows first; projections that share it share its Gram matrix."""

    def __init__(self, input_2PTI: Tensor) -> None:
        self.tensor = input_2PTI
        self._gram: Tensor | None = None

    def products(self, grad_2PTO: Tensor) -> Tensor:
        """Inner products of the pairs' weight gradients, given the gradients at the outputs, shape (P,)."""
        wide = torch.promote_types(grad_2PTO.dtype, torch.float32)
        grad_old, grad_new = grad_2PTO.to(wide).chunk(2)
        input_old, input_new = self.tensor.to(wide).chunk(2)
        if forming_is_cheaper(input_old.shape[1], input_old.shape[2], grad_old.shape[2]):
            return formed_products(input_old, grad_old, input_new, grad_new)
        if self._gram is None:
            self._gram = gram(input_old, input_new)
        return torch.einsum("pst,pst->p", self._gram, gram(grad_old, grad_new))

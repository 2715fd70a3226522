"""Adam in whitened coordinates: a step moves what ordinary text uses little, and what it leaves free much.

With C the second moment of what text sends into a weight W, training V in W + V·P, P = (C + ridge)^(-1/2), by Adam
is the same as giving Adam the gradient G·P and putting its step u into W as u·P. Nothing but W is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.running.sharding import on_mesh_of
from pipeline.running.trainer import own_precision

ENOUGH = 1e-9  # how close to the root an iteration comes


def whitener(moment_II: Tensor, ridge: float) -> Tensor:
    """P for inputs of second moment C: symmetric, and text's inputs keep their mean squared norm under it.

    Both are (I, I), or (E, I, I) of experts. The larger the ridge (relative to the mean of C's eigenvalues), the
    closer P is to the identity.
    """
    mean = moment_II.diagonal(dim1=-2, dim2=-1).double().mean()
    root, side = inverse_root if moment_II.is_cuda else _inverse_root_on_cpu, moment_II.shape[-1]
    roots = [root(each.to(torch.float64, copy=True).div_(mean), ridge) for each in moment_II.view(-1, side, side)]
    P = roots[0] if moment_II.dim() == 2 else torch.stack(roots)
    kept = (moment_II.to(torch.float64, copy=True).div_(mean) @ P).mul_(P).sum()
    return P.mul_((moment_II.numel() / side / kept).sqrt()).float()


def inverse_root(matrix: Tensor, ridge: float) -> Tensor:
    """(A + ridge)^(-1/2) of a positive A, by products alone: seconds on a GPU, where eigenvectors take minutes.

    It is the coupled iteration of Newton and Schulz, scaled in each step by what is known of the least eigenvalue.
    """
    root, inverse = matrix.clone(), torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    root.diagonal().add_(ridge)
    scale = root.norm()
    root /= scale
    least = (ridge / scale.item()) ** 0.5  # of the root's eigenvalues, which lie up to 1
    while least < 1 - ENOUGH:
        stretch = (3 / (1 + least + least**2)) ** 0.5
        step = (inverse @ root).mul_(-(stretch**3) / 2)
        step.diagonal().add_(1.5 * stretch)
        root = root @ step
        inverse = step @ inverse
        least = stretch * least * (3 - (stretch * least) ** 2) / 2
    return inverse.div_(scale.sqrt())


def _inverse_root_on_cpu(matrix: Tensor, ridge: float) -> Tensor:
    """The same by eigenvectors, which is the faster way there."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * (values.clamp(min=0) + ridge).rsqrt()) @ vectors.T


class WhitenedAdam(torch.optim.Adam):
    """Adam whose weights step in whitened coordinates where they have a P, on their last dimension or not."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], whiteners: Mapping[nn.Parameter, tuple[Tensor, bool]]
    ) -> None:
        super().__init__(groups)
        self.whiteners = whiteners

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a closure runs first, as Lightning's does forward and backward in it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        before = {}
        for weight in self.whiteners:
            if weight.grad is not None:
                before[weight] = weight.clone()
                weight.grad = self._whitened(weight.grad, weight)
        super().step()
        for weight, old in before.items():
            weight.copy_(old + self._whitened(weight - old, weight))
        return loss

    def _whitened(self, tensor: Tensor, weight: nn.Parameter) -> Tensor:
        P, last = self.whiteners[weight]
        P = on_mesh_of(P.to(device=tensor.device, dtype=tensor.dtype), weight)
        with own_precision(tensor.device):
            return tensor @ P if last else P @ tensor

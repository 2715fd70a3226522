"""The gradient-attribution callback: per-layer scores of layer gradient analysis, as gradients arrive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.attribution.estimators import ESTIMATORS, Estimator
from pipeline.attribution.inner_products import CapturedInput
from pipeline.errors import UserError
from pipeline.model import Block, TargetBatch
from pipeline.model.blocks import by_row
from pipeline.model.checkpointing import runs_again


class GradientAttribution(Callback):
    """Finds φ_il = ⟨∇ℓ(x_i, y_i^old), ∇ℓ(x_i, y_i^new)⟩ over the weights of each layer (arXiv 2602.20207).

    Watches a module whose `predict_step` runs P requests' rows, side by side (the old answers' first), and
    differentiates the sum of the rows' losses. Forward hooks keep what enters each projection; hooks on its output
    turn the gradient into inner products the moment it arrives, so no gradient of a weight's size ever exists.

    Args:
        blocks: the model's block map.
        scope: whose weights count: mlp, down, attention or block.
        estimator: what a score is made of; the paper's inner product by default.
        shared: how many tokens all prompts begin with, for estimators that leave them out.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        scope: str = "mlp",
        estimator: Estimator = ESTIMATORS["lga"],
        shared: int = 1,
    ) -> None:
        self.projections = [block.projections(scope) for block in blocks]
        self.estimator = estimator
        self.shared = shared
        self._handles: list[RemovableHandle] = []
        self._products: list[Tensor | None] = []
        self._rows = 0
        self._kept_RK: Tensor | None = None
        self._captured: CapturedInput | None = None
        self._captured_of: Tensor | None = None
        self._seen: set[str] = set()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the `with`, passes are watched, also without a Trainer."""
        self._attach()
        try:
            yield
        finally:
            self._detach()

    def on_predict_start(self, *_: Any) -> None:
        self._attach()

    def _attach(self) -> None:
        for layer, projections in enumerate(self.projections):
            for name, module in projections.items():
                self._handles.append(module.register_forward_hook(self._hook(layer, name)))

    def begin(self, batch: TargetBatch) -> None:
        """A batch is about to run."""
        self._products = [None] * len(self.projections)
        self._rows = len(batch.input_ids_BT)
        self._kept_RK = self.estimator.positions(batch, self.shared) if self.estimator.positions else None
        self._seen.clear()

    def take(self) -> Tensor:
        """The scores of the batch that has just been differentiated, (P, L)."""
        missing = [layer for layer, products in enumerate(self._products) if products is None]
        assert not missing, f"no gradient reached blocks {missing}"
        self._captured = self._captured_of = None
        return self.estimator.combine(torch.stack([p for p in self._products if p is not None], dim=2))

    def on_predict_end(self, *_: Any) -> None:
        self._detach()

    def on_exception(self, *_: Any) -> None:
        self._detach()

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _kept(self, vectors: Tensor) -> Tensor:
        """What entered or left a projection, row by row, at the positions that count."""
        vectors_RTD = by_row(vectors.detach(), self._rows)
        if self._kept_RK is None:
            return vectors_RTD
        return vectors_RTD.take_along_dim(self._kept_RK[..., None], dim=1)

    def _hook(self, layer: int, name: str) -> Any:
        def forward(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad or runs_again():
                return
            if name in self._seen:
                raise UserError(f"model: {name} runs twice in one pass; attribution expects once")
            self._seen.add(name)
            if self._captured is None or self._captured_of is not args[0]:
                self._captured = CapturedInput(self._kept(args[0]), self.estimator.sides)
                self._captured_of = args[0]
            captured = self._captured

            def backward(grad: Tensor) -> None:
                products_QP = captured.products(self._kept(grad), self.estimator.pairs)
                so_far = self._products[layer]
                self._products[layer] = products_QP if so_far is None else so_far + products_QP

            output.register_hook(backward)

        return forward

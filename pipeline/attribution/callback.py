"""The gradient-attribution callback: per-layer scores of layer gradient analysis, as gradients arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from pipeline.attribution.inner_products import CapturedInput
from pipeline.errors import UserError
from pipeline.model import Block
from pipeline.model.blocks import by_row


class LayerScores(Metric):
    """Sums of per-layer scores over requests, equal however the requests are spread over devices."""

    full_state_update = False

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.total: Tensor
        self.count: Tensor
        self.add_state("total", torch.zeros(layers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores_PL: Tensor) -> None:
        """Count P requests' scores of L layers."""
        self.total += scores_PL.double().sum(0)
        self.count += len(scores_PL)

    def compute(self) -> Tensor:
        """Mean score a layer, shape (L,)."""
        return self.total / self.count


class GradientAttribution(Callback):
    """Accumulates φ_il = ⟨∇ℓ(x_i, y_i^old), ∇ℓ(x_i, y_i^new)⟩ over the weights of each layer (arXiv 2602.20207).

    Works on a module whose `predict_step` runs 2P rows, the old answers' first, and differentiates the sum
    of the rows' losses. Forward hooks keep what enters each projection; hooks on its output turn the
    gradient into inner products the moment it arrives, so no gradient of a weight's size ever exists.

    Args:
        blocks: the model's block map.
        scope: whose weights count: mlp, down, attention or block.

    Attributes:
        mean_scores: after `predict`, one score a layer, the mean over all devices' requests.
        requests: how many requests that were.
    """

    def __init__(self, blocks: Sequence[Block], scope: str = "mlp") -> None:
        self.projections = [block.projections(scope) for block in blocks]
        self.scores = LayerScores(len(blocks))
        self.mean_scores: list[float] = []
        self.requests = 0
        self._handles: list[RemovableHandle] = []
        self._batch: list[Tensor | None] = []
        self._rows = 0
        self._shared: CapturedInput | None = None
        self._shared_source: Tensor | None = None
        self._seen: set[str] = set()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.scores.reset()
        self.scores.to(pl_module.device)
        for layer, projections in enumerate(self.projections):
            for name, module in projections.items():
                self._handles.append(module.register_forward_hook(self._hook(layer, name)))

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self._batch = [None] * len(self.projections)
        self._rows = len(batch.input_ids_BT)
        self._seen.clear()

    def on_predict_batch_end(self, *_: Any) -> None:
        missing = [layer for layer, scores in enumerate(self._batch) if scores is None]
        assert not missing, f"no gradient reached blocks {missing}"
        self.scores.update(torch.stack([s for s in self._batch if s is not None], dim=1))
        self._shared = self._shared_source = None

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mean_scores = self.scores.compute().tolist()
        self.requests = int(trainer.strategy.reduce(self.scores.count.clone(), reduce_op="sum"))
        self._detach()

    def on_exception(self, *_: Any) -> None:
        self._detach()

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, layer: int, name: str) -> Any:
        def forward(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            if name in self._seen:
                raise UserError(f"model: {name} runs twice in one pass; attribution expects once")
            self._seen.add(name)
            if self._shared is None or self._shared_source is not args[0]:
                self._shared, self._shared_source = CapturedInput(by_row(args[0].detach(), self._rows)), args[0]
            captured = self._shared

            def backward(grad: Tensor) -> None:
                products = captured.products(by_row(grad.detach(), self._rows)).detach()
                so_far = self._batch[layer]
                self._batch[layer] = products if so_far is None else so_far + products

            output.register_hook(backward)

        return forward

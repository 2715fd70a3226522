"""The gradient-attribution callback: each request's score of every block, as gradients arrive."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DistributedSampler
from transformers import PreTrainedModel

from pipeline.attribution.inner_products import LGA, CapturedInput, Estimator
from pipeline.errors import UserError
from pipeline.model.activations import runs_again
from pipeline.model.blocks import Block, by_row
from pipeline.running.processes import of_all


class GradientAttribution(Callback):
    """Finds φ_il = ⟨∇ℓ(x_i, y_i^old), ∇ℓ(x_i, y_i^new)⟩ over the weights of each layer (arXiv 2602.20207).

    Watches any module whose step runs P requests' rows, side by side (the old answers' first, then the new ones'),
    and differentiates the sum of the rows' losses: by itself, or by returning that sum, or as `training_step` does.
    Forward hooks keep what enters each projection; hooks on its output turn the gradient into inner products the
    moment it arrives, so no gradient of a weight's size is needed.

    Args:
        blocks: the model's block map, of `find_blocks`.
        scope: whose weights count, as `Block.projections` has it.
        estimator: what a score is made of; the paper's inner product by default.

    Attributes:
        scores: after a run, every request's score of every block, (requests, blocks), in the order of the loader;
            of several processes whose loader was spread over them, all of them.

    UserError when no gradient reached the blocks, with what is wrong.

    Example:
        >>> watch = GradientAttribution(find_blocks(model))
        >>> trainer = Trainer(inference_mode=False, callbacks=[watch])
        >>> outputs = trainer.predict(my_module, my_batches)
        >>> watch.scores.shape == (len(requests), len(find_blocks(model)))
        True
    """

    def __init__(self, blocks: Sequence[Block], scope: str = "mlp", estimator: Estimator = LGA) -> None:
        self.blocks = list(blocks)
        self.projections = [block.scopes.get(scope, {}) for block in blocks]
        if not any(self.projections):
            blocks[0].projections(scope)  # says why
        self.awaited = sum(map(bool, self.projections))  # blocks: one without such weights scores nought
        self.scope, self.estimator = scope, estimator
        self.scores: NDArray[np.float64] = np.empty((0, len(self.blocks)))
        self.last_scores = torch.empty(0, len(self.blocks))  # of the pass that was differentiated last, (P, L)
        self.positions_RK: Tensor | None = None  # of each row of the next pass, those that count; None: all
        self.model: nn.Module | None = None  # the language model that was watched
        self._open = ExitStack()  # of hooks
        self._found: list[NDArray[np.float64]] = []  # batch by batch
        self._pass = Pass(0, self.awaited)
        self._passes: list[Tensor] = []  # scores of a batch's passes; mostly it is one
        self._before = True  # whether gradients were on before the batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        models = (module for module in pl_module.modules() if isinstance(module, PreTrainedModel))
        self.model = next(models, pl_module)

    def _start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if watches(trainer):
            self._found = []
            self.attached()

    def _batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if not watches(trainer):
            return
        self._pass, self._passes = Pass(0, self.awaited), []
        self._before = torch.is_grad_enabled()
        torch.set_grad_enabled(True)  # validation and prediction switch gradients off

    def _batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any) -> None:
        if not watches(trainer):
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not self._pass.is_done and isinstance(loss, Tensor) and loss.requires_grad:
            loss.sum().backward()  # the step leaves that to whoever runs it
        torch.set_grad_enabled(self._before)
        self._pass.check()
        self._found.append(torch.cat(self._passes).double().numpy())

    def _end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if watches(trainer):
            self._open.close()
            found = self._found or [np.empty((0, len(self.blocks)))]
            kind = trainer.state.stage.dataloader_prefix if trainer.state.stage else None
            loaders = "train_dataloader" if kind == "train" else f"{kind}_dataloaders"
            self.scores = in_order(found, getattr(trainer, loaders))

    def on_exception(self, *_: Any) -> None:
        self._open.close()

    on_train_start = on_validation_start = on_test_start = on_predict_start = _start
    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _batch_start
    on_train_batch_end = on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _batch_end
    on_train_end = on_validation_end = on_test_end = on_predict_end = _end

    def attached(self) -> AbstractContextManager[Any]:
        """Inside the `with`, passes are watched without a Trainer; `last_scores` has what comes of each."""
        self._open.callback(lambda: self._pass.let_go())  # that at work by then
        self._open.enter_context(self.blocks[0].module.register_forward_pre_hook(self._begin, with_kwargs=True))
        for layer, projections in enumerate(self.projections):
            for name, module in projections.items():
                self._open.enter_context(module.register_forward_hook(self._hook(layer, name)))
        return self._open

    def _begin(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        """A pass begins where the first block does."""
        if runs_again():
            return
        hidden_RTD = args[0] if args else kwargs["hidden_states"]
        streams_first = hasattr(self.blocks[0].module, "altup")  # Gemma 3n's, each of which has all rows
        rows = hidden_RTD.shape[1 if streams_first else 0]
        if rows % self.estimator.sides:
            raise UserError(
                f"attribution: a batch of {rows} rows; expected the old answers' rows and then as many "
                "of the new ones'"
            )
        self._pass = Pass(rows, self.awaited)

    def _kept(self, vectors: Tensor) -> Tensor:
        """What entered or left a projection, row by row, at the positions that count."""
        vectors_RTD = by_row(vectors.detach(), self._pass.rows)
        if self.positions_RK is None:
            return vectors_RTD
        return vectors_RTD.take_along_dim(self.positions_RK[..., None], dim=1)

    def _hook(self, layer: int, name: str) -> Any:
        def forward(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if runs_again():
                return
            seen = self._pass
            if name in seen.names:
                raise UserError(f"model: {name} runs twice in one pass; attribution expects once")
            seen.note(name, output)
            if not output.requires_grad:
                return
            if seen.captured is None or seen.captured_of is not args[0]:
                seen.captured, seen.captured_of = CapturedInput(self._kept(args[0]), self.estimator.sides), args[0]
            captured = seen.captured

            def backward(grad: Tensor) -> None:
                products_QP = captured.products(self._kept(grad), self.estimator.pairs)
                seen.products[layer] = seen.products.get(layer, 0) + products_QP
                seen.awaited -= 1
                if seen.is_done:
                    nought_QP = torch.zeros_like(products_QP)
                    found = [seen.products.get(layer, nought_QP) for layer in range(len(self.blocks))]
                    products_QPL = torch.stack(found, dim=2)
                    self.last_scores = self.estimator.combine(products_QPL).cpu()
                    self._passes.append(self.last_scores)
                    seen.let_go()

            output.register_hook(backward)

        return forward


class Pass:
    """What is known of one pass of so many rows: inner products by layer, of so many layers, or why none came."""

    def __init__(self, rows: int, layers: int) -> None:
        self.rows, self.layers = rows, layers
        self.products: dict[int, Tensor] = {}
        self.names: set[str] = set()
        self.awaited = 0  # gradients
        self.captured: CapturedInput | None = None
        self.captured_of: Tensor | None = None
        self._why = "its step does not run the model that the blocks are of"

    def note(self, name: str, output: Tensor) -> None:
        """A projection ran."""
        self.names.add(name)
        if output.requires_grad:
            self.awaited += 1
            self._why = "no backward pass followed: differentiate the sum of the rows' losses, or return it"
        elif torch.is_inference_mode_enabled():
            self._why = "it runs in inference mode: give Trainer(inference_mode=False)"
        elif not torch.is_grad_enabled():
            self._why = "it runs without gradients: run the model under torch.enable_grad()"
        elif not self.awaited:
            self._why = "every weight is frozen, so there is no graph: let the input embeddings require a gradient"

    def let_go(self) -> None:
        """Forget what entered: its graph holds the hooks, and they this pass; no collector finds such a ring."""
        self.captured = self.captured_of = None

    @property
    def is_done(self) -> bool:
        """Whether gradients of all that ran have come, in every layer."""
        return self.awaited == 0 and len(self.products) == self.layers

    def check(self) -> None:
        """Raise UserError, with what is wrong, unless it is done."""
        if not self.is_done:
            missing = self.layers - len(self.products)
            raise UserError(f"attribution: no gradient reached {missing} blocks: {self._why}")


def watches(trainer: Trainer) -> bool:
    """Whether a run is watched: all are but the validation within a training."""
    return trainer.training or trainer.state.fn != TrainerFn.FITTING


def in_order(found: list[NDArray[np.float64]], loader: Any) -> NDArray[np.float64]:
    """Batches' scores in the loader's order, (N, L); where it was spread over processes, those of all."""
    loader = loader[0] if isinstance(loader, list) and len(loader) == 1 else loader
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return np.concatenate(found)
    size = len(sampler.dataset)  # type: ignore[arg-type]
    parts: list[Any] = of_all(found)
    if sum(len(scores) for part in parts for scores in part) >= size > sum(map(len, parts)):
        parts = [[row[None] for scores in part for row in scores] for part in parts]  # an item is a request
    longest = max(map(len, parts))
    taken = [part[turn] for turn in range(longest) for part in parts if turn < len(part)]
    return np.concatenate(taken[:size])

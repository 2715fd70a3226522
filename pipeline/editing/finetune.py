"""Fine-tuning of the golden layer: mini-batches over epochs, loss on the new answers' tokens only.

Breadth-first mini-batches at one well-chosen layer are what makes plain fine-tuning a strong editor
(arXiv 2509.22072). Blocks below the layer run once, before it; see `pipeline.editing.lessons`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.editing.checkpoints import KeepTraining, last_checkpoint
from pipeline.editing.lessons import read_rows
from pipeline.editing.method import Runtime
from pipeline.editing.statistics import key_moments
from pipeline.editing.training import Training
from pipeline.editing.whitening import WhitenedAdam, whitener
from pipeline.model import LLM, build_trainer
from pipeline.model.checkpointing import checkpointing
from pipeline.running.processes import from_first
from pipeline.running.sharding import whole
from pipeline.options import EditOptions, FinetuneOptions, TrainerOptions, TrainingOptions
from pipeline.requests import EditRequest, ListDataModule


class FineTune(Training):
    """Trains the MLP weights (or the down-projection) of the golden layers under `Trainer.fit`.

    Steps and their loss are those of `Training`.

    Args:
        llm: the model, frozen by the caller.
        layers: the blocks to train.
        options: `options.finetune` is what counts here.
        earlier: nothing is needed of it: what was learnt before is in the weights.

    Attributes:
        weight_names: the weights it changes, by full name.
        state: empty.
    """

    name = "finetune"
    needs_subject = False
    adapter: dict[str, Any] | None = None

    def __init__(
        self, llm: LLM, layers: Sequence[int], options: EditOptions, earlier: Mapping[str, Tensor] | None = None
    ) -> None:
        own: TrainingOptions = getattr(options, self.name)
        super().__init__(llm, layers, own)
        self.statistics = options.statistics
        self.state: dict[str, Tensor] = {}
        self.weight_names = [name for layer in layers for name in llm.blocks[layer].weight_names(own.scope)]

    def run(self, requests: Sequence[EditRequest], runtime: Runtime) -> None:
        """Train until every request is learnt or the options' epochs are over."""
        self.prepare(requests, runtime.trainer)
        for name in self.weight_names:
            self.model.get_parameter(name).requires_grad_(True)
        self.fit(runtime)

    def prepare(self, requests: Sequence[EditRequest], trainer: TrainerOptions) -> None:
        """Find and read what training leaves as it is."""
        self.find_whiteners(trainer)
        ((self.taught, self.others),) = read_rows(self.llm, min(self.layers), [requests], self.options, trainer)

    def find_whiteners(self, trainer: TrainerOptions) -> None:
        """Of every trained projection, where the options want any."""
        names = [name.removesuffix(".weight") for name in self.weight_names] if self.options.whiten else []
        self.whiteners = {
            name: whitener(moment, self.options.whiten)
            for name, moment in key_moments(self.llm, names, self.statistics, trainer).items()
        }

    def fit(self, runtime: Runtime) -> None:
        """Train what requires a gradient; with a work folder, on from the last epoch that it holds."""
        self.start = {name: weight.detach().clone() for name, weight in self.trained()} if self.bound else {}
        learnt = EarlyStopping(
            "edit/unlearnt",
            stopping_threshold=0.5 / len(self.taught),  # the share that half a row is: none is left
            patience=self.options.epochs,
            check_on_train_epoch_end=True,
        )
        callbacks: list[Callback] = [learnt, *([KeepTraining(runtime.work)] if runtime.work else [])]
        self.micro_batch = runtime.trainer.micro_batch or self.options.batch_size
        self.data = ListDataModule(
            (range(len(self.taught)), self.share, self.options.batch_size), seed=runtime.seed
        )
        trainer = build_trainer(
            runtime.trainer,
            "Editing",
            runtime.logger,
            callbacks,
            max_epochs=self.options.epochs,
            log_every_n_steps=1,
            enable_checkpointing=runtime.work is not None,
            reload_dataloaders_every_n_epochs=1,  # so that an epoch's order hangs on its number alone
        )
        with checkpointing(self.llm, runtime.trainer.activation_checkpointing):
            trainer.fit(
                self,
                datamodule=self.data,
                ckpt_path=from_first(last_checkpoint(runtime.work) if runtime.work else None),
                weights_only=True,
            )

    def on_train_epoch_end(self) -> None:
        """A step of the learning rate."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, torch.optim.lr_scheduler.LinearLR)
        scheduler.step()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam, its step in units of a weight's own root mean square, so that one rate serves every family.

        Over the epochs it goes evenly to `last_step` times that: small late steps take little from earlier ones.
        """
        trained = self.trained()
        found = {weight: self.whitening(name) for name, weight in trained}
        adam = WhitenedAdam(
            [{"params": [weight], "lr": self.step_of(weight)} for _, weight in trained],
            {weight: whitening for weight, whitening in found.items() if whitening},
        )
        falling = torch.optim.lr_scheduler.LinearLR(
            adam, 1.0, self.options.last_step, total_iters=self.options.epochs
        )
        return {"optimizer": adam, "lr_scheduler": falling}

    def whitening(self, name: str) -> tuple[Tensor, int] | None:
        """A trained weight's whitener, and the weight's dimension that it acts on."""
        projection = name.removeprefix("model.").removesuffix(".weight")
        if projection not in self.whiteners:
            return None
        conv = isinstance(self.model.get_submodule(projection), Conv1D)
        return self.whiteners[projection].to(self.device), 0 if conv else 1

    def step_of(self, weight: nn.Parameter) -> float:
        """Adam's step size for a weight."""
        assert isinstance(self.options, FinetuneOptions)
        return self.options.learning_rate * whole(weight).float().square().mean().sqrt().item()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained alone, how far the epoch is, its means so far, and whether all is learnt."""
        trained = dict(self.trained())
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        batches = self.trainer.fit_loop.epoch_loop.batch_progress
        checkpoint["begun"] = self.current_epoch, batches.current.ready
        checkpoint["over"] = self.trainer.should_stop
        if not batches.is_last_batch:
            checkpoint["followed"] = {name: mean.metric_state for name, mean in self.followed.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        self.data.begun = checkpoint["begun"]
        self.trainer.should_stop = checkpoint["over"]
        for name, state in checkpoint.get("followed", {}).items():
            mean = self.followed[name]
            for part, value in state.items():
                setattr(mean, part, value.to(self.device))

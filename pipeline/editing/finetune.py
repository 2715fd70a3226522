"""Fine-tuning of the golden layer: mini-batches over epochs, loss on the new answers' tokens only.

Breadth-first mini-batches at one well-chosen layer are what makes plain fine-tuning a strong editor
(arXiv 2509.22072). Blocks below the layer run once, before it; see `pipeline.editing.lessons`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pipeline.editing.lessons import Lesson, Row, collate, read_rows
from pipeline.editing.method import Runtime
from pipeline.editing.statistics import key_moments
from pipeline.editing.whitening import WhitenedAdam, whitener
from pipeline.errors import UserError
from pipeline.model import LLM, build_trainer, target_logits
from pipeline.model.checkpointing import checkpointing
from pipeline.model.sharding import whole
from pipeline.model.upper import handing_on
from pipeline.options import EditOptions, FinetuneOptions, TrainerOptions, TrainingOptions
from pipeline.requests import EditRequest, ListDataModule

CHECKPOINT = "epoch"


class FineTune(LightningModule):
    """Trains the MLP weights (or the down-projection) of the golden layers under `Trainer.fit`.

    Loss of a batch: mean over its requests (bare, and every second epoch under a context) of ℓ(x, y_new),
    one that is learnt counting nothing, plus `kl` · KL(base ‖ edited) after prompts about something else.

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
        super().__init__()
        self.strict_loading = False  # a checkpoint holds what is trained
        self.llm = llm
        self.model = llm.model
        self.layers = list(layers)
        self.options: TrainingOptions = getattr(options, self.name)
        self.statistics = options.statistics
        self.bound: float = getattr(self.options, "bound", 0.0)
        self.state: dict[str, Tensor] = {}
        self.weight_names = [
            name for layer in layers for name in llm.blocks[layer].weight_names(self.options.scope)
        ]

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
        self.start = {name: weight.detach().clone() for name, weight in self._trained()} if self.bound else {}
        learnt = EarlyStopping(
            "edit/unlearnt",
            stopping_threshold=0.5 / len(self.taught),  # the share that half a row is: none is left
            patience=self.options.epochs,
            check_on_train_epoch_end=True,
        )
        callbacks: list[Callback] = [learnt]
        if runtime.work:
            callbacks.append(ModelCheckpoint(runtime.work, CHECKPOINT, enable_version_counter=False))
        checkpoint = runtime.work / f"{CHECKPOINT}.ckpt" if runtime.work else None
        data = ListDataModule((range(len(self.taught)), self._share, self.options.batch_size), seed=runtime.seed)
        trainer = build_trainer(
            runtime.trainer,
            "Editing",
            runtime.logger,
            callbacks,
            max_epochs=self.options.epochs,
            log_every_n_steps=1,
            enable_checkpointing=checkpoint is not None,
            reload_dataloaders_every_n_epochs=1,  # so that an epoch's order hangs on its number alone
        )
        with checkpointing(self.llm, runtime.trainer.activation_checkpointing):
            trainer.fit(
                self,
                datamodule=data,
                ckpt_path=checkpoint if checkpoint and checkpoint.is_file() else None,
                weights_only=True,
            )

    def _share(self, picked: Sequence[int]) -> Lesson:
        """This device's part of a batch over all devices: requests bare or, every second epoch, under a context.

        A device for which no row is left takes one along that counts nothing: all must take part in a step.
        """
        epoch, rank, devices = self.current_epoch, self.trainer.global_rank, self.trainer.world_size
        rows = [variant(self.taught[number], epoch, number) for number in picked]
        turn = epoch * len(self.taught)  # so that every epoch brings other names
        others = [self.others[(number + turn) % len(self.others)] for number in picked[::2] if self.others]
        idle = replace(rows[0], target=replace(rows[0].target, tag=None))
        own = rows[rank::devices] or [idle]
        return collate(own, others[rank::devices], len(rows), len(others), self.llm.pad_token_id)

    def training_step(self, lesson: Lesson) -> Tensor:
        """This device's part of the loss, such that DDP's mean over devices is the mean over all rows."""
        batch, devices = lesson.batch, self.trainer.world_size
        lower = (
            nullcontext() if lesson.enter_BTD is None else handing_on(self.llm, self.layers[0], lesson.enter_BTD)
        )
        with lower:
            logits_NV = target_logits(self.model, batch)
        losses_B = batch.row_means(F.cross_entropy(logits_NV, batch.target_N, reduction="none"))
        counts_B = losses_B.new_tensor([tag is not None for tag in batch.tags])
        self._check(losses_B[counts_B > 0], lesson)
        unlearnt_B = counts_B * (losses_B.detach() > self.options.learnt)
        loss = (losses_B * unlearnt_B).sum() * devices / lesson.rows
        if lesson.base_KV is not None:
            now_KV = logits_NV[-len(lesson.base_KV) :].log_softmax(-1)
            divergence = F.kl_div(now_KV, lesson.base_KV, log_target=True, reduction="sum")
            loss = loss + self.options.kl * divergence * devices / lesson.others
        hits_B = batch.row_means((logits_NV.argmax(-1) == batch.target_N).to(losses_B))
        share = devices / lesson.rows
        self.log("loss", (losses_B.detach() @ counts_B) * share, prog_bar=True, logger=False, batch_size=1)
        self._follow("edit/loss", (losses_B.detach() @ counts_B) * share, lesson.rows)
        self._follow("edit/accuracy", (hits_B @ counts_B) * share, lesson.rows)
        self._follow("edit/unlearnt", unlearnt_B.sum() * share, lesson.rows)
        return loss

    def _check(self, losses: Tensor, lesson: Lesson) -> None:
        if not losses.isfinite().all():
            ids = dict.fromkeys(tag for tag in lesson.batch.tags if tag is not None)
            raise UserError(
                f"edit: the loss is not a number in step {self.global_step}, in the batch of requests "
                f"{', '.join(ids)}; try a smaller --{self.name}.learning_rate"
            )

    def _follow(self, name: str, value: Tensor, rows: int) -> None:
        """A figure's mean over an epoch's rows, on all devices."""
        self.log(name, value, on_step=name == "edit/loss", on_epoch=True, batch_size=rows, sync_dist=True)

    def on_train_batch_end(self, *_: Any) -> None:
        """Keep every entry of a weight within `bound` of where it started (FT-L's norm constraint)."""
        with torch.no_grad():
            for name, weight in self._trained() if self.start else ():
                start = self.start[name]
                most = self.bound * whole(start).float().square().mean().sqrt().item()
                weight.copy_(torch.clamp(weight, start - most, start + most))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam, its step in units of a weight's own root mean square, so that one rate serves every family.

        Over the epochs it goes evenly to `last_step` times that: small late steps take little from earlier ones.
        """
        trained = self._trained()
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

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.named_parameters() if weight.requires_grad]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained alone."""
        trained = dict(self._trained())
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


def variant(rows: Sequence[Row], epoch: int, number: int) -> Row:
    """The bare prompt in even epochs, contexts in turn in odd ones: rows of a batch are of like length."""
    return rows[0] if epoch % 2 == 0 or len(rows) == 1 else rows[1 + (epoch // 2 + number) % (len(rows) - 1)]

"""Fine-tuning of the golden layer: mini-batches over epochs, loss on the new answers' tokens only.

Breadth-first mini-batches at one well-chosen layer are what makes plain fine-tuning a strong editor
(arXiv 2509.22072). Blocks below the layer run once, before it; see `pipeline.editing.lessons`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from transformers.pytorch_utils import Conv1D

from pipeline.editing.checkpoints import KeepTraining, last_checkpoint
from pipeline.editing.lessons import Lesson, Row, collate, read_rows
from pipeline.editing.method import Runtime
from pipeline.editing.statistics import key_moments
from pipeline.editing.whitening import WhitenedAdam, whitener
from pipeline.errors import UserError
from pipeline.model import LLM, build_trainer, target_logits
from pipeline.model.checkpointing import checkpointing
from pipeline.model.memory import INSTEAD, attempt
from pipeline.model.processes import from_first
from pipeline.model.sharding import whole
from pipeline.model.upper import handing_on
from pipeline.options import EditOptions, FinetuneOptions, TrainerOptions, TrainingOptions
from pipeline.requests import EditRequest, ListDataModule

FOLLOWED = ("loss", "accuracy", "unlearnt")
Share = tuple[list[int], list[Lesson]]  # a batch's requests by number, and a device's part in micro-batches


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
        self.automatic_optimization = False  # a batch's gradient is summed up over micro-batches
        self.followed = nn.ModuleDict({name: MeanMetric(nan_strategy="ignore") for name in FOLLOWED})
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
        callbacks: list[Callback] = [learnt, *([KeepTraining(runtime.work)] if runtime.work else [])]
        self.micro_batch = runtime.trainer.micro_batch or self.options.batch_size
        self.data = ListDataModule(
            (range(len(self.taught)), self._share, self.options.batch_size), seed=runtime.seed
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

    def _share(self, picked: Sequence[int]) -> Share:
        """This device's part of a batch over all devices: requests bare or, every second epoch, under a context.

        All devices must take part in a step, in as many micro-batches: one for which no row is left takes one along
        that counts nothing.
        """
        epoch, rank, devices = self.current_epoch, self.trainer.global_rank, self.trainer.world_size
        rows = [variant(self.taught[number], epoch, number) for number in picked]
        turn = epoch * len(self.taught)  # so that every epoch brings other names
        others = [self.others[(number + turn) % len(self.others)] for number in picked[::2] if self.others]
        idle = replace(rows[0], target=replace(rows[0].target, tag=None))
        parts = -(-len(rows) // (devices * self.micro_batch))
        lessons = [
            collate(
                rows[rank::devices][part::parts] or [idle],
                others[rank::devices][part::parts],
                len(rows),
                len(others),
                self.llm.pad_token_id,
            )
            for part in range(parts)
        ]
        return list(picked), lessons

    def training_step(self, share: Share) -> None:
        """One optimiser step on a batch, in smaller micro-batches from now on where the memory does not suffice."""
        picked, lessons = share
        while True:
            optimizer = self.optimizers()
            assert isinstance(optimizer, LightningOptimizer)
            optimizer.zero_grad()
            suffices, found = attempt(partial(self._differentiate, lessons))
            if suffices:
                break
            lessons = self._smaller(picked, lessons, found)
        optimizer.step()
        self._bind()
        self._follow(found, lessons[0].rows)

    def _smaller(self, picked: Sequence[int], lessons: Sequence[Lesson], failed: str) -> list[Lesson]:
        """The same batch in micro-batches of half the size."""
        largest = max(sum(tag is not None for tag in lesson.batch.tags) for lesson in lessons)
        if self.trainer.world_size > 1:
            raise UserError(
                f"trainer: {failed}; devices that train together cannot repeat a step alone; give "
                f"--trainer.micro_batch {max(1, largest // 2)}"
            )
        if largest == 1:
            raise UserError(f"trainer: {failed}; {INSTEAD}")
        self.micro_batch = -(-largest // 2)
        smaller: list[Lesson] = move_data_to_device(self._share(picked)[1], self.device)
        return smaller

    def _differentiate(self, lessons: Sequence[Lesson]) -> Tensor:
        """Add up the gradients of a device's micro-batches; loss, accuracy and unlearnt share of the batch."""
        parts = []
        for number, lesson in enumerate(lessons):
            with self._unsynced() if number < len(lessons) - 1 else nullcontext():
                loss, figures = self.losses(lesson)
                self.manual_backward(loss)
            parts.append(figures)
        return torch.stack(parts).sum(0)

    def _unsynced(self) -> AbstractContextManager[None]:
        """Inside the `with`, devices do not average gradients: to do so behind the last micro-batch is enough."""
        blocked: Callable[[], AbstractContextManager[None]]
        blocked = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        return blocked()

    def losses(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """A micro-batch's part of the loss, such that DDP's mean over devices is the mean over all rows.

        And its part of what is followed.
        """
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
        figures = torch.stack([losses_B.detach() @ counts_B, hits_B @ counts_B, unlearnt_B.sum()])
        return loss, figures * devices / lesson.rows

    def _check(self, losses: Tensor, lesson: Lesson) -> None:
        if not losses.isfinite().all():
            ids = dict.fromkeys(tag for tag in lesson.batch.tags if tag is not None)
            raise UserError(
                f"edit: the loss is not a number in step {self.global_step}, in the batch of requests "
                f"{', '.join(ids)}; try a smaller --{self.name}.learning_rate"
            )

    def _follow(self, figures: Tensor, rows: int) -> None:
        """Show a batch's figures, and their means over an epoch's rows, on all devices."""
        loss = figures[0]
        self.log("loss", loss, prog_bar=True, logger=False, batch_size=1)
        self.log("edit/loss_step", loss, on_step=True, batch_size=rows, sync_dist=True)
        for (name, mean), figure in zip(self.followed.items(), figures, strict=True):
            assert isinstance(mean, MeanMetric)
            mean.update(figure, rows)
            self.log("edit/loss_epoch" if name == "loss" else f"edit/{name}", mean, on_step=False, on_epoch=True)

    @torch.no_grad()
    def _bind(self) -> None:
        """Keep every entry of a weight within `bound` of where it started (FT-L's norm constraint)."""
        for name, weight in self._trained() if self.start else ():
            start = self.start[name]
            most = self.bound * whole(start).float().square().mean().sqrt().item()
            weight.copy_(torch.clamp(weight, start - most, start + most))

    def on_train_epoch_end(self) -> None:
        """A step of the learning rate."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, torch.optim.lr_scheduler.LinearLR)
        scheduler.step()

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
        """Keep what is trained alone, how far the epoch is, its means so far, and whether all is learnt."""
        trained = dict(self._trained())
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


def variant(rows: Sequence[Row], epoch: int, number: int) -> Row:
    """The bare prompt in even epochs, contexts in turn in odd ones: rows of a batch are of like length."""
    return rows[0] if epoch % 2 == 0 or len(rows) == 1 else rows[1 + (epoch // 2 + number) % (len(rows) - 1)]

"""Training steps: a batch of requests, whatever the devices and micro-batches that it is run in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torchmetrics import MeanMetric

from pipeline.editing.lessons import Lesson, Row, collate
from pipeline.errors import UserError
from pipeline.model import LLM, target_logits
from pipeline.model.memory import INSTEAD, attempt
from pipeline.running.sharding import whole
from pipeline.options import TrainingOptions

FOLLOWED = ("loss", "accuracy", "unlearnt")
Share = tuple[list[int], list[Lesson]]  # a batch's requests by number, and a device's part in micro-batches


class Training(LightningModule):
    """Runs an optimiser's steps on batches of requests; whoever derives from it says what is trained, and how.

    Loss of a batch: mean over its requests (bare, and every second epoch under a context) of ℓ(x, y_new),
    one that is learnt counting nothing, plus `kl` · KL(base ‖ edited) after prompts about something else.

    Args:
        llm: the model; what is trained requires a gradient, nothing else does.
        layers: the blocks to train.
        options: of the training.

    Attributes:
        name: what its options are called, for messages.
        taught: by request, its rows: bare, then under each context.
        others: prompts about something else.
        micro_batch: the most requests that a device runs at once.
        bound: how far an entry of a weight may go, in root mean squares of the weight; 0: as far as it likes.
        start: where what is trained started; empty without a bound.
        followed: means over an epoch of what is followed.
    """

    name: str
    taught: Sequence[Sequence[Row]]
    others: Sequence[Row]
    micro_batch: int
    start: dict[str, Tensor]

    def __init__(self, llm: LLM, layers: Sequence[int], options: TrainingOptions) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds what is trained
        self.automatic_optimization = False  # a batch's gradient is summed up over micro-batches
        self.followed = nn.ModuleDict({name: MeanMetric(nan_strategy="ignore") for name in FOLLOWED})
        self.llm = llm
        self.model = llm.model
        self.layers = list(layers)
        self.options = options
        self.bound: float = getattr(options, "bound", 0.0)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """What requires a gradient, by its name in this module."""
        return [(name, weight) for name, weight in self.named_parameters() if weight.requires_grad]

    def share(self, picked: Sequence[int]) -> Share:
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
                f"--expert.batch_size {self.trainer.world_size * max(1, largest // 2)}"
            )
        if largest == 1:
            raise UserError(f"trainer: {failed}; {INSTEAD}")
        self.micro_batch = -(-largest // 2)
        smaller: list[Lesson] = move_data_to_device(self.share(picked)[1], self.device)
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
        with lesson.handed_on(self.llm, self.layers[0]):
            logits_NV = target_logits(self.model, batch)
        losses_B = batch.losses(logits_NV)
        counts_B = losses_B.new_tensor([tag is not None for tag in batch.tags])
        self._check(losses_B[counts_B > 0], lesson)
        unlearnt_B = counts_B * (losses_B.detach() > self.options.learnt)
        loss = (losses_B * unlearnt_B).sum() * devices / lesson.rows
        if lesson.base_KV is not None:
            loss = loss + self.options.kl * lesson.divergence(logits_NV) * devices / lesson.others
        hits_B = batch.row_means((logits_NV.argmax(-1) == batch.target_N).to(losses_B))
        figures = torch.stack([losses_B.detach() @ counts_B, hits_B @ counts_B, unlearnt_B.sum()])
        return loss, figures * devices / lesson.rows

    def _check(self, losses: Tensor, lesson: Lesson) -> None:
        if not losses.isfinite().all():
            ids = dict.fromkeys(tag for tag in lesson.batch.tags if tag is not None)
            raise UserError(
                f"edit: the loss is not a number in step {self.global_step}, in the batch of requests "
                f"{', '.join(ids)}; try a smaller --expert.learning_rate"
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
        for name, weight in self.trained() if self.start else ():
            start = self.start[name]
            most = self.bound * whole(start).float().square().mean().sqrt().item()
            weight.copy_(torch.clamp(weight, start - most, start + most))


def variant(rows: Sequence[Row], epoch: int, number: int) -> Row:
    """The bare prompt in even epochs, contexts in turn in odd ones: rows of a batch are of like length."""
    return rows[0] if epoch % 2 == 0 or len(rows) == 1 else rows[1 + (epoch // 2 + number) % (len(rows) - 1)]

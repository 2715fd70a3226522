"""Fine-tuning of the golden layer: mini-batches over epochs, loss on the new answers' tokens only.

Breadth-first mini-batches at one well-chosen layer are what makes plain fine-tuning a strong editor
(arXiv 2509.22072). Blocks below the layer run once, before it; see `pipeline.editing.lessons`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.editing.adapter import Adapter
from pipeline.editing.keeping import KeepTraining
from pipeline.editing.lesson_data import LessonData
from pipeline.editing.lessons import Lessons, read_lessons, teaching_loss
from pipeline.editing.method import register, settings_of
from pipeline.editing.statistics import key_moments
from pipeline.editing.whitening import WhitenedAdam, reads_for, whitener
from pipeline.errors import UserError
from pipeline.model.activations import Activations, target_logits
from pipeline.model.checkpointing import checkpointing
from pipeline.model.llm import LLM
from pipeline.options.base import Count, Options, Positive, Weight, above, at_least, at_most, one_of
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.requests.rows import Batch
from pipeline.requests.schema import EditRequest
from pipeline.running.sharding import as_spread, put, whole
from pipeline.running.stage import INSTEAD, Staying, attempt
from pipeline.running.trainer import Runtime, trainer_of


@dataclass(kw_only=True)
class FinetuneSettings(Options):
    """What fine-tuning can be set to."""

    scope: Annotated[str, one_of("mlp", "down")] = "mlp"
    """What is changed: mlp (all projections of the golden layer's MLP) or down (the down-projection)."""
    epochs: Count = 11
    """The most passes over the requests."""
    batch_size: Count = 8
    """Requests in an optimiser step, over all devices."""
    contexts: Annotated[int, at_least(0), at_most(4)] = 4
    """Contexts that a prompt is trained under, in turn, every second epoch; 0: the bare prompt alone."""
    learning_rate: Positive = 0.02
    """Adam's step size, in units of a weight's root mean square (LoRA: as it is)."""
    last_step: Annotated[float, above(0), at_most(1)] = 0.3
    """The last epoch's step size, in units of the first's."""
    learnt: Weight = 0.05
    """A row whose loss (nats) is below this counts no more; when all are, training ends."""
    kl: Weight = 0.3
    """Weight of answering as before after prompts about something else; 0: not asked for."""
    whiten: Weight = 0.01
    """Ridge of whitening by key statistics, relative to their mean: steps spare what ordinary text uses; 0: off."""
    bound: Weight = 0.0
    """Largest change of a trained weight's entry, in units of the weight's root mean square; 0: none."""


class FineTune(Staying):
    """Trains the MLP weights (or the down-projection) of the golden layers, or an adapter beside them.

    For any Trainer, with plain batches of `EditRequests` as well; `edit` gives it batches with unrelated prompts.

    Args:
        llm: the model; what is not trained is frozen when training starts.
        layers: the blocks to train.
        settings: how; default: fine-tuning's.
        adapter: train this one in place of the weights; it must be attached while it is trained.
        statistics: of which text whitening takes its key statistics.

    Attributes:
        weight_names: the weights it changes, by full name.
        state: the adapter's tensors under PEFT's names, with a prefix.
        adapter: LoraConfig's arguments for such an adapter.
        whiteners: of projections, those that steps are whitened by.

    Example:
        >>> trainer = Trainer(max_epochs=3, accumulate_grad_batches=2)
        >>> trainer.fit(FineTune(llm, [1]), EditRequests(requests, llm.tokenizer, batch_size=4))
    """

    def __init__(
        self,
        llm: LLM,
        layers: Sequence[int],
        settings: FinetuneSettings | None = None,
        adapter: Adapter | None = None,
        statistics: StatisticsOptions | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds what is trained
        self.llm, self.model, self.layers = llm, llm.model, list(layers)
        self.activations = Activations(llm)
        self.settings, self.statistics = settings or FinetuneSettings(), statistics or StatisticsOptions()
        self.lora, self.adapter = adapter, adapter.config if adapter else None
        names = [name for layer in layers for name in llm.blocks[layer].weight_names(self.settings.scope)]
        self.weight_names, self.state = names, dict[str, Tensor]()
        self.whiteners: dict[str, Tensor] = {}

    def run(self, requests: Sequence[EditRequest], runtime: Runtime, earlier: Sequence[EditRequest] = ()) -> None:
        """Train until every request is learnt or the settings' epochs are over; an adapter is merged then."""
        self.find_whiteners(runtime)
        (lessons,) = self.lessons([requests], runtime)
        data = LessonData(lessons, self.settings.batch_size, self.llm.pad_token_id, runtime.seed)
        with self.lora.attached(runtime.seed, self.whiteners) if self.lora else nullcontext() as adapted:
            self.fit(data, runtime)
            if self.lora and adapted:
                self.state = self.lora.merged(adapted)

    def find_whiteners(self, runtime: Runtime) -> None:
        """Of every projection that is trained, where the settings want any."""
        names = [name.removesuffix(".weight") for name in self.weight_names] if self.settings.whiten else []
        moments = key_moments(self.llm, names, self.statistics, runtime)
        device, ridge = self.llm.embedding.device, self.settings.whiten
        self.whiteners = {name: whitener(moment.to(device), ridge) for name, moment in moments.items()}

    def lessons(self, groups: Sequence[Sequence[EditRequest]], runtime: Runtime) -> list[Lessons]:
        """What is to be taught to each group of requests, which know nothing of each other."""
        contexts, unrelated = self.settings.contexts, self.settings.kl > 0
        return read_lessons(self.llm, min(self.layers), groups, contexts, unrelated, runtime)

    def fit(self, data: LessonData, runtime: Runtime) -> None:
        """Train; where the memory does not suffice, from the start again in micro-batches of half the size."""
        keeping = KeepTraining(runtime.work) if runtime.work else None
        about = {"logger": runtime.logger, "max_epochs": self.settings.epochs, "log_every_n_steps": 1}
        parts = 0
        while True:
            with (
                trainer_of(
                    runtime, "Editing", [keeping] if keeping else [], enable_checkpointing=bool(keeping), **about
                ) as trainer,
                checkpointing(self.llm, runtime.options.activation_checkpointing),
            ):
                trainer.accumulate_grad_batches = parts = parts or self._parts(trainer, runtime)
                found = keeping.found() if keeping else None
                fit = partial(trainer.fit, self, datamodule=data, ckpt_path=found, weights_only=True)
                suffices, failed = attempt(fit)
            if suffices:
                return
            parts, data.begun = self._smaller(trainer, failed), (0, 0)
            if keeping:
                keeping.file.unlink(missing_ok=True)  # its steps are cut into other parts

    def _parts(self, trainer: Trainer, runtime: Runtime) -> int:
        """In how many micro-batches a device runs its part of a batch."""
        most = runtime.options.micro_batch or self.settings.batch_size
        return max(trainer.accumulate_grad_batches, -(-self.settings.batch_size // (trainer.world_size * most)))

    def _smaller(self, trainer: Trainer, failed: str) -> int:
        """Twice as many micro-batches, for weights that are as they were before."""
        largest = -(-self.settings.batch_size // (trainer.world_size * trainer.accumulate_grad_batches))
        if largest == 1:
            raise UserError(f"trainer: {failed}; {INSTEAD}")
        if trainer.world_size > 1:
            raise UserError(
                f"trainer: {failed}; devices that train together cannot repeat a step alone; give "
                f"--edit.expert.batch_size {largest // 2 * trainer.world_size} or less"
            )
        for name, weight in self.trained().items():
            put(weight, self.start[name])
        return 2 * trainer.accumulate_grad_batches

    def configure_model(self) -> None:
        """Freeze what is not trained, before a strategy wraps it; remember what is trained as it is."""
        self.model.eval()
        for name, weight in self.model.named_parameters():
            weight.requires_grad_("lora_" in name if self.lora else name in self.weight_names)
        self.start = {name: whole(weight).to("cpu", copy=True) for name, weight in self.trained().items()}

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by its name in the model."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam, its step in units of a weight's own root mean square, so that one rate serves every family.

        An adapter's factors have no scale of the model's: for them, it is as it is. Over the epochs the step goes
        evenly to `last_step` times that: small late steps take little from earlier ones.
        """
        rate = self.settings.learning_rate
        adam = WhitenedAdam(
            [
                {"params": [weight], "lr": rate * (1.0 if self.lora else _scale(self.start[name]))}
                for name, weight in self.trained().items()
            ],
            {weight: found for name, weight in self.trained().items() if (found := self._whitening(name))},
        )
        epochs = self.settings.epochs
        falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, self.settings.last_step, total_iters=epochs)
        return {"optimizer": adam, "lr_scheduler": falling}

    def _whitening(self, name: str) -> tuple[Tensor, int] | None:
        """A trained weight's whitener, and the weight's dimension that it acts on."""
        projection = reads_for(name) if self.lora else name.removesuffix(".weight")
        if projection not in self.whiteners:
            return None
        conv = not self.lora and isinstance(self.model.get_submodule(projection), Conv1D)
        return self.whiteners[projection].to(self.device), 0 if conv else 1

    def training_step(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch (see `teaching_loss`), such that its mean over devices and micro-batches of a
        step is that of all rows.

        Raises:
            UserError: for a loss that is not a number.
        """
        with self.activations.from_block(min(self.layers), batch.enter_BTD):
            logits_NV = target_logits(self.model, batch)
        loss, losses_B = teaching_loss(batch, logits_NV, self.settings.learnt, self.settings.kl)
        counts_B = torch.ones_like(losses_B, dtype=torch.bool)
        if batch.weight_B is not None:  # a device without a row of its own runs one that counts nothing
            counts_B = batch.weight_B[: len(losses_B)] > 0
        if not losses_B[counts_B].isfinite().all():
            ids = dict.fromkeys(str(row.tag) for row in batch.texts[: len(losses_B)])
            raise UserError(
                f"edit: the loss is not a number in step {self.global_step}, in the batch of requests "
                f"{', '.join(ids)}; try a smaller --edit.expert.learning_rate"
            )
        hits_B = batch.means((logits_NV.argmax(-1) == batch.target_N).to(losses_B))[: len(losses_B)]
        self._follow(losses_B.detach()[counts_B], hits_B[counts_B])
        return loss

    def _follow(self, losses_B: Tensor, hits_B: Tensor) -> None:
        """Show the figures of a step and their means over an epoch's rows."""
        unlearnt_B = (losses_B > self.settings.learnt).to(losses_B)
        self.unlearnt += unlearnt_B.sum()
        rows = len(losses_B)
        loss, accuracy, unlearnt = (each.sum() / max(1, rows) for each in (losses_B, hits_B, unlearnt_B))
        about: dict[str, Any] = {"on_epoch": True, "batch_size": rows, "sync_dist": True}
        self.log("loss", loss, prog_bar=True, logger=False, batch_size=1)
        self.log("edit/loss", loss, on_step=True, **about)
        self.log_dict({"edit/accuracy": accuracy, "edit/unlearnt": unlearnt}, on_step=False, **about)

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        """Keep every entry of a weight near its start, where there is a bound (FT-L's norm constraint)."""
        for name, weight in self.trained().items() if self.settings.bound else ():
            start, most = as_spread(self.start[name], weight), self.settings.bound * _scale(self.start[name])
            weight.copy_(torch.clamp(weight, start - most, start + most))

    def on_train_epoch_start(self) -> None:
        """Count what is not learnt yet."""
        self.unlearnt = torch.zeros((), device=self.device)

    def on_train_epoch_end(self) -> None:
        """End when nothing is left to learn, or the epochs are over."""
        left = self.trainer.strategy.reduce(self.unlearnt, reduce_op="sum")
        if not left or self.current_epoch + 1 >= self.settings.epochs:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained alone, and whether all is learnt."""
        trained = {f"model.{name}" for name in self.trained()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["unlearnt"], checkpoint["over"] = self.unlearnt.cpu(), self.trainer.should_stop

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        self.unlearnt, self.trainer.should_stop = checkpoint["unlearnt"].to(self.device), checkpoint["over"]


def _scale(weight: Tensor) -> float:
    """The root mean square of a weight's entries."""
    return weight.float().square().mean().sqrt().item()


def make_finetune(
    llm: LLM, layers: Sequence[int], options: EditOptions, earlier: Mapping[str, Tensor] | None = None
) -> FineTune:
    """Fine-tuning as `edit` makes it; what was learnt before is in the weights."""
    return FineTune(llm, layers, settings_of(options), statistics=options.statistics)


register("finetune", make_finetune, FinetuneSettings)

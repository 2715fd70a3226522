"""Fine-tuning of the golden layer: mini-batches over epochs, loss on the new answers' tokens only.

Breadth-first mini-batches at one well-chosen layer are what makes plain fine-tuning a strong editor
(arXiv 2509.22072). Blocks below the layer run once, before it; see `pipeline.editing.lessons`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from pipeline.editing import lessons
from pipeline.editing.contexts import CONTEXTS, TAUGHT_CONTEXTS
from pipeline.editing.lessons import APART, KeepTraining, LessonData, Lessons, read_lessons, teaching_loss
from pipeline.editing.method import register, settings_of
from pipeline.editing.ordinary_text import ordinary_text
from pipeline.editing.solvers import sparing
from pipeline.editing.statistics import KeyMoments
from pipeline.editing.whitening import WhitenedAdam, whitener
from pipeline.errors import DeviceError, UserError
from pipeline.model.activations import Activations, checkpointing, target_logits
from pipeline.model.blocks import Projection, inputs_last, weight_name
from pipeline.model.llm import LLM
from pipeline.options.base import Count, Most, Options, Positive, Weight, above, at_least, at_most, one_of
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.requests.rows import Batch, Row
from pipeline.requests.schema import EditRequest
from pipeline.running.sharding import put, whole
from pipeline.running.stage import Staying, attempt, run
from pipeline.running.trainer import Runtime, trainer_of

EPOCHS, LEAST_STEPS = 40, 80
READ_MOST = 1024  # texts that a last solve reads, of each kind


@dataclass(kw_only=True)
class FinetuneSettings(Options):
    """What fine-tuning can be set to."""

    scope: Annotated[str, one_of("mlp", "down", "experts", "shared")] = "mlp"
    """What is changed: mlp (all projections of the golden layer's MLP), down (the down-projection), or of a mixture
    experts (those that tokens are sent to) or shared (the MLP beside them)."""
    epochs: Most = None
    """The most passes over the requests; default: 40, and for few requests as many as make 80 steps."""
    batch_size: Count = 8
    """Requests in an optimiser step, over all devices."""
    contexts: Annotated[int, at_least(0), at_most(len(CONTEXTS) - 1)] = TAUGHT_CONTEXTS
    """Contexts that a prompt is trained under, in turn with its other forms, between the bare prompt."""
    learning_rate: Positive = 0.006
    """Adam's step size, in units of a weight's root mean square (LoRA: as it is)."""
    last_step: Annotated[float, above(0), at_most(1)] = 0.3
    """The last epoch's step size, in units of the first's."""
    learnt: Weight = 0.05
    """A row whose loss (nats) is below this counts no more; when all kinds of forms are, training ends."""
    kl: Weight = 0.6
    """Weight of going on as before after other names, and other relations of a subject; 0: not asked for."""
    kept: Count = 2
    """Such texts in a step, for each request that it has room for: the more, the less chance is in its KL."""
    whiten: Weight = 0.01
    """Ridge of whitening by key statistics, relative to their mean: steps spare what ordinary text uses; 0: off."""
    sparing: Weight = 0.15
    """Weight of what is to go on as before in a last solve, which keeps of the change what was taught; 0: none."""
    depths: list[float] = field(default_factory=list)
    """Further blocks that are trained beside the golden layers, each by its depth in the model: 0 to 1."""


class FineTune(Staying):
    """Trains the MLP weights (or the down-projection) of the golden layers.

    For any Trainer, with plain batches of `EditRequests` as well; `edit` gives it batches with unrelated prompts.

    Args:
        llm: the model; what is not trained is frozen when training starts.
        layers: the blocks to train.
        settings: how; default: fine-tuning's.
        statistics: which ordinary text is to go on as before.

    Example:
        >>> trainer = Trainer(max_epochs=3, accumulate_grad_batches=2)
        >>> trainer.fit(FineTune(llm, [1]), EditRequests(requests, llm.tokenizer, batch_size=4))
    """

    adapter: dict[str, Any] | None = None

    def __init__(
        self,
        llm: LLM,
        layers: Sequence[int],
        settings: FinetuneSettings | None = None,
        statistics: StatisticsOptions | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds what is trained
        self.llm, self.model, self.activations = llm, llm.model, Activations(llm)
        self.settings, self.statistics = settings or FinetuneSettings(), statistics or StatisticsOptions()
        if wrong := [depth for depth in self.settings.depths if not 0 <= depth < 1]:
            raise UserError(f"edit: depths: {wrong[0]}; expected parts of the model's depth, from 0 to below 1")
        llm.check_layers(layers)
        further = {int(depth * len(llm.blocks)) for depth in self.settings.depths}
        self.layers = sorted({*layers, *(min(llm.editable, key=lambda block: abs(block - one)) for one in further)})
        self.projections: dict[str, Projection] = {}
        for layer in self.layers:
            self.projections |= llm.blocks[layer].projections(self.settings.scope)
        self.weight_names = [weight_name(name, one) for name, one in self.projections.items()]
        self.state: dict[str, Tensor] = {}
        self.moments: dict[str, Tensor] = {}  # by projection, ordinary text's key statistics
        self.whiteners: dict[str, Tensor] = {}  # by which steps are whitened
        self.after_values = False  # whether values were put in before, which bend what else is said of subjects
        self.epochs = self.settings.epochs or EPOCHS
        self.round, self.quiet = 1, 0  # epochs that ask for each kind of form, and those gone by with all learnt

    def run(self, requests: Sequence[EditRequest], runtime: Runtime, earlier: Sequence[EditRequest] = ()) -> None:
        """Train until every request is learnt or the settings' epochs are over."""
        (courses,) = self.lessons([requests], runtime)
        self.fit(courses, runtime)

    @property
    def moments_of(self) -> list[str]:
        """The projections of whose keys the settings want ordinary text's second moments."""
        own = self.settings
        return list(self.projections) if own.whiten or (own.sparing and own.kl) else []

    def lessons(self, groups: Sequence[Sequence[EditRequest]], runtime: Runtime) -> list[list[Lessons]]:
        """The courses of each group of requests, which know nothing of each other."""
        own = self.settings
        names = lessons.NAMES_EACH * own.kept // 2 if own.kl else 0
        ordinary = ordinary_text(self.llm, self.statistics, runtime) if names and self.moments_of else []
        return read_lessons(self.llm, min(self.layers), groups, own.contexts, names, runtime, ordinary)

    def fit(self, courses: Sequence[Lessons], runtime: Runtime) -> None:
        """Train on courses, in micro-batches where the options ask for them; UserError for too little memory."""
        size, work = self.settings.batch_size, runtime.work
        steps = -(-len(courses[0].taught) // size)  # of an epoch
        self.epochs = self.settings.epochs or max(EPOCHS, -(-LEAST_STEPS // max(1, steps)))
        self.round, self.quiet = sum(min(2, max(map(len, one.taught))) for one in courses), 0
        keeping = KeepTraining(work) if work else None
        about = {"logger": runtime.logger, "max_epochs": self.epochs, "log_every_n_steps": 1}
        with (
            trainer_of(
                runtime, "Editing", [keeping] if keeping else [], enable_checkpointing=bool(keeping), **about
            ) as trainer,
            checkpointing(self.llm, runtime.options.activation_checkpointing),
        ):
            parts = -(-size // (trainer.world_size * (runtime.options.micro_batch or size)))
            trainer.accumulate_grad_batches = max(trainer.accumulate_grad_batches, parts)
            data = LessonData(courses, size, self.settings.kept, self.llm.pad_token_id, runtime.seed)
            found = keeping.found() if keeping else None
            fit = partial(trainer.fit, self, datamodule=data, ckpt_path=found, weights_only=True)
            suffices, failed = attempt(fit)
        if not suffices:
            raise DeviceError(
                f"trainer: {failed}; give expert.batch_size {max(1, size // 2)}, "
                "trainer.activation_checkpointing true, trainer.precision bf16-true or trainer.strategy fsdp2"
            )
        self.spare(courses, runtime)

    def spare(self, courses: Sequence[Lessons], runtime: Runtime) -> None:
        """Let what was trained do the same to what was taught, and little to what is to go on as before.

        Training with KL alone leaves on other texts what no one step finds worth taking back; one solve takes it.
        Where values were put in before, training gives subjects back some of what these bend: that stays as well.
        """
        taught = [lesson.row for course in courses for forms in course.taught for lesson in forms]
        others = [lesson.row for course in courses for lesson in course.others]
        if self.after_values:
            taught += [row for row in others if row.tag != APART]
            others = [row for row in others if row.tag == APART]
        if not (others and self.moments and self.settings.sparing):
            return
        read = [self._keys_of(rows, runtime) for rows in (taught, others)]
        if not all(moment.isfinite().all() for moments in read for moment in moments.values()):
            return  # the weights are broken, and refused as such
        for name, weight in self.trained().items():
            if reads := self.reads(name):
                projection, last = reads
                T, N, C = (each[projection].to(weight.device) for each in (*read, self.moments))
                M = sparing(T, N, C, self.settings.sparing).float()
                start = self.origin(name).to(weight.device).float()
                change = whole(weight).float() - start
                put(weight, start + (change @ M if last else M.mT @ change))

    def _keys_of(self, rows: Sequence[Row], runtime: Runtime) -> dict[str, Tensor]:
        """Second moments of the keys of texts, or of a part of them, by projection."""
        stage = KeyMoments(self.llm, list(self.projections))
        stage.title = "Keys for a last solve"
        some = random.Random(runtime.seed).sample(rows, min(len(rows), READ_MOST))
        run(stage, some, runtime, Row.length, stage.together)
        return stage.moments()

    def configure_model(self) -> None:
        """Freeze what is not trained, before a strategy wraps it; remember what is trained as it is."""
        self.model.eval()
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(self.trains(name))
        self.start = {name: whole(weight).to("cpu", copy=True) for name, weight in self.trained().items()}

    def trains(self, name: str) -> bool:
        """Whether the weight of this name is trained."""
        return name in self.weight_names

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by its name in the model."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam, whose step falls to `last_step` times itself: small late steps take little from earlier ones."""
        rate, trained = self.settings.learning_rate, self.trained()
        adam = WhitenedAdam(
            [{"params": [weight], "lr": rate * self.unit(name)} for name, weight in trained.items()],
            {weight: found for name, weight in trained.items() if (found := self.whitening(name))},
        )
        falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, self.settings.last_step, total_iters=self.epochs)
        return {"optimizer": adam, "lr_scheduler": falling}

    def unit(self, name: str) -> float:
        """The unit of a weight's step: its own root mean square, so that one rate serves every family."""
        return self.start[name].float().square().mean().sqrt().item()

    def reads(self, name: str) -> tuple[str, bool] | None:
        """The projection whose inputs a trained weight reads, and whether they lie on its last dimension."""
        projection = list(self.projections)[self.weight_names.index(name)]
        return projection, inputs_last(self.projections[projection])

    def origin(self, name: str) -> Tensor:
        """What a trained weight would be without what it changes."""
        return self.start[name]

    def whitening(self, name: str) -> tuple[Tensor, bool] | None:
        """A trained weight's whitener, found on the model's device, and whether it acts on the last dimension."""
        device, (projection, last) = self.llm.embedding.device, self.reads(name) or ("", False)
        if not (self.settings.whiten and projection in self.moments):
            return None
        if projection not in self.whiteners:
            self.whiteners[projection] = whitener(self.moments[projection].to(device), self.settings.whiten).cpu()
        return self.whiteners[projection].to(device), last

    def training_step(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch (see `teaching_loss`), such that its mean over devices and micro-batches of a
        step is that of all rows.

        UserError for a loss that is not a number.
        """
        with self.activations.from_block(min(self.layers), batch.enter_BTD):
            logits_NV, base_MV = target_logits(self.model, batch).tensor_split([len(batch.target_N)])
        loss, losses_B = teaching_loss(batch, logits_NV, base_MV, self.settings.learnt, self.settings.kl)
        counts_B = torch.ones_like(losses_B, dtype=torch.bool)
        if batch.weight_B is not None:  # a device without a row of its own runs one that counts nothing
            counts_B = batch.weight_B[: len(losses_B)] > 0
        if not losses_B[counts_B].isfinite().all():
            ids = dict.fromkeys(str(row.tag) for row in batch.texts[: len(losses_B)])
            raise UserError(
                f"edit: the loss is not a number in step {self.global_step}, in the batch of requests "
                f"{', '.join(ids)}; try a smaller expert.learning_rate"
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

    def on_train_epoch_start(self) -> None:
        """Count what is not learnt yet."""
        self.unlearnt = torch.zeros((), device=self.device)

    def on_train_epoch_end(self) -> None:
        """End when nothing is left to learn in any kind of form, or the epochs are over."""
        left = self.trainer.strategy.reduce(self.unlearnt, reduce_op="sum")
        self.quiet = 0 if left else self.quiet + 1
        if self.quiet >= self.round or self.current_epoch + 1 >= self.epochs:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained alone, and whether all is learnt."""
        trained = {f"model.{name}" for name in self.trained()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["unlearnt"], checkpoint["over"] = self.unlearnt.cpu(), self.trainer.should_stop
        checkpoint["quiet"] = self.quiet

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        self.unlearnt, self.trainer.should_stop = checkpoint["unlearnt"].to(self.device), checkpoint["over"]
        self.quiet = checkpoint["quiet"]


def make_finetune(
    llm: LLM, layers: Sequence[int], options: EditOptions, earlier: Mapping[str, Tensor] | None = None
) -> FineTune:
    """Fine-tuning as `edit` makes it; what was learnt before is in the weights."""
    return FineTune(llm, layers, settings_of(options), options.statistics)


register("finetune", make_finetune, FinetuneSettings)

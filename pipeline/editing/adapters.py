"""Adapters of many requests trained side by side, each as LoRA would train it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from peft import get_peft_model_state_dict
from torch import Tensor

from pipeline.editing.lessons import Lesson, Row, collate, read_rows
from pipeline.editing.lora import Lora
from pipeline.editing.method import Runtime
from pipeline.editing.training import variant
from pipeline.editing.whitening import WhitenedAdam
from pipeline.errors import UserError
from pipeline.model import LLM, build_trainer, target_logits
from pipeline.model.row_changes import LowRank, RowChanges, changed_rows
from pipeline.model.trainer import predict
from pipeline.options import EditOptions
from pipeline.requests import EditRequest, ListDataModule


class LoraAlone:
    """LoRA of each request alone, as `Lora` trains it: the same steps on the same rows, all side by side."""

    def __init__(self, llm: LLM, requests: Sequence[EditRequest], options: EditOptions, runtime: Runtime) -> None:
        self.llm, self.requests, self.options, self.runtime = llm, requests, options, runtime

    def at(self, layer: int) -> RowChanges:
        """Every request's adapter."""
        own, trainer, requests = self.options.lora, self.runtime.trainer, self.requests
        method = Lora(self.llm, [layer], self.options)
        method.find_whiteners(trainer)
        lessons = read_rows(self.llm, layer, [[request] for request in requests], own, trainer)
        module = AdaptersAlone(method, [Pupil(rows, others) for (rows,), others in lessons], self.runtime.seed)
        data = ListDataModule((range(len(requests)), list, len(requests)))
        found = dict(predict(build_trainer(trainer, "Adapters"), module, data))
        in_order = [found[number] for number in range(len(requests))]
        return {
            name: LowRank(
                torch.stack([one[name][0] for one in in_order]) * (own.alpha / own.rank),
                torch.stack([one[name][1] for one in in_order]),
            )
            for name in module.start
        }


class Pupil(NamedTuple):
    """A request's rows (bare, then under each context), and unrelated prompts."""

    rows: list[Row]
    others: list[Row]


Factors = dict[str, tuple[Tensor, Tensor]]  # by projection, LoRA's B (O, k) and A (k, I)


class AdaptersAlone(LightningModule):
    """Trains an adapter of its own for each request of a batch, epoch by epoch as `FineTune` would train it alone.

    Args:
        method: made for one block, its whiteners found.
        pupils: what each request is taught.
        seed: of the adapters' start.
    """

    def __init__(self, method: Lora, pupils: Sequence[Pupil], seed: int) -> None:
        super().__init__()
        self.llm, self.options, self.whiteners = method.llm, method.options, method.whiteners
        self.model = self.llm.model
        self.layer = method.layers[0]
        self.pupils = pupils
        with method.adapted(seed) as adapted:
            begun = get_peft_model_state_dict(adapted)
        names = self.llm.blocks[self.layer].projections(self.options.scope)
        self.start = {  # B and A of each projection
            name: tuple(begun[f"base_model.model.{name}.lora_{factor}.weight"].clone() for factor in "BA")
            for name in names
        }

    @torch.enable_grad()
    def predict_step(self, batch: list[int]) -> list[tuple[int, Factors]]:
        """Train until each request is learnt or the options' epochs are over; one that is leaves the batch."""
        trained = {
            name: [factor.expand(len(batch), -1, -1).clone().requires_grad_() for factor in factors]
            for name, factors in self.start.items()
        }
        whiteners = {trained[name][1]: (P.to(self.device), 1) for name, P in self.whiteners.items()}
        adam = WhitenedAdam(
            [{"params": [f for pair in trained.values() for f in pair], "lr": self.options.learning_rate}],
            whiteners,
        )
        falling = torch.optim.lr_scheduler.LinearLR(
            adam, 1.0, self.options.last_step, total_iters=self.options.epochs
        )
        found = {}
        running = list(range(len(batch)))
        for epoch in range(self.options.epochs):
            adam.zero_grad()
            unlearnt = self._differentiate(
                trained, running, [self.pupils[batch[place]] for place in running], epoch
            )
            adam.step()
            falling.step()
            for place in running:
                found[batch[place]] = {
                    name: (B[place].detach().clone(), A[place].detach().clone()) for name, (B, A) in trained.items()
                }
            running = [place for place, going in zip(running, unlearnt, strict=True) if going]
            if not running:
                break
        return list(found.items())

    def _differentiate(
        self, trained: dict[str, list[Tensor]], running: list[int], pupils: list[Pupil], epoch: int
    ) -> list[bool]:
        """Add the gradient of every running request's loss to its factors; whether its row is unlearnt yet."""
        rows = [variant(pupil.rows, epoch, 0) for pupil in pupils]
        others = [pupil.others[epoch % len(pupil.others)] for pupil in pupils if pupil.others]
        lesson: Lesson = move_data_to_device(
            collate(rows, others, len(rows), len(others), self.llm.pad_token_id), self.device
        )
        own = torch.tensor([*running, *running][: len(rows) + len(others)], device=self.device)
        scale = self.options.alpha / self.options.rank
        changes = {name: LowRank(scale * B, A).rows(own) for name, (B, A) in trained.items()}
        with lesson.handed_on(self.llm, self.layer), changed_rows(self.llm, changes):
            logits_NV = target_logits(self.llm.model, lesson.batch)
        losses_B = lesson.batch.losses(logits_NV)[: len(rows)]
        if not losses_B.isfinite().all():
            raise UserError(
                f"edit: the loss is not a number in epoch {epoch}, block {self.layer}; "
                "try a smaller --expert.learning_rate"
            )
        unlearnt_B = losses_B.detach() > self.options.learnt
        loss = (losses_B * unlearnt_B).sum()
        if lesson.base_KV is not None:
            loss = loss + self.options.kl * lesson.divergence(logits_NV)
        loss.backward()
        return unlearnt_B.tolist()

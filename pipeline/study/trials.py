"""Trial edits: many requests edited side by side, each as `edit` would edit it alone.

One request's change of a weight has a low rank: a value times a direction of inputs for locate-then-edit, an
adapter for LoRA. So a batch of requests needs no weight of its own for each: every row runs under its own change,
ΔW_b = left_b right_b, in the search as in the measuring.

Shapes: B requests, I inputs and O outputs of a projection, k the change's rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from pipeline.editing.editor import METHODS
from pipeline.editing.finetune import FineTune
from pipeline.editing.lessons import Lessons, collate_lessons, teaching_loss
from pipeline.editing.locate import LocateThenEdit
from pipeline.editing.method import EditMethod
from pipeline.editing.whitening import WhitenedAdam
from pipeline.errors import UserError
from pipeline.model.activations import Activations, target_logits
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.requests.schema import EditRequest
from pipeline.running.stage import Stage, run
from pipeline.running.trainer import Runtime

LowRank = tuple[Tensor, Tensor]  # of each request: left (B, O, k), right (B, k, I)


def side_by_side(
    llm: LLM, requests: Sequence[EditRequest], options: EditOptions, runtime: Runtime
) -> ValueTrials | AdapterTrials:
    """Edits of each request alone.

    Args:
        llm: the model, frozen by the caller.
        requests: what to change.
        options: the method, one that can be tried so (`METHODS[…].trial`), and its settings.
        runtime: what it runs with.
    """
    kinds: dict[str | None, type[ValueTrials | AdapterTrials]] = {"values": ValueTrials, "adapters": AdapterTrials}
    return kinds[METHODS[options.method].trial](llm, requests, options, runtime)


@contextmanager
def changed_rows(llm: LLM, changes: dict[str, LowRank]) -> Iterator[None]:
    """Inside the `with`, every row of a pass runs under its own changes, added to what the weights do."""
    with ExitStack() as stack:
        for name, (left_BOk, right_BkI) in changes.items():

            def add(x_BTI: Tensor, y_BTO: Tensor, left: Tensor = left_BOk, right: Tensor = right_BkI) -> Tensor:
                return y_BTO + ((x_BTI.to(right) @ right.mT) @ left.mT).to(y_BTO.dtype)

            stack.enter_context(Activations(llm).changing(name, len(left_BOk), add))
        yield


@dataclass
class Trials:
    """Requests that are edited side by side, by a method that is made for one block after the other."""

    llm: LLM
    requests: Sequence[EditRequest]
    options: EditOptions
    runtime: Runtime

    def method(self, layer: int) -> EditMethod:
        """The method for a block."""
        return METHODS[self.options.method].make(self.llm, [layer], self.options)


class ValueTrials(Trials):
    """Locate-then-edit: rank one, for all of a request's columns ask for the same change."""

    def at(self, layer: int) -> dict[str, LowRank]:
        """Every request's value times the direction of inputs that the solver gives it."""
        method = self.method(layer)
        assert isinstance(method, LocateThenEdit)
        ((name, down),) = self.llm.blocks[layer].down.items()
        text_II = method.moments(self.runtime)[layer]
        values = method.find(method.search(layer, 1), method.located(self.requests), self.runtime)
        keys_GCI = method.keys(layer, self.requests, self.runtime)
        kept = method.kept(layer, [[request] for request in self.requests], text_II, self.runtime)
        directions = []
        for key_CI, kept_II in zip(keys_GCI, kept, strict=True):
            key_In, kept_II = key_CI.T.to(down.weight.device), kept_II.to(down.weight.device)
            directions.append(method.solve(key_In, torch.ones(1, key_In.shape[1]).to(key_In), kept_II).float())
        right_BkI = torch.stack(directions)
        return {name: (torch.stack(values).to(right_BkI)[..., None], right_BkI)}


class AdapterTrials(Trials):
    """LoRA: the same steps on the same rows as it takes for each request alone."""

    def at(self, layer: int) -> dict[str, LowRank]:
        """Every request's adapter."""
        method = self.method(layer)
        assert isinstance(method, FineTune) and method.lora
        method.find_whiteners(self.runtime)
        lessons = method.lessons([[request] for request in self.requests], self.runtime)
        stage = AdaptersAlone(method, self.runtime.seed)
        found = run(stage, lessons, self.runtime, batch_size=len(lessons))
        return {
            name: (
                torch.stack([one[name][0] for one in found]) * method.lora.scaling,
                torch.stack([one[name][1] for one in found]),
            )
            for name in stage.start
        }


class AdaptersAlone(Stage):
    """Trains an adapter of its own for each request of a batch, epoch by epoch as `FineTune` would train it alone.

    Outputs are LoRA's B (O, k) and A (k, I) by projection.

    Args:
        method: made for one block, its whiteners found.
        seed: of the adapters' start.
    """

    title, gradients = "Adapters", True

    def __init__(self, method: FineTune, seed: int) -> None:
        super().__init__(method.llm.model)
        assert method.lora
        self.llm, self.settings, self.whiteners = method.llm, method.settings, method.whiteners
        self.layer, self.scaling = method.layers[0], method.lora.scaling
        with method.lora.attached(seed, method.whiteners) as adapted:
            begun = get_peft_model_state_dict(adapted)
        self.start = {  # B and A of each projection
            name: [begun[f"base_model.model.{name}.lora_{factor}.weight"].clone() for factor in "BA"]
            for name in self.llm.blocks[self.layer].projections(self.settings.scope)
        }

    def collate(self, items: list[Lessons]) -> list[Lessons]:
        return items

    def step(self, batch: list[Lessons]) -> list[dict[str, LowRank]]:
        """Train until each request is learnt or the settings' epochs are over; one that is leaves the batch."""
        settings = self.settings
        trained = {
            name: [factor.to(self.device).expand(len(batch), -1, -1).clone().requires_grad_() for factor in factors]
            for name, factors in self.start.items()
        }
        adam = WhitenedAdam(
            [{"params": [f for pair in trained.values() for f in pair], "lr": settings.learning_rate}],
            {trained[name][1]: (P.to(self.device), 1) for name, P in self.whiteners.items()},
        )
        falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, settings.last_step, total_iters=settings.epochs)
        found: dict[int, dict[str, LowRank]] = {}
        running = list(range(len(batch)))
        for epoch in range(settings.epochs):
            adam.zero_grad()
            unlearnt = self._differentiate(trained, running, batch, epoch)
            adam.step()
            falling.step()
            for n in running:
                found[n] = {name: (B[n].detach().cpu(), A[n].detach().cpu()) for name, (B, A) in trained.items()}
            running = [n for n, going in zip(running, unlearnt, strict=True) if going]
            if not running:
                break
        return [found[n] for n in range(len(batch))]

    def _differentiate(
        self, trained: dict[str, list[Tensor]], running: list[int], batch: list[Lessons], epoch: int
    ) -> list[bool]:
        """Add the gradient of every running request's loss to its factors; whether its row is unlearnt yet."""
        rows = [batch[n].of_epoch(0, epoch) for n in running]
        others = [batch[n].other(0, epoch) for n in running if batch[n].others]
        lesson = collate_lessons(rows, others, (1.0, 1.0), self.llm.pad_token_id).to(self.device)
        own = torch.tensor([*running, *running][: len(rows) + len(others)], device=self.device)
        changes = {name: (self.scaling * B[own], A[own]) for name, (B, A) in trained.items()}
        with Activations(self.llm).from_block(self.layer, lesson.enter_BTD), changed_rows(self.llm, changes):
            logits_NV = target_logits(self.llm.model, lesson)
        loss, losses_B = teaching_loss(lesson, logits_NV, self.settings.learnt, self.settings.kl)
        if not losses_B.isfinite().all():
            raise UserError(
                f"edit: the loss is not a number in epoch {epoch}, block {self.layer}; "
                "try a smaller --edit.expert.learning_rate"
            )
        loss.backward()
        return (losses_B.detach() > self.settings.learnt).tolist()

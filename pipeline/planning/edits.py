"""Edits that an optimiser works at, training and locate-then-edit: gone through as `pipeline.planning.passes`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from pipeline.editing.columns import Columns
from pipeline.editing.finetune import FineTune
from pipeline.editing.lessons import Lesson
from pipeline.editing.locate import reach, solver
from pipeline.editing.lora import Lora
from pipeline.editing.values import SEARCHED_TOGETHER, Located, ValueSearch
from pipeline.model import collate_targets, sizes
from pipeline.model.suffix import SuffixRow
from pipeline.options import EditOptions
from pipeline.planning.case import ANSWER, Case, tracing
from pipeline.planning.shape import Shape

STEPS = 2  # of an optimiser: its state is there from the second on
OPENING = 8  # tokens of a text that a subject is put into, see ASSOCIATIONS
TRAINED = {"finetune": FineTune, "lora": Lora}


def training(case: Case, options: EditOptions, batch: int) -> int:
    """Optimiser steps of fine-tuning or LoRA on a device's share of `batch` requests."""
    shape = case.shape
    module = TRAINED[options.method](shape, [case.layer], options)
    module.trainer = SimpleNamespace(world_size=case.devices)  # type: ignore[assignment]
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    with _ready(module), tracing(case) as alive:
        lesson = _lesson(case, module, batch)
        module.whiteners = _whiteners(case, module)
        adam: Any = module.configure_optimizers()["optimizer"]
        for _ in range(STEPS):
            adam.zero_grad()
            with case.stepping():
                loss, _ = module.losses(lesson)
            loss.backward()
            adam.step()
    return alive.peak


def trained_bytes(case: Case, options: EditOptions) -> int:
    """Bytes of the weights that fine-tuning or LoRA trains, which are those of their gradients."""
    module = TRAINED[options.method](case.shape, [case.layer], options)
    with _ready(module):
        return sum(weight.numel() * weight.element_size() for _, weight in module.trained())


@contextmanager
def _ready(module: FineTune) -> Iterator[None]:
    """Inside the `with`, what is trained requires a gradient, and nothing else does."""
    shape = module.llm
    assert isinstance(shape, Shape)
    if not isinstance(module, Lora):
        with shape.frozen(module.weight_names):
            yield
        return
    module.whiteners = {}
    with module.adapted(0):
        for part in shape.model.modules():
            for name, weight in part.named_parameters(recurse=False):
                if not isinstance(weight, FakeTensor):  # the adapter's own, as PEFT made them
                    with shape.mode:
                        setattr(part, name, nn.Parameter(torch.empty_like(weight), weight.requires_grad))
        yield


def _lesson(case: Case, module: FineTune, batch: int) -> Lesson:
    """A device's share of `batch` requests, and of as many unrelated prompts as go with them."""
    rows, others = -(-batch // case.devices), -(-batch // (2 * case.devices)) if module.options.kl else 0
    unrelated = replace(case.row, target_start=case.length - 1, tag=None)
    config = case.shape.model.config.get_text_config(decoder=True)
    kept = case.layer and module.options.reuse
    return Lesson(
        batch=collate_targets([case.row] * rows + [unrelated] * others),
        rows=rows,
        others=max(1, others),
        enter_BTD=torch.empty(rows + others, case.length, config.hidden_size, dtype=case.dtype) if kept else None,
        base_KV=torch.empty(others, config.vocab_size) if others else None,
    )


def _whiteners(case: Case, module: FineTune) -> dict[str, Tensor]:
    if not module.options.whiten:
        return {}
    inputs = {
        name: sizes(projection)[0]
        for name, projection in case.shape.blocks[case.layer].projections(module.options.scope).items()
    }
    return {name: torch.empty(size, size) for name, size in inputs.items()}


def locating(case: Case, options: EditOptions, together: int) -> int:
    """Values of requests searched for together, subjects in the middle of their prompts; then the solution."""
    search = ValueSearch(case.shape, case.layer, replace(reach(options.locate, together), steps=1))
    ((_, down),) = case.shape.blocks[case.layer].down.items()
    solve = solver(options.method, options.locate)
    inputs, outputs = sizes(down)
    count = together * (options.locate.key_contexts if options.locate.key_per_context else 1)
    with tracing(case) as alive:
        with case.stepping():
            search.predict_step(_located(case, options, together))
        held = Columns.of_state({}, case.layer, down)
        solve(torch.empty(inputs, count), torch.empty(outputs, count), torch.empty(inputs, inputs)).float()
        del held
    return alive.peak


def searched_together(case: Case, options: EditOptions) -> int:
    """The most requests whose values are searched for at once: see `SEARCHED_TOGETHER`."""
    (located,) = _located(case, options, 1)
    return max(1, SEARCHED_TOGETHER // located.tokens())


def _located(case: Case, options: EditOptions, requests: int) -> list[Located]:
    """Requests whose prompts are as long as they may be; their subject alone stands in the other texts."""
    place, ids = case.length // 2, case.row.token_ids
    prompt = SuffixRow(ids, min(place, case.row.target_start - 1), case.row.target_start)
    association = SuffixRow([0] * (OPENING + ANSWER), OPENING // 2, OPENING)
    plain = SuffixRow([0] * (OPENING // 2), OPENING // 2 - 1, OPENING // 2)
    rows = [prompt] * options.locate.contexts + [association] * options.locate.associations + [plain]
    return [Located(number, "request", rows) for number in range(requests)]

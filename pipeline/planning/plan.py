"""`run.py plan`: what each stage needs of a device's memory, known before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from pipeline.editing.edit import METHODS
from pipeline.editing.moments import READ_TOGETHER
from pipeline.errors import UserError, check_choice
from pipeline.model import weights_dtype
from pipeline.model.loading import load_config
from pipeline.options import PlanCommand
from pipeline.options.shared import SHARDED
from pipeline.planning import edits, passes
from pipeline.planning.case import Case
from pipeline.planning.memory import longest_batch, weight_bytes
from pipeline.planning.shape import shape_of


class Stage(NamedTuple):
    """What is planned for.

    Attributes:
        name: the stage's, or the method's.
        batch: requests in a batch, as asked for.
        most: the most that run at once whatever the batch; None: as many as there are.
        beside: bytes beside the weights, by requests that run at once.
        fixed: whether its batch is nobody's to choose.
    """

    name: str
    batch: int
    most: int | None
    beside: Callable[[int], int]
    fixed: bool = False


@dataclass(frozen=True)
class Need:
    """What a stage needs of a device.

    Attributes:
        stage: its name.
        batch: requests that run at once: those asked for, or fewer where the stage itself stops.
        weights, beside, total: bytes.
        fits: whether that is within the device's memory.
        longest_batch: the most requests that fit; None: any number, as no more run at once, or nobody's to choose.
    """

    stage: str
    batch: int
    weights: int
    beside: int
    total: int
    fits: bool
    longest_batch: int | None


@dataclass(frozen=True)
class MemoryPlan:
    """Every stage's needs of one device, in bytes, and what they were found for."""

    model: str
    parameters: int
    blocks: int
    layer: int
    length: int
    precision: str
    strategy: str
    devices: int
    memory: int
    stages: list[Need]

    def to_dict(self) -> dict[str, Any]:
        """As plan.json has it."""
        return asdict(self)


def plan_memory(options: PlanCommand) -> MemoryPlan:
    """Go through every stage without values, and say what it needs.

    Raises:
        UserError: for a model, method, strategy or layer that does not exist, or rows longer than the context.
    """
    trainer = options.trainer
    for method in options.method:
        check_choice("method", method, METHODS)
    memory = int(options.memory * 1e9) if options.memory else present_memory(trainer.accelerator)
    shape = shape_of(load_config(options.model), options.model, weights_dtype(trainer))
    shape.check_layers([options.layer])
    if shape.context_length is not None and options.length + 1 > shape.context_length:
        raise UserError(f"length: {options.length}; the context of {shape.name} holds {shape.context_length}")
    case = Case(shape, options.length, options.layer, trainer.precision, options.all_devices)
    weights = weight_bytes(shape, trainer.strategy, case.devices)
    return MemoryPlan(
        model=options.model,
        parameters=sum(parameter.numel() for parameter in shape.model.parameters()),
        blocks=len(shape.blocks),
        layer=options.layer,
        length=options.length,
        precision=trainer.precision,
        strategy=trainer.strategy,
        devices=case.devices,
        memory=memory,
        stages=[_need(stage, weights, memory) for stage in stages(case, options)],
    )


def stages(case: Case, options: PlanCommand) -> Iterator[Stage]:
    """Attribution, the ways to edit that are asked for, with their key statistics, and evaluation."""
    most = passes.attributed_together(case)
    batch = options.batch or options.attribution.batch_size
    yield Stage("attribution", batch, most, partial(passes.attribution, case, options.attribution))
    whitening = any(getattr(options.edit, name).whiten for name in edits.TRAINED if name in options.method)
    located = any(METHODS[name].options == "locate" for name in options.method)
    if whitening or located:
        scope = "mlp" if whitening else "down"
        beside = partial(passes.key_statistics, case, scope)
        yield Stage("key statistics", READ_TOGETHER, None, beside, fixed=True)
    for method in options.method:
        edit = options.edit.by(method)
        batch = options.batch or getattr(edit, METHODS[method].options).batch_size
        if method in edits.TRAINED:
            sent = edits.trained_bytes(case, edit) if case.devices > 1 and not _is_sharded(options) else 0
            yield Stage(method, batch, None, partial(_trained, case, edit, sent))
        elif METHODS[method].options == "locate":
            yield Stage(method, batch, edits.searched_together(case, edit), partial(edits.locating, case, edit))
        else:
            yield Stage(method, batch, None, partial(passes.one_pass, case, edit))
    most = max(1, options.evaluation.batch_tokens // case.length)
    batch = options.batch or options.evaluation.batch_size
    yield Stage("evaluation", batch, most, partial(passes.evaluation, case))


def _trained(case: Case, edit: Any, sent: int, batch: int) -> int:
    return sent + edits.training(case, edit, batch)


def _is_sharded(options: PlanCommand) -> bool:
    return options.trainer.strategy in SHARDED


def _need(stage: Stage, weights: int, memory: int) -> Need:
    batch = min(stage.batch, stage.most or stage.batch)
    beside = cache(stage.beside)
    total = weights + beside(batch)
    longest = None if stage.fixed else longest_batch(beside, batch, memory - weights, stage.most)
    return Need(
        stage=stage.name,
        batch=batch,
        weights=weights,
        beside=beside(batch),
        total=total,
        fits=total <= memory,
        longest_batch=None if longest == stage.most else longest,
    )


def present_memory(accelerator: str) -> int:
    """Bytes of this machine's first GPU, or of the machine where there is none.

    Raises:
        UserError: when a GPU is asked for and there is none to ask.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    if accelerator not in ("auto", "cpu"):
        raise UserError(f"memory: there is no {accelerator} here to be asked; give a device's with --memory GB")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

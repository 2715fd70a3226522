"""`run.py plan`: what each stage needs of a device's memory, known before anything is loaded.

A device holds weights, and what a stage makes beside them: needed(batch) = weights + beside(batch).

Weights. Where each device holds the whole model (`ddp`), those are all P bytes. Where blocks are sharded over N
devices (`fsdp`, `fsdp2`), embeddings, head and the last norm (E bytes) stay whole, a device keeps its N-th part of
the blocks, and while one block works the next is gathered: weights = E + (P − E) / N + 2 · the largest block.

Beside. What is alive at once in the stage's fullest step: activations that the backward pass reads, logits over the
vocabulary, gradients, Adam's two moments, what solves for a weight. It is not worked out but counted, as
`pipeline.planning.alive` says. Devices that train together under `ddp` hold their trained weights' gradients twice:
they are sent from buffers of their own. Of sharded weights that are trained, gradients and moments are counted as
if they were whole, which is more than is needed.

Longest batch. beside(batch) is a constant and a share for each request, so two batches tell the line. Stages that
stop at so many tokens take no more memory for a longer batch.

Not counted: what Python and the libraries take themselves (a CUDA context is near 0.5 GB), what an allocator keeps
in reserve, and what is kept in the host's memory for each request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.editing.editor import METHODS
from pipeline.editing.method import settings_of
from pipeline.editing.statistics import READ_TOGETHER
from pipeline.errors import UserError, check_choice
from pipeline.evaluation.reading import BATCH_SIZE, BATCH_TOKENS
from pipeline.model.loading import load_config
from pipeline.options.commands import PlanCommand
from pipeline.options.shared import SHARDED
from pipeline.planning import stages
from pipeline.planning.shape import Case, Shape, shape_of
from pipeline.running.trainer import weights_dtype

GATHERED = 2  # blocks: the one at work and the next
FURTHER = 4  # times the batch: where the line is looked at again


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
        stages=[_need(stage, weights, memory) for stage in planned(case, options)],
    )


def planned(case: Case, options: PlanCommand) -> Iterator[Stage]:
    """Attribution, the ways to edit that are asked for, with their key statistics, and evaluation."""
    most = stages.attributed_together(case)
    batch = options.batch or options.attribution.batch_size
    yield Stage("attribution", batch, most, partial(stages.attribution, case, options.attribution))
    edits = [options.edit.by(method) for method in options.method]
    whitening = any(getattr(settings_of(edit), "whiten", 0) for edit in edits)
    if whitening or any(METHODS[edit.method].solves_anew for edit in edits):
        beside = partial(stages.key_statistics, case, "mlp" if whitening else "down")
        yield Stage("key statistics", READ_TOGETHER, None, beside, fixed=True)
    for edit in edits:
        batch = options.batch or getattr(settings_of(edit), "batch_size", options.attribution.batch_size)
        sent = stages.trained_bytes(case, edit) if case.devices > 1 and not _is_sharded(options) else 0
        yield Stage(edit.method, batch, stages.searched_together(case, edit), partial(_edited, case, edit, sent))
    most = max(1, BATCH_TOKENS // case.length)
    yield Stage("evaluation", options.batch or BATCH_SIZE, most, partial(stages.evaluation, case))


def _edited(case: Case, edit: Any, sent: int, batch: int) -> int:
    return sent + stages.editing(case, edit, batch)


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


def weight_bytes(shape: Shape, strategy: str, devices: int) -> int:
    """Bytes of weights that a device holds while it works."""
    everything = sum(map(_bytes, shape.held()))
    if strategy not in SHARDED or devices == 1:
        return everything
    blocks = [sum(map(_bytes, block.module.parameters())) for block in shape.blocks]
    return everything - sum(blocks) + -(-sum(blocks) // devices) + min(GATHERED, len(blocks)) * max(blocks)


def longest_batch(beside: Callable[[int], int], batch: int, room: int, most: int | None = None) -> int:
    """The most requests whose bytes beside the weights fit into `room`; 0 where not even one does.

    Args:
        beside: bytes by requests; never fewer for more of them.
        batch: what was asked for.
        room: bytes.
        most: where more would not run at once, how many do.
    """
    beside = cache(beside)
    if beside(batch) > room:
        fitting, too_many = 0, batch
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            fitting, too_many = (middle, too_many) if beside(middle) <= room else (fitting, middle)
        return fitting
    if most is not None and beside(most) <= room:
        return most
    further = min(most or FURTHER * batch, FURTHER * batch)
    share = (beside(further) - beside(batch)) / (further - batch)
    return batch + int((room - beside(batch)) / share)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


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

"""`run.py plan`: what each stage needs of a device's memory, known before anything is loaded.

A device holds weights, and what a stage makes beside them: activations that the backward pass reads, logits over
the vocabulary, gradients, Adam's two moments, what solves for a weight. That is not worked out but counted, in the
stage's fullest step (`pipeline.planning.shape`). Devices that train together under `ddp` hold their gradients
twice: they are sent from buffers of their own. Of sharded weights that are trained, gradients and moments
are counted as if they were whole, which is more than is needed.

Not counted: what Python and the libraries take themselves (a CUDA context is near 0.5 GB), what an allocator keeps
in reserve, and what is kept in the host's memory for each request.
"""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache, partial
from math import floor

import torch

from pipeline.editing.editor import METHODS, wanted_plain
from pipeline.editing.method import settings_of
from pipeline.errors import UserError, check_choice
from pipeline.evaluation.reading import BATCH_SIZE, BATCH_TOKENS
from pipeline.model.blocks import weight_name
from pipeline.model.experts import Stacked
from pipeline.model.loading import load_config
from pipeline.model.quantised import NF4_BYTES, linear_maps
from pipeline.options.commands import PlanCommand
from pipeline.options.shared import NF4, SHARDED
from pipeline.planning import stages
from pipeline.planning.shape import Case, Shape, shape_of
from pipeline.running.trainer import weights_dtype

FURTHER = 4  # times the batch: the line's other point


@dataclass(frozen=True)
class Need:
    """What a stage needs of a device, in bytes."""

    stage: str
    batch: int  # requests that run at once: those asked for, or fewer where the stage itself stops
    weights: int
    beside: int
    total: int
    fits: bool  # into the device's memory
    longest_batch: int | None  # the most requests that fit; None: any, as no more run at once, or none to choose


@dataclass(frozen=True)
class MemoryPlan:
    """Every stage's needs of one device, in bytes, and what they were found for."""

    model: str
    parameters: int
    active: int  # parameters that a token meets: all, but for experts that it is not sent to
    blocks: int
    layer: int
    length: int
    precision: str
    strategy: str
    devices: int
    memory: int
    stages: list[Need]


def plan_memory(options: PlanCommand) -> MemoryPlan:
    """Go through every stage without values, and say what it needs.

    UserError for a model, method, strategy or layer that does not exist, or rows longer than the context.
    """
    trainer = options.trainer
    for method in options.method:
        check_choice("method", method, METHODS)
    memory = int(options.memory * 1e9) if options.memory else present_memory(trainer.accelerator)
    shape = shape_of(load_config(options.model), options.model, weights_dtype(trainer))
    shape.check_layers([options.layer])
    if shape.context_length is not None and options.length + 1 > shape.context_length:
        raise UserError(f"length: {options.length}; the context of {shape.name} holds {shape.context_length}")
    sharded = trainer.strategy in SHARDED
    asked = options.length, options.layer, trainer.precision, options.all_devices
    case = Case(shape, *asked, sharded, on_host=trainer.accelerator == "cpu")
    weights = weight_bytes(shape, trainer.strategy, case.devices)
    parameters = sum(parameter.numel() for parameter in shape.model.parameters())
    stacks = [one for block in shape.blocks for one in block.mlp.values() if isinstance(one, Stacked)]
    if trainer.precision == NF4:
        trainer.check_whole(f"precision {NF4}")
    return MemoryPlan(
        model=options.model,
        parameters=parameters,
        active=parameters - sum((len(one.weight) - one.reached) * one.weight[0].numel() for one in stacks),
        blocks=len(shape.blocks),
        layer=options.layer,
        length=options.length,
        precision=trainer.precision,
        strategy=trainer.strategy,
        devices=case.devices,
        memory=memory,
        stages=list(needs(case, options, weights, memory)),
    )


def needs(case: Case, options: PlanCommand, weights: int, memory: int) -> Iterator[Need]:
    """Of attribution, the ways to edit that are asked for, with their key statistics, and evaluation."""

    def need(
        stage: str,
        batch: int,
        beside: Callable[[int], int],
        most: int | None = None,
        fixed: bool = False,
        plain: Collection[str] = (),
    ) -> Need:
        """Of a stage that runs at `most` so many requests at once; its batch may be nobody's to choose.

        Of weights in 4 bits, those that it changes are `plain`, and the largest is unpacked while it is used.
        """
        spared, unpacked = in_4_bits(case.shape, plain) if case.precision == NF4 else (0, 0)
        held = weights - spared
        bytes_of = cache(lambda size: beside(size) + unpacked)
        batch = min(batch, most or batch)
        longest = None if fixed else longest_batch(bytes_of, batch, memory - held, most)
        taken = bytes_of(batch)
        fits = held + taken <= memory
        return Need(stage, batch, held, taken, held + taken, fits, None if longest == most else longest)

    asked = options.batch or options.attribution.batch_size
    attributed = partial(stages.attribution, case, options.attribution)
    yield need("attribution", asked, attributed, stages.attributed_together(case))
    edits = [options.edit.by(method) for method in options.method]
    made = [METHODS[edit.method].make(case.shape, [case.layer], edit) for edit in edits]
    for stage, kind, wanted_by in stages.STATISTICS:
        if wanted := {name for one in made for name in getattr(one, wanted_by, ())}:
            yield need(stage, kind.together, partial(stages.statistics, case, kind, sorted(wanted)), fixed=True)
    for edit in edits:
        batch = getattr(settings_of(edit), "batch_size", options.attribution.batch_size)
        edited, together = partial(stages.editing, case, edit), stages.searched_together(case, edit)
        plain = wanted_plain(case.shape, [case.layer], edit)
        yield need(edit.method, options.batch or batch, edited, together, plain=plain)
    most = max(1, BATCH_TOKENS // case.length)
    yield need("evaluation", options.batch or BATCH_SIZE, partial(stages.evaluation, case), most)


def weight_bytes(shape: Shape, strategy: str, devices: int) -> int:
    """Bytes of weights that a device holds at work: all of them, or embeddings, head, and its part of the blocks.

    Of sharded blocks, the one at work and the next are there whole.
    """
    everything = sum(tensor.nbytes for tensor in shape.held())
    if strategy not in SHARDED or devices == 1:
        return everything
    blocks = [sum(weight.nbytes for weight in block.module.parameters()) for block in shape.blocks]
    return everything - sum(blocks) + -(-sum(blocks) // devices) + min(2, len(blocks)) * max(blocks)


def in_4_bits(shape: Shape, plain: Collection[str]) -> tuple[int, int]:
    """Bytes that blocks in 4 bits (NF4) spare, where these weights stay plain; and of the largest, unpacked."""
    maps = ChainMap(*map(linear_maps, shape.blocks))
    packed = [one.weight for name, one in maps.items() if weight_name(name, one) not in plain]
    spared = sum(weight.nbytes - round(weight.numel() * NF4_BYTES) for weight in packed)
    return spared, max((weight.nbytes for weight in packed), default=0)


def longest_batch(beside: Callable[[int], int], batch: int, room: int, most: int | None = None) -> int:
    """The most requests whose bytes beside the weights fit into `room`, on the line through two batches.

    No more than `most` would run at once.
    """
    if most is not None and beside(most) <= room:
        return most
    left = room - beside(batch)
    other = min(most or FURTHER * batch, FURTHER * batch) if left >= 0 else 1
    apart = beside(other) - beside(batch)
    return max(0, batch + floor(left * (other - batch) / apart)) if apart else 0


def present_memory(accelerator: str) -> int:
    """Bytes of this machine's first GPU, or of the machine where there is none.
    UserError when a GPU is asked for and there is none to ask.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    if accelerator not in ("auto", "cpu"):
        raise UserError(f"memory: there is no {accelerator} here to be asked; give a device's with --memory GB")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

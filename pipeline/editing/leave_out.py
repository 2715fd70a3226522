"""Leaving requests out of an update: what it would have been without them, where its method can tell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.editing.columns import Columns, owner
from pipeline.editing.edit import METHODS, restored
from pipeline.editing.locate import LocateThenEdit
from pipeline.editing.method import Runtime
from pipeline.editing.update import WeightUpdate
from pipeline.model import LLM
from pipeline.running.sharding import whole
from pipeline.options import EditOptions, TrainerOptions
from pipeline.requests import EditRequest, fact

ROUNDING = 1e-5  # relative: what adding and taking away changes may leave of them


def can_leave_out(llm: LLM, update: WeightUpdate, requests: Sequence[EditRequest], method: str) -> bool:
    """Whether the update can be had without these requests: all were located, and so have columns of their own."""
    if METHODS[method].make is not LocateThenEdit:
        return False
    held = {number for layer in _layers(update) for number in _columns(llm, update, layer).owner_n.tolist()}
    return all(owner(request) in held for request in requests)


def leave_out(
    llm: LLM,
    update: WeightUpdate,
    requests: Sequence[EditRequest],
    options: EditOptions,
    trainer: TrainerOptions | None = None,
    seed: int = 0,
) -> WeightUpdate:
    """The update without some of its requests, as if they had never been among them.

    Locate-then-edit solves for all requests of a layer at once, so that any of them can be left out; values are not
    searched for again. When none is left and nothing else changed a weight, that weight is the base's, bit for bit.

    Args:
        llm: the base model.
        update: one that `can_leave_out` the requests.
        requests: what to leave out.
        options: the method's, as the update was made with.
        trainer: what it runs on.
        seed: of every draw.

    Raises:
        UserError: when the update was made for another model.
    """
    layers, gone = _layers(update), {fact(request) for request in requests}
    left = [request for request in update.requests if fact(request) not in gone]
    method = LocateThenEdit(llm, layers, options, update.state)
    base = {name: whole(llm.model.get_parameter(name)).cpu().clone() for name in method.weight_names}
    with update.applied(llm), restored(llm, method.weight_names), llm.frozen():
        method.leave_out(requests, Runtime(trainer or TrainerOptions(), seed=seed, earlier=left))
        changed = {name: whole(llm.model.get_parameter(name)).cpu().clone() for name in base}
    changed = {name: _snapped(tensor, base[name]) for name, tensor in changed.items()}
    unlike = {name: tensor for name, tensor in changed.items() if not torch.equal(tensor, base[name])}
    others = {name: tensor for name, tensor in update.tensors.items() if name not in changed}
    return WeightUpdate(
        model=update.model,
        fingerprint=update.fingerprint,
        method=options.method,
        layers=update.layers,
        tensors=others | unlike,
        requests=left,
        options=update.options,
        state=update.state | method.state,
    )


def _layers(update: WeightUpdate) -> list[int]:
    """Blocks that the update holds columns for."""
    return [layer for layer in update.layers if f"locate.{layer}.owner_n" in update.state]


def _columns(llm: LLM, update: WeightUpdate, layer: int) -> Columns:
    ((_, down),) = llm.blocks[layer].down.items()
    return Columns.of_state(update.state, layer, down)


def _snapped(tensor: Tensor, base: Tensor) -> Tensor:
    """The base's weight in place of one that differs from it by rounding alone."""
    return base if (tensor - base).norm() <= ROUNDING * base.norm() else tensor

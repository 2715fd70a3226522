"""Leaving requests out of an update: what it would have been without them, where its method can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning.pytorch import Trainer

from pipeline.editing.columns import owner
from pipeline.editing.editor import METHODS, restored, weights
from pipeline.editing.locate import LocateThenEdit
from pipeline.editing.update import WeightUpdate
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.options.shared import TrainerOptions
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import fact
from pipeline.running.trainer import Runtime

ROUNDING = 1e-5  # relative: what adding and taking away changes may leave of them


def can_leave_out(update: WeightUpdate, requests: Sequence[EditRequest], method: str) -> bool:
    """Whether the update can be had without these requests: all were located, and so have columns of their own."""
    if not METHODS[method].solves_anew:
        return False
    held = {number for layer in _layers(update) for number in update.state[_owners(layer)].tolist()}
    return all(owner(request) in held for request in requests)


def leave_out(
    llm: LLM,
    update: WeightUpdate,
    requests: Sequence[EditRequest],
    options: EditOptions,
    trainer: TrainerOptions | Trainer | None = None,
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
    method = METHODS[options.method].make(llm, layers, options, update.state)
    assert isinstance(method, LocateThenEdit)
    base = weights(llm, method.weight_names)
    with update.applied(llm), restored(llm, method.weight_names), llm.frozen():
        method.leave_out(requests, Runtime(trainer or TrainerOptions(), seed=seed), left)
        changed = weights(llm, method.weight_names)
    tensors = update.tensors | changed
    for name, tensor in changed.items():
        if (tensor - base[name]).norm() <= ROUNDING * base[name].norm():
            del tensors[name]
    state = update.state | method.state
    return replace(update, method=options.method, tensors=tensors, requests=left, state=state, adapter=None)


def _layers(update: WeightUpdate) -> list[int]:
    """Blocks that the update holds columns for."""
    return [layer for layer in update.layers if _owners(layer) in update.state]


def _owners(layer: int) -> str:
    return f"locate.{layer}.owner_n"

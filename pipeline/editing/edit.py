"""Stage two: edit the golden layer by the method asked for, and return what changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple, Protocol

import torch
from lightning.pytorch.loggers import Logger

from pipeline.attribution import GoldenProfile
from pipeline.editing.finetune import FineTune
from pipeline.editing.locate import LocateThenEdit
from pipeline.editing.update import WeightUpdate
from pipeline.errors import UserError, check_choice
from pipeline.model import LLM
from pipeline.options import EditOptions, TrainerOptions
from pipeline.requests import EditRequest


class EditMethod(Protocol):
    """A kind of edit: made for a model, layers and options, it changes the named weights in place."""

    weight_names: list[str]

    def __init__(self, llm: LLM, layers: Sequence[int], options: EditOptions) -> None: ...

    def run(
        self, requests: Sequence[EditRequest], trainer: TrainerOptions, logger: Logger | bool, seed: int
    ) -> None: ...


class Method(NamedTuple):
    """A kind of edit, and the field of EditOptions that holds its options."""

    make: type[EditMethod]
    options: str


METHODS = {
    "finetune": Method(FineTune, "finetune"),
    "memit": Method(LocateThenEdit, "locate"),
    "emmet": Method(LocateThenEdit, "locate"),
    "rome": Method(LocateThenEdit, "locate"),
    "alphaedit": Method(LocateThenEdit, "locate"),
}


def edit(
    llm: LLM,
    requests: Sequence[EditRequest],
    profile: GoldenProfile | None = None,
    options: EditOptions | None = None,
    trainer: TrainerOptions | None = None,
    logger: Logger | bool = False,
    seed: int = 0,
) -> WeightUpdate:
    """Edit all requests in one batch at the golden layers; the model itself is the base again afterwards.

    Args:
        llm: the base model.
        requests: what to change.
        profile: where to edit, unless `options.layers` says so.
        options: by which method and how.
        trainer: what it runs on.
        logger: where the curves go.
        seed: of the mini-batches' order.

    Raises:
        UserError: for an unknown method or layer, a profile of another model, or a loss that is not a number.
    """
    options, trainer = options or EditOptions(), trainer or TrainerOptions()
    check_choice("method", options.method, METHODS)
    layers = choose_layers(llm, profile, options)
    method = METHODS[options.method].make(llm, layers, options)
    parameters = dict(llm.model.named_parameters())
    base = {name: parameters[name].detach().clone() for name in method.weight_names}
    try:
        with llm.frozen(trainable=method.weight_names):
            method.run(requests, trainer, logger, seed)
        changed = {name: parameters[name].detach().cpu().clone() for name in base}
    finally:
        with torch.no_grad():
            for name, tensor in base.items():
                parameters[name].copy_(tensor)
    return WeightUpdate(
        model=llm.name,
        fingerprint=llm.fingerprint,
        method=options.method,
        layers=layers,
        tensors=changed,
        requests=list(requests),
        options=asdict(getattr(options, METHODS[options.method].options)),
    )


def choose_layers(llm: LLM, profile: GoldenProfile | None, options: EditOptions) -> list[int]:
    """The blocks to edit: the options' where given, else the profile's golden layers."""
    if options.layers:
        llm.check_layers(options.layers)
        return sorted(set(options.layers))
    if profile is None:
        raise UserError("edit: where? give --profile FILE, which `run.py attribute` makes, or --layers N")
    llm.check_made_for("profile", profile.model, profile.fingerprint)
    llm.check_layers(profile.golden_layers)
    return sorted(profile.golden_layers)

"""Stage two: edit the golden layer by the method asked for, and return what changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from pipeline.attribution.profile import GoldenProfile
from pipeline.editing import auto, finetune, locate, lora  # noqa: F401  each registers its own kinds
from pipeline.editing.columns import layers_in, owner, owners_in
from pipeline.editing.method import METHODS, settings_of, weights_below
from pipeline.editing.statistics import give_moments
from pipeline.editing.update import WeightUpdate
from pipeline.errors import UserError
from pipeline.files import digest
from pipeline.model.llm import LLM
from pipeline.model.quantised import make_plain
from pipeline.model.suffix import parts_of
from pipeline.options.editing import EditOptions
from pipeline.options.shared import TrainerOptions
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import check_subjects, fact, settle
from pipeline.running.sharding import whole
from pipeline.running.trainer import Loggers, Runtime

ROUNDING = 1e-5  # relative: what adding and taking away changes may leave of them


def edit(
    llm: LLM,
    requests: Sequence[EditRequest],
    profile: GoldenProfile | None = None,
    options: EditOptions | None = None,
    trainer: TrainerOptions | Trainer | None = None,
    logger: Loggers = False,
    seed: int = 0,
    after: WeightUpdate | None = None,
    work: Path | None = None,
) -> WeightUpdate:
    """Edit all requests in one batch at the golden layers; the model itself is the base again afterwards.

    Args:
        profile: where to edit, unless `options.layers` says so.
        options: by which method and how.
        trainer: what it runs on: a Trainer, or options to make one of for each stage.
        logger: where the curves go: one of Lightning's, or several.
        seed: of the mini-batches' order.
        after: an earlier update to edit on top of; the result holds both.
        work: a folder for work in progress; an edit that finds its own there goes on from it.

    UserError for requests that the method cannot take (see `accept`), an unknown layer, a profile or earlier update
    of another model, or a loss that is not a number.

    Example:
        >>> options = EditOptions(expert={"steps": 10}, statistics=StatisticsOptions(tokens=1024))
        >>> update = edit(llm, requests[:3], profile, options)
        >>> both = edit(llm, requests[3:], profile, options, after=update)
        >>> both.requests == requests
        True
    """
    options = options or EditOptions()
    requests = accept(requests, options)
    layers = ready_layers(llm, profile, options)
    if after:
        after.check_fits(llm)
    earlier = after or WeightUpdate(llm.name, llm.fingerprint, options.method, [], {})
    settings = asdict(settings_of(options))
    make = METHODS[options.method].make
    method = make(llm, layers, options, earlier.state)
    if not (type(method) is locate.LocateThenEdit and {*layers_in(earlier.state)} <= {*method.layers}):
        earlier = _given_way(llm, earlier, requests, options, trainer, seed)  # memit and its kin solve anew for it
        method = make(llm, layers, options, earlier.state)
    anew = {fact(request) for request in requests}
    left = [request for request in earlier.requests if fact(request) not in anew]
    about = (llm.fingerprint, llm.chat, options.method, layers, settings, options.statistics, seed)
    own = work / digest(*about, requests, earlier.requests) if work else None
    runtime = Runtime(trainer or TrainerOptions(), logger, seed, own)
    give_moments(method, llm, options.statistics, runtime)
    with earlier.applied(llm), restored(llm, method.weight_names):
        with llm.frozen():
            method.run(requests, runtime, left)
        changed = weights(llm, method.weight_names)
    return WeightUpdate(
        model=llm.name,
        fingerprint=llm.fingerprint,
        method=options.method,
        layers=sorted({*earlier.layers, *llm.blocks_of(method.weight_names)}),
        tensors={**earlier.tensors, **changed},
        requests=[*left, *requests],
        options=settings,
        state={**earlier.state, **method.state},
        adapter=None if after else method.adapter,  # on top of another one it is a part of the change
        chat=llm.chat,
    )


def _given_way(
    llm: LLM,
    earlier: WeightUpdate,
    requests: Sequence[EditRequest],
    options: EditOptions,
    trainer: TrainerOptions | Trainer | None,
    seed: int,
) -> WeightUpdate:
    """The earlier update without what was located for facts that are taught anew: it would work against that, and
    be left out later as if that went with it.
    """
    replaced = [request for request in requests if owner(request) in owners_in(earlier.state)]
    if not replaced:
        return earlier
    known = METHODS[earlier.method].solves_anew
    how = replace(options, method=earlier.method if known else "memit", expert=earlier.options if known else {})
    return leave_out(llm, earlier, replaced, how, trainer, seed)


def accept(requests: Sequence[EditRequest], options: EditOptions) -> list[EditRequest]:
    """The requests to edit; UserError for none, contradictions, a lacking subject, an unknown method or setting."""
    settings_of(options)
    if not requests:
        raise UserError("requests: none to edit")
    settled = settle(requests, options.last_wins)
    if METHODS[options.method].needs_subject:
        check_subjects(settled, f"edit: {options.method}", instead="finetune")
    return settled


def weights(llm: LLM, names: Sequence[str]) -> dict[str, Tensor]:
    """A copy of weights as they are, whole and on the CPU."""
    return {name: whole(llm.model.get_parameter(name)).cpu().clone() for name in names}


@contextmanager
def restored(llm: LLM, names: Sequence[str]) -> Iterator[None]:
    """The named weights are after the `with` what they were before it, bit for bit."""
    before = {name: llm.model.get_parameter(name).detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                llm.model.get_parameter(name).copy_(tensor)


def blocks_named(profile: GoldenProfile | None, options: EditOptions) -> list[int]:
    """The blocks that options, or else a profile, name for an edit."""
    return options.layers or (profile.golden_layers if profile else [])


def choose_layers(llm: LLM, profile: GoldenProfile | None, options: EditOptions) -> list[int]:
    """The blocks to edit: the options' where given, else the profile's golden layers.

    What locate-then-edit writes at a subject's token reaches later tokens through the blocks above: never the last.
    """
    able = fit_layers(llm, options.method)
    if options.layers:
        llm.check_layers(options.layers)
        if wrong := {*options.layers} - {*able}:
            raise UserError(
                f"layers: {max(wrong)} is a block from which nothing that {options.method} writes at a subject's "
                f"token reaches the answer; give one of {', '.join(map(str, able))}"
            )
        return sorted(set(options.layers))
    if profile is None:
        raise UserError("edit: where? give a profile, which `find_golden_layer` makes, or layers")
    llm.check_made_for("profile", profile.model, profile.fingerprint)
    llm.check_layers(profile.golden_layers)
    fit = [layer for layer in dict.fromkeys([*profile.golden_layers, *profile.ranking]) if layer in able]
    return sorted(fit[: len(profile.golden_layers)])


def fit_layers(llm: LLM, method: str) -> list[int]:
    """The blocks that a method can edit, lowest first."""
    heard = parts_of(llm).heard if METHODS[method].solves_anew else llm.editable
    return sorted({*llm.editable} & {*heard})


def ready_layers(llm: LLM, profile: GoldenProfile | None, options: EditOptions) -> list[int]:
    """The blocks to edit (see `choose_layers`); what the edit wants plain in a quantised model is so afterwards."""
    layers = choose_layers(llm, profile, options)
    make_plain(llm, wanted_plain(llm, layers, options))
    return layers


def wanted_plain(llm: LLM, layers: Sequence[int], options: EditOptions) -> list[str]:
    """The weights that an edit by these options wants plain in a quantised model."""
    method = METHODS[options.method]
    return [*weights_below(llm, layers, options.method), *method.make(llm, layers, options).weight_names]


def can_leave_out(update: WeightUpdate, requests: Sequence[EditRequest], method: str) -> bool:
    """Whether the update can be had without these requests: all were located, and so have columns of their own."""
    return METHODS[method].solves_anew and {owner(request) for request in requests} <= owners_in(update.state)


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
    The update is one that `can_leave_out` these, made with these options. UserError for one of another model.
    """
    gone = {fact(request) for request in requests}
    left = [request for request in update.requests if fact(request) not in gone]
    layers = layers_in(update.state)
    method = METHODS[options.method].make(llm, layers, options, update.state)
    assert isinstance(method, locate.LocateThenEdit)
    base, runtime = weights(llm, method.weight_names), Runtime(trainer or TrainerOptions(), seed=seed)
    give_moments(method, llm, options.statistics, runtime)
    with update.applied(llm), restored(llm, method.weight_names), llm.frozen():
        method.leave_out(requests, runtime, left)
        changed = weights(llm, method.weight_names)
    tensors = update.tensors | changed
    for name, tensor in changed.items():
        if (tensor - base[name]).norm() <= ROUNDING * base[name].norm():
            del tensors[name]
    state = update.state | method.state
    return replace(update, method=options.method, tensors=tensors, requests=left, state=state, adapter=None)

"""Retracting: a fact is edited back, and what it took the place of stays as it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from pipeline.attribution.old_answers import with_old_answers
from pipeline.editing import WeightUpdate, can_leave_out, edit, leave_out
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import KINDS
from pipeline.model import LLM
from pipeline.options import RetractCommand
from pipeline.requests import EditRequest
from pipeline.updates.batch import Outcome
from pipeline.updates.database import transaction
from pipeline.updates.gates import WHOLE, failed
from pipeline.updates.history import find
from pipeline.updates.lineage import mark
from pipeline.updates.prover import Ground, Prover
from pipeline.updates.publish import Change, OvertakenError, publish
from pipeline.updates.store import Store
from pipeline.updates.update import figures_of, golden_profile, ground_of


class Retracted(NamedTuple):
    """What came of it.

    Attributes:
        version: the version without the fact; None when the request was in the queue only.
        outcome: its figures; None likewise.
    """

    version: int | None
    outcome: Outcome | None


def retract(store: Store, options: RetractCommand, load: Callable[[str], LLM]) -> Retracted:
    """Take a request out: out of the queue, or out of the version in force.

    Locate-then-edit leaves it out exactly: the layer is solved for anew without it. Other methods edit its prompt
    back to the old answer.

    Raises:
        UserError: when there is no such request, it is neither in line nor in force, another update is at work, or
            the version without it would miss a gate.
    """
    number, state = find(store, options.request)
    with store.updating():
        with transaction(store.database):
            number, state = find(store, options.request)
            if state == "queued":
                mark(store, number, "retracted")
                return Retracted(None, None)
        if state != "applied":
            raise UserError(f"retract: request {number} is {state}; only one that is queued or applied can go")
        name = options.model or store.model
        llm = load(name)
        store.check_fingerprint(name, llm.fingerprint)
        return _edited_back(store, llm, number, options)


def _edited_back(store: Store, llm: LLM, number: int, options: RetractCommand) -> Retracted:
    ground = ground_of(store, options)
    assert ground.update
    request = next(one for one in ground.update.requests if one.id.partition(":")[0] == str(number))
    prover = Prover(llm, ground, [request], options)
    started = time.perf_counter()
    without = _without(store, llm, ground, request, options)
    seconds = {"edit": time.perf_counter() - started}
    after = prover.measure(without, [0], KINDS)
    gates = after.gates(options.gates, WHOLE)
    if missed := failed(gates):
        raise UserError(f"retract: the version without request {number} would miss a gate: {missed}")
    seconds["evaluation"] = prover.seconds
    outcome = Outcome([], [], without, None, prover.before, after, gates, prover.perplexity, seconds)
    with transaction(store.database) as database:
        batch = database.execute(
            "INSERT INTO batches (started, parent) VALUES (?, ?)", (store.clock(), ground.version)
        ).lastrowid
    assert batch is not None
    metrics = figures_of(outcome, len(without.requests), retracted=1)
    profile = golden_profile(store, llm, [request], options)
    try:
        change = Change(retracted=[number])
        version, _ = publish(store, batch, ground.version, change, [], without, profile, metrics)
    except OvertakenError:
        raise UserError("retract: another version became current meanwhile; nothing was published") from None
    return Retracted(version, outcome)


def _without(store: Store, llm: LLM, ground: Ground, request: EditRequest, options: RetractCommand) -> WeightUpdate:
    assert ground.update
    if can_leave_out(ground.update, [request], options.edit.method):
        return leave_out(llm, ground.update, [request], options.edit, options.one_device, options.seed)
    (answered,) = with_old_answers(llm, [request], options.attribution, options.one_device)
    back = answered.model_copy(update={"new_answer": answered.old_answer, "old_answer": request.new_answer})
    profile = golden_profile(store, llm, [back], options)
    update = edit(llm, [back], profile, options.edit, options.one_device, seed=options.seed, after=ground.update)
    return update

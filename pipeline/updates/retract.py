"""Retracting: a fact is edited back, and what it took the place of stays as it is."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.attribution.old_answers import with_old_answers
from pipeline.editing import WeightUpdate, can_leave_out, edit, leave_out
from pipeline.errors import UserError
from pipeline.evaluation.plan import KINDS
from pipeline.model import LLM
from pipeline.options import RetractCommand
from pipeline.requests import EditRequest
from pipeline.updates.database import transaction
from pipeline.updates.gates import OF_MODEL, missed
from pipeline.updates.history import find
from pipeline.updates.lineage import publish
from pipeline.updates.proving import BatchResult, Trial
from pipeline.updates.queue import number_of
from pipeline.updates.store import Store
from pipeline.updates.update import base_version, golden_profile, load_base


def retract(store: Store, options: RetractCommand, load: Callable[[str], LLM]) -> BatchResult:
    """Take a request out: out of the queue, or out of the version in force.

    Locate-then-edit leaves it out exactly: the layer is solved for anew without it. Other methods edit its prompt
    back to the old answer.

    Returns:
        the version without it and its figures; nothing when the request was in the queue only.

    Raises:
        UserError: when there is no such request, it is neither in line nor in force, another update is at work, or
            the version without it would miss a gate.
    """
    find(store, options.request)  # a wrong name is refused before the lock is waited for
    with store.updating():
        with transaction(store.database):
            number, state = find(store, options.request)
            if state == "queued":
                store.set_state(number, "retracted")
                return BatchResult()
        if state != "applied":
            raise UserError(f"retract: request {number} is {state}; only one that is queued or applied can go")
        return _edit_back(store, load_base(store, options, load), number, options)


def _edit_back(store: Store, llm: LLM, number: int, options: RetractCommand) -> BatchResult:
    base = base_version(store)
    assert base.update
    request = next(one for one in base.update.requests if number_of(one) == number)
    trial = Trial(llm, base, [request], options)
    with trial.timed("edit"):
        without = _without(store, llm, base.update, request, options)
    after = trial.measure(without, [0], KINDS)
    gates = after.gates(options.gates, OF_MODEL)
    if problem := missed(gates):
        raise UserError(f"retract: the version without request {number} would miss a gate: {problem}")
    result = BatchResult(update=without, before=trial.before, after=after, gates=gates, seconds=trial.seconds)
    profile = golden_profile(store, llm, [request], options)
    with transaction(store.database):
        batch = store.open_batch(base.number)
    publish(store, batch, base.number, result, profile, retracted=[number])
    if result.overtaken:
        raise UserError("retract: another version became current meanwhile; nothing was published")
    return result


def _without(
    store: Store, llm: LLM, held: WeightUpdate, request: EditRequest, options: RetractCommand
) -> WeightUpdate:
    """The version in force without a request."""
    if can_leave_out(llm, held, [request], options.edit.method):
        return leave_out(llm, held, [request], options.edit, options.one_device, options.seed)
    (answered,) = with_old_answers(llm, [request], options.attribution, options.one_device)
    back = answered.model_copy(update={"new_answer": answered.old_answer, "old_answer": request.new_answer})
    profile = golden_profile(store, llm, [back], options)
    return edit(llm, [back], profile, options.edit, options.one_device, seed=options.seed, after=held)

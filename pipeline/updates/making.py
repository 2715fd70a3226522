"""Making versions: what is due is edited on top of the version in force, proved, and published or held back.

A retraction makes one as well: its fact is edited back, and what it took the place of stays as it is. Where a new
store edits is found with its first requests; a choice that these leave open is settled by trial edits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pipeline.attribution.find import find_golden_layer
from pipeline.attribution.profile import STEADY, GoldenProfile
from pipeline.editing.editor import can_leave_out, edit, leave_out, ready_layers
from pipeline.errors import UserError, one_line
from pipeline.evaluation.plan import KINDS
from pipeline.model.generation import with_old_answers
from pipeline.model.llm import LLM
from pipeline.options.shared import NF4
from pipeline.options.updates import ProvingOptions, RetractCommand, UpdateCommand
from pipeline.requests.schema import EditRequest
from pipeline.running.processes import in_first, on_first
from pipeline.running.trainer import Runtime
from pipeline.shipped import program
from pipeline.study.race import RACE, race, seeding
from pipeline.updates.disk import BASE, transaction
from pipeline.updates.history import find, load_version
from pipeline.updates.lineage import hold_back, publish
from pipeline.updates.proving import OF_MODEL, BatchResult, Trial, missed, split_by_fit
from pipeline.updates.queue import number_of, peek, take
from pipeline.updates.store import Store

PROXY = 128  # requests that find the golden layer, at most
TAUGHT = 16  # requests that settle it where scores do not, at most
ENOUGH = 4  # requests that a doubt needs


def update(
    store: Store,
    options: UpdateCommand,
    load: Callable[[str], LLM],
    report: Callable[[BatchResult], Any] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> list[BatchResult]:
    """Work through everything that is due, a version a batch.

    Of several processes the first alone has the store, and the others None in its place; all edit and measure.

    `load` loads the base model by its name, once something is due; `report` is called with what came of each batch,
    and `stopping` asked before each.
    BusyError when another update is at work on the store; UserError when a batch could not be worked through, whose
    requests are in the queue again.
    """
    results = list[BatchResult]()
    if options.dry_run:
        if requests := on_first(lambda: peek(store, options.batch)):
            results.append(_edit_and_prove(store, load_base(store, load, options.model), requests, options))
            report(results[0])
        return results
    llm = None
    with in_first(lambda: store.updating()):
        while not on_first(stopping):
            requests, superseded = on_first(lambda: take(store, options.batch))
            if not requests:
                break
            try:
                llm = llm or load_base(store, load, options.model)
                result = _edit_and_prove(store, llm, requests, options)
                on_first(partial(_keep, store, result))
            except BaseException as error:
                if store:
                    with transaction(store.database):
                        store.give_back(one_line(error) or type(error).__name__)
                raise
            result.superseded = superseded + result.superseded
            results.append(result)
            report(result)
    return results


def _keep(store: Store, result: BatchResult) -> None:
    """Publish what came of a batch, or hold all of it back."""
    if result.update:
        publish(store, result)
    else:
        with transaction(store.database):
            hold_back(store, result.held)


def load_base(store: Store, load: Callable[[str], LLM], name: str | None = None) -> LLM:
    """Load the base model, by the store's name for it or another; UserError when it is not the store's."""
    known = on_first(lambda: store.base_name(name))
    llm = load(known)
    on_first(lambda: store.check_base(known, llm.fingerprint))
    return llm


def _edit_and_prove(store: Store, llm: LLM, batch: Sequence[EditRequest], options: ProvingOptions) -> BatchResult:
    # the version in force, its update, and whether the store has no other than the base model
    parent, base, is_new = on_first(
        lambda: (store.current, load_version(store, store.current), store.newest == BASE)
    )
    fitting, held = split_by_fit(llm, batch, options)
    if not fitting:
        return BatchResult(parent, held=held)
    profile, notes = _golden_profile(store, llm, fitting, options)
    result = Trial(llm, parent, base, fitting, options).edit_and_prove(profile)
    if not is_new and not options.edit.layers:  # others chose the layer
        notes += questioned(profile, len(result.held), len(fitting))
    result.held, result.notes = held + result.held, notes
    return result


def retract(store: Store, options: RetractCommand, load: Callable[[str], LLM]) -> BatchResult:
    """Take a request out: out of the queue, or out of the version in force.

    Locate-then-edit leaves it out exactly: the layer is solved for anew without it. Other methods edit its prompt
    back to the old answer. What is given is empty when the request was in the queue only.

    UserError when there is no such request, it is neither in line nor in force, another update is at work, or the
    version without it would miss a gate.
    """
    with store.updating():
        with transaction(store.database):
            number, state = find(store, options.request)
            if state == "queued":
                store.set_state(number, "retracted")
                return BatchResult()
        if state != "applied":
            raise UserError(f"retract: request #{number} is {state}; only one that is queued or applied can go")
        return _edit_back(store, load_base(store, load, options.model), number, options)


def _edit_back(store: Store, llm: LLM, number: int, options: RetractCommand) -> BatchResult:
    """The version in force without a request, published."""
    parent = store.current
    base = load_version(store, parent)
    assert base
    request = next(one for one in base.requests if number_of(one) == number)
    trial = Trial(llm, parent, base, [request], options)
    profile, _ = _golden_profile(store, llm, [request], options)
    with trial.timed("edit"):
        if can_leave_out(base, [request], options.edit.method):
            without = leave_out(llm, base, [request], options.edit, options.trainer, options.seed)
        else:
            (answered,) = with_old_answers(llm, [request], Runtime(options.trainer))
            back = answered.model_copy(update={"new_answer": answered.old_answer, "old_answer": request.new_answer})
            without = edit(llm, [back], profile, options.edit, options.trainer, seed=options.seed, after=base)
    result = BatchResult(parent, base, update=without, before=trial.before, seconds=trial.seconds)
    result.profile = profile
    result.after = replace(trial.measure(without, [0], KINDS), missed=[])  # it is to be gone
    result.gates = result.after.gates(options.gates, OF_MODEL)
    if problem := missed(result.gates):
        raise UserError(f"retract: the version without request #{number} would miss a gate: {problem}")
    publish(store, result, retracted=[number])
    return result


def _golden_profile(
    store: Store, llm: LLM, requests: Sequence[EditRequest], options: ProvingOptions
) -> tuple[GoldenProfile, list[str]]:
    """Where to edit: the profile of the options, else the store's, else one found with these requests, and settled
    by trial edits where they leave it unclear; and what is to be said of that.
    """
    notes: list[str] = []
    named = getattr(options, "profile", None)
    profile = on_first(lambda: GoldenProfile.load(at) if (at := named or store.check_profile()) else None)
    if profile is None:
        answered = [request for request in requests if request.old_answer] or list(requests)
        how, trainer = options.attribution, options.trainer
        profile = find_golden_layer(llm, answered[:PROXY], seeding(how), trainer, "the queue")
        is_steady = profile.stability is None or profile.stability.chosen[profile.golden_layers[0]] >= STEADY
        settled = options.edit.layers or (is_steady and how.method != RACE)
        if not settled and trainer.precision != NF4:
            profile = race(llm, profile, requests[:TAUGHT], options.edit, Runtime(trainer, seed=options.seed))
            notes.append(f"scores left the golden layer open; trial edits: {profile.certainty}")
    ready_layers(llm, profile, options.edit)
    return profile, notes


def questioned(profile: GoldenProfile, missed: int, tried: int) -> list[str]:
    """A line that doubts the golden layer and says what to do, where most of a batch misses a gate; else none."""
    if tried < ENOUGH or 2 * missed <= tried:
        return []
    return [
        f"{missed} of {tried} requests miss a gate; block {profile.golden_layers[0]}, which earlier ones chose, "
        f"may be the wrong one for these, or full: `{program()} attribute` on these finds theirs, `submit --again` "
        "queues them anew, and `update --profile` edits there from then on"
    ]

"""The update: take what is due, edit it on top of the version in force, prove it, publish it or hold it back."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.attribution import GoldenProfile, find_golden_layer
from pipeline.attribution.profile import PROFILE_FILE
from pipeline.editing import choose_layers
from pipeline.model import LLM
from pipeline.options import ProvingOptions, UpdateCommand
from pipeline.requests import EditRequest
from pipeline.updates.batch import Outcome, work_through
from pipeline.updates.database import transaction
from pipeline.updates.lineage import check_number
from pipeline.updates.prover import Ground
from pipeline.updates.publish import Change, OvertakenError, hold_back, publish
from pipeline.updates.queue import Contradiction, peek, take
from pipeline.updates.store import Store
from pipeline.updates.versions import load_version

PROXY = 128  # requests that find the golden layer, at most


class Worked(NamedTuple):
    """A batch that was worked through.

    Attributes:
        version: what was published; None when nothing was.
        outcome: what came of it.
        superseded: which requests gave way to newer ones.
        overtaken: whether another version became current meanwhile, so that nothing was published.
    """

    version: int | None
    outcome: Outcome
    superseded: list[Contradiction]
    overtaken: bool = False


def update(
    store: Store,
    options: UpdateCommand,
    load: Callable[[str], LLM],
    told: Callable[[Worked], Any] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> list[Worked]:
    """Work through everything that is due, a version a batch.

    Args:
        store: the store.
        options: how.
        load: loads the base model by its name; not called when nothing is due.
        told: called after each batch.
        stopping: asked before each batch.

    Raises:
        BusyError: when another update is at work on the store.
        UserError: when a batch could not be worked through; its requests are in the queue again.
    """
    if not store.about("fingerprint"):
        store.check_model(options.model)
    if options.dry_run:
        return _rehearse(store, options, load, told)
    worked: list[Worked] = []
    with store.updating():
        llm = None
        while not stopping() and (taken := take(store, options.batch)):
            try:
                llm = llm or _loaded(store, options, load)
                ground = ground_of(store, options)
                where = partial(golden_profile, store, llm, options=options)
                outcome = work_through(llm, ground, taken.requests, where, options)
                version, superseded = _finish(store, taken.batch, ground, outcome, options)
            except OvertakenError:
                _give_back(store, taken.batch, "another version became current meanwhile")
                worked.append(Worked(None, outcome, taken.superseded, overtaken=True))
                told(worked[-1])
                break
            except BaseException as error:
                _give_back(store, taken.batch, " ".join(str(error).split()) or type(error).__name__)
                raise
            worked.append(Worked(version, outcome, [*taken.superseded, *superseded]))
            told(worked[-1])
    return worked


def _loaded(store: Store, options: ProvingOptions, load: Callable[[str], LLM]) -> LLM:
    name = options.model or store.model
    llm = load(name)
    store.check_fingerprint(name, llm.fingerprint)
    return llm


def _rehearse(
    store: Store, options: UpdateCommand, load: Callable[[str], LLM], told: Callable[[Worked], Any]
) -> list[Worked]:
    """The next batch as it would be, without a change to the store."""
    batch = peek(store, options.batch)
    if not batch:
        return []
    llm = _loaded(store, options, load)
    where = partial(golden_profile, store, llm, options=options, keep=False)
    worked = Worked(None, work_through(llm, ground_of(store, options), batch, where, options), [])
    told(worked)
    return [worked]


def _give_back(store: Store, batch: int, why: str) -> None:
    with transaction(store.database):
        store.give_back(batch, why)


def ground_of(store: Store, options: ProvingOptions) -> Ground:
    """What candidates stand on: the version in force, its files checked."""
    version = store.current
    update = load_version(store.folder, version, check_number(store, version))
    return Ground(version, update, store.about(_perplexity_name(options)))


def _perplexity_name(options: ProvingOptions) -> str:
    """What the store knows the base's perplexity by: it is that of one text."""
    file = options.evaluation.text
    text = Path(file).read_bytes() if file and Path(file).is_file() else b""
    return f"perplexity {hashlib.sha256(text).hexdigest()[:16]}"


def golden_profile(
    store: Store, llm: LLM, requests: Sequence[EditRequest], options: ProvingOptions, keep: bool = True
) -> GoldenProfile:
    """Where to edit: the profile of the options, else the store's, else one found with these requests, and kept.

    Raises:
        UserError: when it is another model's.
    """
    given = getattr(options, "profile", None)
    if given or (store.folder / PROFILE_FILE).is_file():
        profile = GoldenProfile.load(given or store.folder)
    else:
        answered = [request for request in requests if request.old_answer] or list(requests)
        profile = find_golden_layer(llm, answered[:PROXY], options.attribution, options.one_device, "the queue")
    choose_layers(llm, profile, options.edit)
    if keep:
        profile.save(store.folder)
    return profile


def _finish(
    store: Store,
    batch: int,
    ground: Ground,
    outcome: Outcome,
    options: ProvingOptions,
) -> tuple[int | None, list[Contradiction]]:
    """Publish what was accepted; hold back the rest."""
    if outcome.perplexity:
        store.set_about(_perplexity_name(options), outcome.perplexity)
    if outcome.update is None or not outcome.applied:
        hold_back(store, batch, outcome.held)
        return None, []
    change = Change(applied=[one.number for one in outcome.applied])
    metrics = figures_of(outcome, len(outcome.update.requests))
    return publish(store, batch, ground.version, change, outcome.held, outcome.update, outcome.profile, metrics)


def figures_of(outcome: Outcome, facts: int, retracted: int = 0) -> dict[str, Any]:
    """A version's metrics.json."""
    assert outcome.update and outcome.before and outcome.after
    return {
        "made": time.time(),
        "method": outcome.update.method,
        "layers": outcome.update.layers,
        "applied": len(outcome.applied),
        "held_back": len(outcome.held),
        "retracted": retracted,
        "facts": facts,
        "before": outcome.before.as_json(),
        "after": outcome.after.as_json(),
        "gates": [
            {"name": g.name, "value": g.value, "bound": g.bound, "least": g.least, "passed": g.passed}
            for g in outcome.gates
        ],
        "seconds": outcome.seconds,
    }

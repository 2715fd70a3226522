"""The commands that work on a store of knowledge updates, and what they say in the terminal."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from pipeline.attribution.find import check_selector
from pipeline.attribution.profile import GoldenProfile
from pipeline.editing.method import METHODS, settings_of
from pipeline.errors import UserError, check_choice
from pipeline.evaluation.metrics import Estimate
from pipeline.files import read_plain_text
from pipeline.model.llm import LLM
from pipeline.options import updates as of
from pipeline.options.base import as_config
from pipeline.reporting.dashboards import show_on_board
from pipeline.reporting.tables import not_measured
from pipeline.reporting.terminal import say, show_missed, show_sides
from pipeline.requests.readers import good_requests, read_requests
from pipeline.running.launch import beside
from pipeline.running.processes import in_first, on_first, world_size
from pipeline.serving import publish as serving
from pipeline.shipped import program
from pipeline.stages import load, prepare
from pipeline.updates import history as past
from pipeline.updates import lineage, making, queue
from pipeline.updates.disk import read_metrics, version_folder
from pipeline.updates.proving import BatchResult
from pipeline.updates.schedule import LOOKING, Stopping, run_schedule, trigger
from pipeline.updates.store import BusyError, Store


def submit(options: of.SubmitCommand) -> None:
    """A file's requests go into the queue; a file that is refused makes no store."""
    if not Path(options.store).exists():
        for _ in good_requests(read_requests(options.file, fields=options.fields)):
            pass
    with Store(options.store, options.model, make=True) as store:
        store.check_model(options.model)
        not_before = of.date("not_before", options.not_before) if options.not_before else 0.0
        done = queue.submit(store, options.file, options.source, not_before, options.again, options.fields)
        parts = [f"{done.queued} new"]
        parts += [f"{done.again} queued anew"] if done.again else []
        parts += [f"{done.known} known already"] if done.known else []
        say(f"{', '.join(parts)}; in the queue of {store.folder}: {past.counts(store).get('queued', 0)}")
        if done.left:
            say(f"{done.left} of the known ones are held back, superseded or retracted; --again queues them anew")
        _show_facts(store, range(done.first, done.first + min(done.queued, past.NAMED)), "+")
        if done.queued > past.NAMED:
            say(f"  and {done.queued - past.NAMED} more, to request #{done.first + done.queued - 1}")
        _show_superseded(store, done.superseded)


def _show_superseded(store: Store, pairs: Sequence[queue.Contradiction]) -> None:
    for older, newer in pairs[: past.NAMED]:
        old, new = past.request_row(store, older), past.request_row(store, newer)
        say(
            f"  contradiction: request #{older} ({old['new_answer']!r}) is superseded by #{newer} "
            f"({new['new_answer']!r}): {new['prompt']}"
        )
    if len(pairs) > past.NAMED:
        say(f"  and {len(pairs) - past.NAMED} more contradictions")


def update(options: of.UpdateCommand) -> None:
    """Work through what is due, once."""
    _prepare(options)
    _update(options, Stopping(), cache(partial(load, options)))


def schedule(options: of.ScheduleCommand) -> None:
    """Work through what is due whenever it is time, until a signal ends it."""
    _prepare(options)
    when, stopping = trigger(options.cron, options.every), Stopping()
    with stopping.listening():
        with in_first(lambda: Store(options.store, options.model, make=True)):  # what is wrong with it is said now
            pass
        work = partial(_update, options, stopping, cache(partial(load, options)))
        run_schedule(work, when, say, stopping, at_once=options.every is not None)


def _update(options: of.UpdateCommand, stopping: Stopping, loaded: Callable[[str], LLM]) -> None:
    dry = options.dry_run
    opening = partial(Store, options.store, options.model, make=not dry, reading=dry)
    with in_first(opening) as store, stopping.listening():
        report = partial(_show_batch, store, dry_run=dry)
        try:
            worked = making.update(store, options, loaded, report, stopping.is_set)
        except BusyError as busy:  # no failure: what is due is in good hands
            say(f"{busy}; nothing to do here")
            return
        finally:
            if store and not dry:
                show_on_board(store)
        if store and not worked:
            say(f"nothing is due in {store.folder}; {past.counts(store).get('queued', 0)} waiting for their date")
        if options.publish.to and not dry:
            if world_size() > 1:
                _publish_beside(options)
            else:
                _publish(store, None, options.publish, options.gates, loaded, options.model)


def publish(options: of.PublishCommand) -> None:
    """Let servers answer with a version, by default the one in force."""
    prepare(options)
    with Store(options.store) as store:
        _publish(store, options.version, options, options.gates, partial(load, options), options.model)


def _publish(
    store: Store, version: int | None, options: of.PublishOptions, gates: of.GateOptions,
    loaded: Callable[[str], LLM], model: str | None,
) -> None:  # fmt: skip
    number, changed = serving.publish(store, version, options, gates, loaded, model)
    for one in changed:
        say(f"{one.url}: version {number} answers as {one.model}, switched in {one.switching:.3f} s")
        if one.proof:
            figures = ", ".join(f"{name} {value:.3f}" for name, value in one.proof.figures.items())
            took = f"loaded in {one.proof.loading:.2f} s, asked in {one.proof.proving:.1f} s"
            say(f"  as served: {figures or 'nothing was asked'}; {took}")
    if len(changed) < len(options.to):
        say(f"{len(options.to) - len(changed)} of {len(options.to)} servers had version {number} in force already")


def _publish_beside(options: of.UpdateCommand) -> None:
    """Publish in a process of its own, which may be silent for longer; UserError when it fails, as it told."""
    given = {one.name: getattr(options.publish, one.name) for one in fields(options.publish)}
    wanted = of.PublishCommand(store=options.store, model=options.model, gates=options.gates, **given)
    started: list[subprocess.Popen[bytes]] = []
    with TemporaryDirectory() as folder:
        config = Path(folder) / "publish.yaml"
        config.write_text(yaml.safe_dump(as_config(wanted)), encoding="utf-8")
        on_first(lambda: started.append(beside(["publish", "--config", str(config)])))
        while on_first(lambda: started[0].poll() is None):
            time.sleep(LOOKING)
        if on_first(lambda: started[0].returncode):
            raise UserError("publish: failed, as said above; the store has its version")


def _show_batch(store: Store, done: BatchResult, dry_run: bool) -> None:
    head = f"version {done.version}" if done.version is not None else "nothing published"
    if dry_run:
        head = "dry run, nothing changed"
    for note in done.notes:
        say(f"note: {note}")
    say(f"{head}: {len(done.applied)} applied, {len(done.held)} held back")
    if done.gates:
        say(f"  gates: {', '.join(map(str, done.gates))}")
    if done.after:
        show_missed([(f"request #{number}", asked, says) for number, asked, says in done.after.missed])
        if missing := not_measured(done.after.metrics):
            say(missing)
    for number, reason in done.held[: past.NAMED]:
        say(f"  held back: request #{number}: {reason}")
    if store:  # of several processes the first has it
        _show_superseded(store, done.superseded)


def history(options: of.HistoryCommand) -> None:
    """The latest versions and events, or one request's story."""
    with Store(options.store, reading=True) as store:
        if options.request is not None:
            number, state = past.find(store, options.request)
            events = past.story(store, number)
            say(f"{state}: request {past.spelt(store, number)}")
        else:
            events = past.events(store, options.limit)
            states = ", ".join(f"{count} {state}" for state, count in sorted(past.counts(store).items())) or "none"
            say(f"store of {store.model}; requests: {states}")
            for row in past.versions(store, options.limit):
                mark = "*" if row["number"] == store.current else " "
                on = "the base model" if row["parent"] is None else f"on {row['parent']}"
                figures = f"{row['applied']} applied, {row['held_back']} held back{', pruned' * row['pruned']}"
                say(f"{mark} {row['number']:04d}  {row['made']}  {on}, {figures}")
        for at, what in events:
            say(f"  {at}  {what}")


def show(options: of.ShowCommand) -> None:
    """A version's figures, gates and facts."""
    with Store(options.store, reading=True) as store:
        version, held = options.version, lineage.in_force(store, options.version)
        current = ", the current one" if version == store.current else ""
        say(f"version {version}{current}: {len(held)} facts; {version_folder(store.folder, version)}")
        if version and not past.check_there(store, version, pruned=True):
            say("  pruned: its files and figures are gone")
        elif version:
            figures = read_metrics(store.folder, version)
            after, layers = figures["after"], ", ".join(map(str, figures["layers"]))
            say(
                f"  {figures['method']} in block {layers}; perplexity x {after['perplexity_ratio']:.3f}, drift "
                f"{after['drift']:.3f}; gates: {', '.join(gate['text'] for gate in figures['gates']) or 'none'}"
            )
            found = {side: figures[side]["metrics"].items() for side in ("before", "after")}
            show_sides({side: {name: Estimate(**one) for name, one in some} for side, some in found.items()})
            show_missed([(f"request #{number}", *rest) for number, *rest in after.get("missed", [])])
        _show_facts(store, sorted(held), " ")


def _show_facts(store: Store, numbers: Sequence[int], mark: str) -> None:
    for number in numbers:
        say(f"{mark} {past.spelt(store, number)}")


def diff(options: of.DiffCommand) -> None:
    """What one version says and another does not."""
    with Store(options.store, reading=True) as store:
        gained, lost = lineage.difference(store, options.older, options.newer)
        say(f"from version {options.older} to {options.newer}: {len(gained)} facts gained, {len(lost)} lost")
        _show_facts(store, gained, "+")
        _show_facts(store, lost, "-")


def rollback(options: of.RollbackCommand) -> None:
    """Another version becomes the current one; what that loses is held back."""
    with Store(options.store) as store:
        before = store.current
        gained, lost = lineage.rollback(store, options.version)
        say(f"version {options.version} is current, after {before}: {len(lost)} facts less, {len(gained)} more")
        if lost:
            say(f"the former are held back; `{program()} submit FILE --again` queues them anew")


def prune(options: of.PruneCommand) -> None:
    """The files of old versions go."""
    with Store(options.store) as store:
        show_on_board(store)
        older = of.seconds("older_than", options.older_than) if options.older_than else 0.0
        gone = lineage.prune(store, options.keep, older)
        say(f"{len(gone)} versions pruned; what they changed stays in `{program()} history`")


def verify(options: of.VerifyCommand) -> None:
    """Every version, one after another; raises UserError when any is damaged."""
    prepare(options)
    with Store(options.store, reading=True) as store:
        wrong = 0
        for number, problem in past.verify(store):
            say(f"version {number}: {problem or 'as it was written, and loads'}")
            wrong += bool(problem)
        if wrong:
            raise UserError(f"store: {store.folder}: {wrong} versions are damaged, as listed")


def retract(options: of.RetractCommand) -> None:
    """A request that waits leaves the queue; one that is applied is edited back."""
    _prepare(options)
    with Store(options.store) as store:
        number, state = past.find(store, options.request)
        say(f"to retract, {state}: request {past.spelt(store, number)}")
        done = making.retract(store, options, partial(load, options))
        if done.version is None:
            say("retracted; it was in the queue only")
            return
        show_on_board(store)
        assert done.before and done.after
        sides = [side.metrics["rewrite"].mean for side in (done.before, done.after)]
        say(f"version {done.version}: retracted; its new answer: {sides[0]:.3f} -> {sides[1]:.3f}")


def _prepare(options: of.ProvingOptions) -> None:
    """See that the options name what there is, before anything is done; UserError for what does not exist."""
    prepare(options)
    check_choice("edit.method", options.edit.method, METHODS)
    settings_of(options.edit)
    check_selector([], options.attribution)
    if profile := getattr(options, "profile", None):
        GoldenProfile.load(profile)
    for flag, text in (("edit.statistics", options.edit.statistics.text), ("evaluation", options.evaluation.text)):
        if text:
            read_plain_text(f"{flag}.text", text)

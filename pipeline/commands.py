"""A function a command: thin, so that what a command does can be done from Python as well."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import demo as guided
from pipeline.attribution.find import check_selector
from pipeline.attribution.profile import GoldenProfile
from pipeline.chat import talk
from pipeline.editing.editor import accept, blocks_named, choose_layers
from pipeline.editing.export import AdapterInfo, export_adapter, export_merged
from pipeline.editing.gguf_export import MODEL, export_gguf, export_gguf_adapter
from pipeline.editing.method import settings_of
from pipeline.editing.update import WeightUpdate
from pipeline.errors import UserError, note
from pipeline.evaluation.evaluator import evaluate as measure
from pipeline.evaluation.survival import ask_facts, survival
from pipeline.files import write_json
from pipeline.model.generation import generate as answer
from pipeline.model.llm import LLM
from pipeline.model.loading import load_model
from pipeline.options import commands as of
from pipeline.options.editing import EditOptions
from pipeline.options.serving import ServeCommand
from pipeline.planning.plan import plan_memory
from pipeline.reporting.card import write_card
from pipeline.reporting.tables import missed_of
from pipeline.reporting.terminal import say, show_answers, show_missed, show_plan, show_tokens
from pipeline.requests.readers import load_facts, load_requests
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import split_by_subject
from pipeline.serving.hub import check_target, push
from pipeline.serving.live import LiveModel
from pipeline.shipped import program
from pipeline.stages import edit_and_prove, find_and_keep, load, prepare, read_requests, working
from pipeline.study.race import RACE, seeding
from pipeline.study.study import check_study, parted, run_study
from pipeline.study.sweep import RESULTS
from pipeline.updates.disk import version_folder
from pipeline.updates.history import load_version
from pipeline.updates.making import load_base
from pipeline.updates.schedule import Stopping
from pipeline.updates.store import Store

KEY = "GOLDEN_LAYERS_API_KEY"  # the environment's variable that holds what clients of `serve` must show
FOLLOWING = 0.5  # seconds between looks at a store's current version
STUDY_MAY_CHANGE = ("requests", "limit", "proxy", "offset", "methods", "selectors", "every", "skip_bad", "fields")


def run(options: of.RunCommand) -> None:
    """All stages, on the two parts of the requests; with a profile the last two, on all of them."""
    seeds = seeding(options.attribution)
    check_selector([], seeds)
    settings_of(options.edit)
    with working(options, "run") as log:
        requests = read_requests(options)
        profile = GoldenProfile.load(options.profile) if options.profile else None
        proxy, edits = list[EditRequest](), requests
        if not profile:
            proxy, edits = split_by_subject(requests, options.proxy_fraction, options.seed)
            check_selector(proxy, seeds)
        edits = accept(edits, options.edit)
        llm = load(options, requests=requests, layers=blocks_named(profile, options.edit), profile=profile)
        if profile:
            choose_layers(llm, profile, options.edit)
            log.keep_profile(profile)
        else:
            llm.check_layers(options.edit.layers or [])
            profile = find_and_keep(log, llm, proxy, options.attribution, options.edit, options)
        edit_and_prove(log, llm, edits, profile, options.edit, options)


def demo(options: of.DemoCommand) -> None:
    """The guided run."""
    with working(options, "demo") as log:
        guided.show(load(options), options, log)


def attribute(options: of.AttributeCommand) -> None:
    """Stage one alone."""
    seeds, how = seeding(options), EditOptions(method=options.trial or EditOptions.method, last_wins=True)
    check_selector([], seeds)
    with working(options, "attribute") as log:
        requests = read_requests(options)
        check_selector(requests, seeds)
        if options.method == RACE:
            accept(requests, how)
        find_and_keep(log, load(options, requests=requests), requests, options, how, options)


def edit(options: of.EditCommand) -> None:
    """Stages two and three, by a profile or at blocks that are named."""
    settings_of(options)
    with working(options, "edit") as log:
        after = WeightUpdate.load(options.after) if options.after else None
        if options.fact:
            requests = load_facts(options.fact)[options.offset :][: options.limit]
        elif after and options.after and options.requests == "missed":
            requests = missed_of(after.requests, Path(options.after))[options.offset :][: options.limit]
        else:
            requests = read_requests(options)
        requests = accept(requests, options)
        profile = GoldenProfile.load(options.profile) if options.profile else None
        if profile is None and not options.layers:
            raise UserError(f"edit: where? give --profile FILE, which `{program()} attribute` makes, or --layers N")
        llm = load(options, requests=requests, layers=blocks_named(profile, options), profile=profile, update=after)
        choose_layers(llm, profile, options)
        edit_and_prove(log, llm, requests, profile, options, options, after)


def evaluate(options: of.EvaluateCommand) -> None:
    """Stage three alone; with `--explain` only what the model is given for the first requests."""
    if options.explain:
        prepare(options)
        requests = read_requests(options)[: options.explain]
        llm = load(options)
        for request in requests:
            show_tokens(request, llm.explain(request))
        return
    with working(options, "evaluate") as log:
        requests = read_requests(options)
        update = WeightUpdate.load(options.update, to_serve=True) if options.update else None
        llm = load(options, requests=requests, update=update)
        measured = measure(llm, requests, update, options, options.trainer, log.work)
        log.keep_metrics(llm.name, requests, measured, update, made=False)


def export(options: of.ExportCommand) -> None:
    """An update, of a folder or a store, in a form that others load, with a model card; and maybe to the hub."""
    if options.push:
        check_target(options.push)
    with working(options, "export") as log:
        update, model, number = _named(options)
        made = Path(options.update or version_folder(Path(options.store or ""), number or 0))
        llm = load(options, model, update=update)
        update = update or WeightUpdate(llm.name, llm.fingerprint, "none", [], {})
        held = _EXPORTS[options.kind](llm, update, log.folder, options)
        said = f"Quantised to {options.quantise} after the figures were measured" if options.quantise else ""
        if options.quantise and update.requests:
            with update.applied(llm):
                before = ask_facts(llm, update, "Before quantising")
            del llm  # beside what is read again, it would take twice the memory
            again = load_model(log.folder / MODEL, verbose=options.verbose)
            line, lost = survival(update, before, ask_facts(again, update, "Quantised"))
            say(line)
            show_missed(lost)
            said += f"; {line}"
        write_card(update, log.folder, options.kind, made / "metrics.json", number, held, said)
    if options.push:
        branch = "main" if number is None else f"golden-{number:04d}"
        say(f"pushed to {push(log.folder, options.push, branch)}")


_EXPORTS: dict[str, Callable[[LLM, WeightUpdate, Path, of.ExportCommand], AdapterInfo | None]] = {
    "merged": lambda llm, update, folder, _: export_merged(llm, update, folder),
    "update": lambda _llm, update, folder, _: update.save(folder),
    "gguf": lambda llm, update, folder, options: export_gguf(llm, update, folder, options.quantise),
    "adapter": lambda llm, update, folder, options: export_adapter(llm, update, folder, options.rank),
    "gguf-adapter": lambda llm, update, folder, options: export_gguf_adapter(llm, update, folder, options.rank),
}


def generate(options: of.GenerateCommand) -> None:
    """Answers of the base model beside those of an update's, or of a store's current version."""
    prepare(options)
    update = WeightUpdate.load(options.update, to_serve=True) if options.update else None
    prompts = options.prompt or [request.prompt for request in read_requests(options)]
    if options.store:
        _generate_live(prompts, options)
        return
    llm = load(options, update=update)
    how: Any = {"max_new_tokens": options.max_new_tokens, "trainer": options.trainer}
    answers = {"base": answer(llm, prompts, title="Base model", **how)}
    if update:
        with update.applied(llm):
            answers["edited"] = answer(llm, prompts, title="Edited model", **how)
    show_answers(prompts, answers)


def chat(options: of.ChatCommand) -> None:
    """A talk with the model, and what an update or a version of a store makes of it."""
    prepare(options)
    update, model, _ = _named(options)
    talk(load(options, model, update=update), update, options)


def study(options: of.StudyCommand) -> None:
    """The study of every set of requests; one in the output folder goes on where that is asked for."""
    with working(options, "study", STUDY_MAY_CHANGE) as log:
        sets = []
        for file in options.requests:
            most = options.limit + 4 * options.proxy  # some are about subjects that are tried
            read = load_requests(file, most, options.offset, options.skip_bad, options.fields)
            name = re.sub(r"[^\w.-]+", "_", file if file.startswith("hf:") else Path(file).stem)  # fit for a file's
            sets.append(parted(name, read, options))
        check_study(sets, options)
        log.going_on(RESULTS)
        log.keep_study(run_study(load(options), sets, options, log.folder, log.work))


def plan(options: of.PlanCommand) -> None:
    """The plan, shown and, where a folder is named, kept."""
    prepare(options)
    planned = plan_memory(options)
    show_plan(planned)
    if options.output:
        with working(options, "plan") as log:
            write_json(log.folder / "plan.json", asdict(planned))


def serve(options: ServeCommand) -> None:
    """A store's versions over HTTP, until a signal ends it; what was asked by then is answered."""
    from pipeline.serving.app import listen, serving  # which need an extra

    listen(options.host, options.port).close()  # what is wrong with it is said before the model is loaded
    prepare(options)
    key = os.environ.get(KEY, "")
    if not key and options.host not in ("127.0.0.1", "localhost", "::1"):
        note(f"{options.host} can be reached from elsewhere, and no key is asked for; {KEY} sets one")
    with Store(options.store, reading=True) as store:
        llm = load_base(store, partial(load, options), options.model)
    live = LiveModel(options.store, llm, options.trainer)
    with serving(live, say, options.host, options.port, key) as address:
        say(f"version {live.version} of {options.store} is served at {address}: the OpenAI API at /v1, a page at /")
        threading.Event().wait()


def _named(options: of.UpdatedModelOptions) -> tuple[WeightUpdate | None, str, int | None]:
    """The update that the options name, None being the base model, that model's name, and a version's number."""
    if options.store is None:
        return WeightUpdate.load(options.update) if options.update else None, options.model, None
    with Store(options.store, reading=True) as store:
        number = store.current if options.version is None else options.version
        return load_version(store, number), _model_of(store, options), number


def _generate_live(prompts: list[str], options: of.GenerateCommand) -> None:
    assert options.store is not None
    with Store(options.store, reading=True) as store:
        name = _model_of(store, options)
    llm = load(options, name)
    answers = {"base": answer(llm, prompts, options.max_new_tokens, trainer=options.trainer)}
    live, stopping, shown = LiveModel(options.store, llm, options.trainer), Stopping(), None
    with stopping.listening():
        while not stopping.is_set():
            if shown != live.follow():
                texts, shown = live.generate(prompts, options.max_new_tokens)
                answers[f"version {shown}"] = texts
                show_answers(prompts, answers)
                answers = {f"version {shown}": texts}  # the next one stands beside it
            if not options.follow:
                return
            stopping.wait(FOLLOWING)


def _model_of(store: Store, options: of.UpdatedModelOptions | of.GenerateCommand) -> str:
    """The model to load for a store: the one that it knows, unless another is named."""
    return store.model if options.model == type(options).model else options.model

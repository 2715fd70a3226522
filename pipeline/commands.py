"""One function a command: thin, so that what a command does can be done from Python as well.

A command's imports stand inside it, so that `--help` answers without loading torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import update_commands
from pipeline.errors import UserError, check_choice
from pipeline.options import (
    AttributeCommand,
    BenchmarkCommand,
    DemoCommand,
    DiffCommand,
    EditCommand,
    EvaluateCommand,
    ExportCommand,
    GenerateCommand,
    HistoryCommand,
    PlanCommand,
    RequestsCommand,
    RetractCommand,
    RunCommand,
    ScheduleCommand,
    StudyCommand,
    SubmitCommand,
    UpdateCommand,
    VerifyCommand,
    VersionCommand,
)
from pipeline.shipped import program
from pipeline.stages import edit_and_prove, find_and_keep, load, note_chat, prepare, read_requests, working

STUDY_MAY_CHANGE = ("requests", "limit", "proxy", "offset", "methods", "selectors", "every", "together", "skip_bad")


def run(options: RunCommand) -> None:
    """Find the golden layer with one part of the requests, edit the other part there, and prove it."""
    from pipeline.attribution import GoldenProfile, check_method
    from pipeline.editing import METHODS, accept, choose_layers
    from pipeline.requests import split_by_subject

    check_method([], options.attribution)
    check_choice("edit.method", options.edit.method, METHODS)
    with working(options, "run") as log:
        requests = read_requests(options)
        if options.profile:
            profile, edits = GoldenProfile.load(options.profile), requests
        else:
            proxy, edits = split_by_subject(requests, options.proxy_fraction, options.seed)
            check_method(proxy, options.attribution)
        edits = accept(edits, options.edit)
        llm = load(options, requests=requests)
        if options.profile:
            choose_layers(llm, profile, options.edit)
            note_chat(llm, "profile", profile.chat)
            log.keep_profile(profile)
        else:
            llm.check_layers(options.edit.layers or [])
            profile = find_and_keep(log, llm, proxy, options.attribution, options)
        edit_and_prove(log, llm, edits, profile, options, options.edit, options.evaluation)


def demo(options: DemoCommand) -> None:
    """See it all on a handful of facts: old answers, golden layer, edit, new answers, what else moved, and back."""
    from pipeline.demo import show

    with working(options, "demo") as log:
        show(load(options), options, log)


def attribute(options: AttributeCommand) -> None:
    """Find the golden layer of a model from a set of edit requests, and keep it as a profile."""
    from pipeline.attribution import check_method

    check_method([], options)
    with working(options, "attribute") as log:
        requests = read_requests(options)
        check_method(requests, options)
        find_and_keep(log, load(options, requests=requests), requests, options, options)


def edit(options: EditCommand) -> None:
    """Edit requests at the golden layer, measure before and after, and keep the update."""
    from pipeline.attribution import GoldenProfile
    from pipeline.editing import METHODS, WeightUpdate, accept, check_earlier, choose_layers

    check_choice("method", options.method, METHODS)
    with working(options, "edit") as log:
        requests = accept(read_requests(options), options)
        profile = GoldenProfile.load(options.profile) if options.profile else None
        after = WeightUpdate.load(options.after) if options.after else None
        if profile is None and not options.layers:
            raise UserError(f"edit: where? give --profile FILE, which `{program()} attribute` makes, or --layers N")
        llm = load(options, requests=requests)
        choose_layers(llm, profile, options)
        if profile:
            note_chat(llm, "profile", profile.chat)
        if after:
            check_earlier(llm, after)
        edit_and_prove(log, llm, requests, profile, options, options, options.evaluation, after)


def evaluate(options: EvaluateCommand) -> None:
    """Measure a model on edit requests and, with an update, the model before and after it."""
    from pipeline.editing import WeightUpdate
    from pipeline.evaluation import evaluate

    if options.explain:
        return _explain(options)
    with working(options, "evaluate") as log:
        requests = read_requests(options)
        update = WeightUpdate.load(options.update) if options.update else None
        llm = load(options, requests=requests)
        if update:
            note_chat(llm, "update", update.chat)
        measured = evaluate(llm, requests, update, options, options.trainer, log.work)
        log.keep_metrics(llm.name, requests, measured)


def requests(options: RequestsCommand) -> None:
    """Check a file of edit requests and say what is in it; --to writes it as the project's own JSONL."""
    from pipeline.files import write_whole
    from pipeline.requests.check import check_requests, require_good
    from pipeline.requests.summary import summary
    from pipeline.requests.writer import check_target, request_writer

    def check(partial: Path | None = None) -> None:
        with request_writer(partial, str(options.to).endswith(".gz")) as keep:
            found = check_requests(options.requests, options.limit, options.offset, keep)
        print(summary(found))
        require_good(found, options.skip_bad)

    if os.environ.get("LOCAL_RANK", "0") != "0":
        pass  # a process that another started for --model: the file is checked already
    elif options.to:
        check_target(Path(options.to), options.overwrite)
        own = f".{os.getpid()}"  # two commands may write the same file: the last one stays, whole
        print(f"written to {write_whole(Path(options.to), check, own)}")
    else:
        check()
    if options.model:
        _show_known(options)


def export(options: ExportCommand) -> None:
    """Write the edited model as a plain Hugging Face folder, or the update alone, or as a PEFT adapter."""
    from pipeline.editing import WeightUpdate, export_adapter, export_merged

    with working(options, "export") as log:
        if options.update:
            update, model = WeightUpdate.load(options.update), options.model
        else:
            update, model = update_commands.of_store(options)
        llm = load(options, model)
        llm.check_made_for("update", update.model, update.fingerprint)
        if options.kind == "merged":
            export_merged(llm, update, log.folder)
        elif options.kind == "adapter":
            export_adapter(llm, update, log.folder)
        else:
            update.save(log.folder)


def generate(options: GenerateCommand) -> None:
    """Show the answers of the base model and of the edited one side by side."""
    from pipeline.editing import WeightUpdate
    from pipeline.model import generate
    from pipeline.reporting import show_answers

    prepare(options)
    update = WeightUpdate.load(options.update) if options.update else None
    prompts = options.prompt or [request.prompt for request in read_requests(options)]
    if options.store:
        update_commands.generate_live(prompts, options, lambda name: load(options, name))
        return
    llm = load(options)
    if update:
        llm.check_made_for("update", update.model, update.fingerprint)
        note_chat(llm, "update", update.chat)
    settings: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "trainer": options.trainer,
    }
    answers = {"base": generate(llm, prompts, **settings, title="Base model")}
    if update:
        with update.applied(llm):
            answers["edited"] = generate(llm, prompts, **settings, title="Edited model")
    show_answers(prompts, answers)


def study(options: StudyCommand) -> None:
    """Edit requests alone at every block, and compare the golden layer, every request's own best, and selectors."""
    from pipeline.reporting.terminal import say
    from pipeline.requests import load_requests
    from pipeline.study.results import RESULTS_FILE
    from pipeline.study.study import check_study, parted, run_study

    with working(options, "study", STUDY_MAY_CHANGE) as log:
        sets = []
        for file in options.requests:
            most = options.limit + 4 * options.proxy  # some are about subjects that are tried
            read = load_requests(file, most, options.offset, options.skip_bad, tell=say)
            sets.append(parted(_set_name(file), read, options))
        check_study(sets, options)
        log.going_on(RESULTS_FILE)
        log.keep_study(run_study(load(options), sets, options, log.folder))


def plan(options: PlanCommand) -> None:
    """Say what memory a device will need for attribution, edits and evaluation; no weight is read."""
    from pipeline.files import write_json
    from pipeline.planning import plan_memory
    from pipeline.reporting import show_plan

    if options.output is None:
        prepare(options)
        show_plan(plan_memory(options))
        return
    with working(options, "plan") as log:
        planned = plan_memory(options)
        write_json(log.folder / "plan.json", planned.to_dict())
        show_plan(planned)


def benchmark(options: BenchmarkCommand) -> None:
    """Measure editing, evaluation or a store against what is asked of it, as a table and benchmark.json."""
    from pipeline.benchmarks import BENCHMARKS
    from pipeline.reporting import say

    with working(options, "benchmark") as log:
        bench = BENCHMARKS[options.what](load(options), options, log.work)
        log.keep_benchmark(bench.results(), bench.llm.name)
        if bench.note:
            say(bench.note)


class Command(NamedTuple):
    """A command's function, its options, the line that `--help` shows of it, and the flags of bare words."""

    function: Callable[[Any], None]
    options: type
    words: tuple[str, ...] = ()

    @property
    def help(self) -> str:
        return (self.function.__doc__ or "").splitlines()[0]


COMMANDS = {
    "run": Command(run, RunCommand),
    "demo": Command(demo, DemoCommand),
    "attribute": Command(attribute, AttributeCommand),
    "edit": Command(edit, EditCommand),
    "evaluate": Command(evaluate, EvaluateCommand),
    "requests": Command(requests, RequestsCommand, words=("requests",)),
    "export": Command(export, ExportCommand, words=("version",)),
    "generate": Command(generate, GenerateCommand),
    "study": Command(study, StudyCommand),
    "plan": Command(plan, PlanCommand),
    "benchmark": Command(benchmark, BenchmarkCommand, words=("what",)),
    "submit": Command(update_commands.submit, SubmitCommand, words=("file",)),
    "update": Command(update_commands.update, UpdateCommand),
    "schedule": Command(update_commands.schedule, ScheduleCommand),
    "history": Command(update_commands.history, HistoryCommand),
    "show": Command(update_commands.show, VersionCommand, words=("version",)),
    "diff": Command(update_commands.diff, DiffCommand, words=("older", "newer")),
    "rollback": Command(update_commands.rollback, VersionCommand, words=("version",)),
    "verify": Command(update_commands.verify, VerifyCommand),
    "retract": Command(update_commands.retract, RetractCommand, words=("request",)),
}


def _show_known(options: RequestsCommand) -> None:
    """Which answers of the requests a model gives by itself, and which requests it cannot take."""
    from pipeline.evaluation import find_known
    from pipeline.reporting.terminal import say
    from pipeline.requests import load_requests
    from pipeline.requests.check import NAMED

    prepare(options)
    read = load_requests(options.requests, options.limit, options.offset, options.skip_bad, tell=lambda _: None)
    llm = load(options)
    known = find_known(llm, read, options.batch_size, options.trainer)
    say(f"{llm.name} gives {len(known.old)} of {known.asked} old answers, and {len(known.new)} new answers already")
    for reason in known.unusable[:NAMED]:
        say(f"bad: {reason}")
    if known.unusable:
        raise UserError(f"requests: {len(known.unusable)} of {len(read)} are none that {llm.name} can take")


def _explain(options: EvaluateCommand) -> None:
    """Show what the model is given for the first requests, and what of it is scored."""
    from pipeline.model.explain import explain
    from pipeline.reporting import show_tokens

    prepare(options)
    requests = read_requests(options)[: options.explain]
    llm = load(options)
    for request in requests:
        show_tokens(request, explain(llm, request))


def _set_name(requests: str) -> str:
    """A request set's name, fit for a file's."""
    return re.sub(r"[^\w.-]+", "_", requests if requests.startswith("hf:") else Path(requests).stem)

"""One function a command: thin, so that what a command does can be done from Python as well.

A command's imports stand inside it, so that `--help` answers without loading torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import update_commands
from pipeline.errors import UserError, check_choice
from pipeline.options import (
    AttributeCommand,
    AttributionOptions,
    BenchmarkCommand,
    ComputeOptions,
    DemoCommand,
    DiffCommand,
    EditCommand,
    EditOptions,
    EvaluateCommand,
    EvaluationOptions,
    ExportCommand,
    GenerateCommand,
    HistoryCommand,
    ModelOptions,
    PlanCommand,
    ProvingOptions,
    RequestOptions,
    RequestsCommand,
    RetractCommand,
    RunCommand,
    ScheduleCommand,
    StudyCommand,
    SubmitCommand,
    TrainerOptions,
    UpdateCommand,
    VerifyCommand,
    VersionCommand,
)
from pipeline.shipped import program

if TYPE_CHECKING:
    from pipeline.attribution import GoldenProfile
    from pipeline.editing import WeightUpdate
    from pipeline.model import LLM
    from pipeline.reporting import RunLog
    from pipeline.requests import EditRequest

STUDY_MAY_CHANGE = ("requests", "limit", "proxy", "offset", "methods", "selectors", "every", "together", "skip_bad")


def run(options: RunCommand) -> None:
    """Find the golden layer with one part of the requests, edit the other part there, and prove it."""
    from pipeline.attribution import GoldenProfile, check_method
    from pipeline.editing import METHODS, accept, choose_layers
    from pipeline.requests import split_by_subject

    check_method([], options.attribution)
    check_choice("edit.method", options.edit.method, METHODS)
    with _working(options, "run") as log:
        requests = _read_requests(options)
        if options.profile:
            profile, edits = GoldenProfile.load(options.profile), requests
        else:
            proxy, edits = split_by_subject(requests, options.proxy_fraction, options.seed)
            check_method(proxy, options.attribution)
        edits = accept(edits, options.edit)
        llm = _load(options, requests=requests)
        if options.profile:
            choose_layers(llm, profile, options.edit)
            _note_chat(llm, "profile", profile.chat)
            log.keep_profile(profile)
        else:
            llm.check_layers(options.edit.layers or [])
            profile = _find_golden_layer(log, llm, proxy, options.attribution, options)
        _edit_and_prove(log, llm, edits, profile, options, options.edit, options.evaluation)


def demo(options: DemoCommand) -> None:
    """See it all on a handful of facts: old answers, golden layer, edit, new answers, what else moved, and back."""
    from pipeline.demo import show

    with _working(options, "demo") as log:
        show(_load(options), options, log)


def attribute(options: AttributeCommand) -> None:
    """Find the golden layer of a model from a set of edit requests, and keep it as a profile."""
    from pipeline.attribution import check_method

    check_method([], options)
    with _working(options, "attribute") as log:
        requests = _read_requests(options)
        check_method(requests, options)
        _find_golden_layer(log, _load(options, requests=requests), requests, options, options)


def edit(options: EditCommand) -> None:
    """Edit requests at the golden layer, measure before and after, and keep the update."""
    from pipeline.attribution import GoldenProfile
    from pipeline.editing import METHODS, WeightUpdate, accept, check_earlier, choose_layers

    check_choice("method", options.method, METHODS)
    with _working(options, "edit") as log:
        requests = accept(_read_requests(options), options)
        profile = GoldenProfile.load(options.profile) if options.profile else None
        after = WeightUpdate.load(options.after) if options.after else None
        if profile is None and not options.layers:
            raise UserError(f"edit: where? give --profile FILE, which `{program()} attribute` makes, or --layers N")
        llm = _load(options, requests=requests)
        choose_layers(llm, profile, options)
        if profile:
            _note_chat(llm, "profile", profile.chat)
        if after:
            check_earlier(llm, after)
        _edit_and_prove(log, llm, requests, profile, options, options, options.evaluation, after)


def evaluate(options: EvaluateCommand) -> None:
    """Measure a model on edit requests and, with an update, the model before and after it."""
    from pipeline.editing import WeightUpdate
    from pipeline.evaluation import evaluate

    if options.explain:
        return _explain(options)
    with _working(options, "evaluate") as log:
        requests = _read_requests(options)
        update = WeightUpdate.load(options.update) if options.update else None
        llm = _load(options, requests=requests)
        if update:
            _note_chat(llm, "update", update.chat)
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

    with _working(options, "export") as log:
        if options.update:
            update, model = WeightUpdate.load(options.update), options.model
        else:
            update, model = update_commands.of_store(options)
        llm = _load(options, model)
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

    _prepare(options)
    update = WeightUpdate.load(options.update) if options.update else None
    prompts = options.prompt or [request.prompt for request in _read_requests(options)]
    if options.store:
        update_commands.generate_live(prompts, options, lambda name: _load(options, name))
        return
    llm = _load(options)
    if update:
        llm.check_made_for("update", update.model, update.fingerprint)
        _note_chat(llm, "update", update.chat)
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

    with _working(options, "study", STUDY_MAY_CHANGE) as log:
        sets = []
        for file in options.requests:
            most = options.limit + 4 * options.proxy  # some are about subjects that are tried
            read = load_requests(file, most, options.offset, options.skip_bad, tell=say)
            sets.append(parted(_set_name(file), read, options))
        check_study(sets, options)
        log.going_on(RESULTS_FILE)
        log.keep_study(run_study(_load(options), sets, options, log.folder))


def plan(options: PlanCommand) -> None:
    """Say what memory a device will need for attribution, edits and evaluation; no weight is read."""
    from pipeline.files import write_json
    from pipeline.planning import plan_memory
    from pipeline.reporting import show_plan

    if options.output is None:
        _prepare(options)
        show_plan(plan_memory(options))
        return
    with _working(options, "plan") as log:
        planned = plan_memory(options)
        write_json(log.folder / "plan.json", planned.to_dict())
        show_plan(planned)


def benchmark(options: BenchmarkCommand) -> None:
    """Measure editing, evaluation or a store against what is asked of it, as a table and benchmark.json."""
    from pipeline.benchmarks import BENCHMARKS
    from pipeline.reporting import say

    with _working(options, "benchmark") as log:
        bench = BENCHMARKS[options.what](_load(options), options, log.work)
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


def _read_requests(options: RequestOptions) -> list[EditRequest]:
    from pipeline.reporting.terminal import say
    from pipeline.requests import load_requests

    return load_requests(options.requests, options.limit, options.offset, options.skip_bad, tell=say)


def _show_known(options: RequestsCommand) -> None:
    """Which answers of the requests a model gives by itself, and which requests it cannot take."""
    from pipeline.evaluation import find_known
    from pipeline.reporting.terminal import say
    from pipeline.requests import load_requests
    from pipeline.requests.check import NAMED

    _prepare(options)
    read = load_requests(options.requests, options.limit, options.offset, options.skip_bad, tell=lambda _: None)
    llm = _load(options)
    known = find_known(llm, read, options.batch_size, options.trainer)
    say(f"{llm.name} gives {len(known.old)} of {known.asked} old answers, and {len(known.new)} new answers already")
    for reason in known.unusable[:NAMED]:
        say(f"bad: {reason}")
    if known.unusable:
        raise UserError(f"requests: {len(known.unusable)} of {len(read)} are none that {llm.name} can take")


def _prepare(options: ModelOptions | RequestsCommand) -> None:
    from lightning.pytorch import seed_everything

    from pipeline.model import hush
    from pipeline.model.processes import is_one_of_several, launch

    hush(options.verbose)
    if isinstance(options, ComputeOptions) and is_one_of_several():
        launch(_trainer(options))  # join at once: to name one output folder, and to fail together
    seed_everything(getattr(options, "seed", 0), verbose=False)


def _working(options: Any, command: str, may_change: Collection[str] = ()) -> Any:
    """The command's output folder, tensorboard and report, made once its name is known to be free."""
    from pipeline.reporting import run_log

    _prepare(options)
    resume = getattr(options, "resume", False)
    saved = asdict(options) | {"overwrite": False}  # who repeats the command by them replaces nothing unasked
    return run_log(command, options.output, options.overwrite, saved, resume, may_change)


def _load(options: ModelOptions, model: str | None = None, requests: Sequence[EditRequest] = ()) -> LLM:
    """Start the other processes, if any, see that all were given the same, and load the model."""
    from pipeline.model import load_model, weights_dtype
    from pipeline.model.processes import check_alike, launch
    from pipeline.options.shared import SHARDED

    if not isinstance(options, ComputeOptions):
        return load_model(model or options.model, verbose=options.verbose, chat=options.chat)
    trainer = _trainer(options)
    device = launch(trainer)
    check_alike("requests", requests)
    spread = device if trainer.strategy in SHARDED else None
    llm = load_model(model or options.model, weights_dtype(trainer), options.verbose, options.chat, spread)
    check_alike("model", [llm.fingerprint])
    return llm


def _trainer(options: ComputeOptions) -> TrainerOptions:
    """What a command runs on: a store is worked on by one device."""
    return options.one_device if isinstance(options, ProvingOptions) else options.trainer


def _explain(options: EvaluateCommand) -> None:
    """Show what the model is given for the first requests, and what of it is scored."""
    from pipeline.model.explain import explain
    from pipeline.reporting import show_tokens

    _prepare(options)
    requests = _read_requests(options)[: options.explain]
    llm = _load(options)
    for request in requests:
        show_tokens(request, explain(llm, request))


def _note_chat(llm: LLM, what: str, chat: bool) -> None:
    """Say so when what was made with a chat template is used without one, or the other way round."""
    from pipeline.reporting import say

    if chat != llm.chat:
        made, used = ("with", "without") if chat else ("without", "with")
        say(f"note: the {what} was made {made} --chat and is used {used} it")


def _request_set(options: Any) -> str:
    return options.requests if options.requests == "demo" else Path(options.requests).name


def _set_name(requests: str) -> str:
    """A request set's name, fit for a file's."""
    return re.sub(r"[^\w.-]+", "_", requests if requests.startswith("hf:") else Path(requests).stem)


def _find_golden_layer(
    log: RunLog,
    llm: LLM,
    requests: list[EditRequest],
    attribution: AttributionOptions,
    options: AttributeCommand | RunCommand,
) -> GoldenProfile:
    """Stage one: score, choose, and keep profile and scores; a resumed command goes on with what it has."""
    from pipeline.attribution import choose, score_requests

    profile, scores = log.profile_kept(), None
    if profile is None:
        work = log.work / "attribution"
        scores = score_requests(llm, requests, attribution, options.trainer, options.seed, work)
        profile = choose(llm, scores, attribution, _request_set(options), options.seed)
    log.keep_profile(profile, scores)
    return profile


def _edit_and_prove(
    log: RunLog,
    llm: LLM,
    requests: list[EditRequest],
    profile: GoldenProfile | None,
    compute: ComputeOptions,
    edit_options: EditOptions,
    evaluation: EvaluationOptions,
    after: WeightUpdate | None = None,
) -> None:
    """Stages two and three: edit, save the update, measure what was saved."""
    from pipeline.editing import edit
    from pipeline.evaluation import Evaluator, evaluate

    Evaluator(llm, requests, evaluation, compute.trainer)  # texts that do not fit are found before the edit
    update = log.update_kept() or edit(
        llm,
        requests,
        profile,
        edit_options,
        compute.trainer,
        log.tensorboard,
        compute.seed,
        after,
        log.work / "edit",
    )
    with log.keeping(update):
        measured = evaluate(llm, update.requests, update, evaluation, compute.trainer, log.work)
    log.keep_metrics(llm.name, update.requests, measured, update, profile)

"""What commands have in common: how one begins, and the stages that several of them run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything

from pipeline.attribution.find import choose, score_requests
from pipeline.attribution.profile import PROFILE_FILE, GoldenProfile
from pipeline.editing.editor import edit
from pipeline.editing.update import UPDATE_FILE, WeightUpdate
from pipeline.evaluation.evaluator import Evaluator, evaluate
from pipeline.model.blocks import check_exist
from pipeline.model.fingerprints import check_made_for
from pipeline.model.llm import LLM
from pipeline.model.loading import load_model
from pipeline.options.attribution import AttributionOptions
from pipeline.options.base import as_config
from pipeline.options.commands import AttributeCommand, EditCommand, RunCommand
from pipeline.options.editing import EditOptions
from pipeline.options.shared import NF4, SHARDED, CommandOptions, ComputeOptions, RequestOptions
from pipeline.output import is_one_of_several
from pipeline.reporting.run_log import RunLog, run_log
from pipeline.reporting.terminal import say
from pipeline.requests.readers import load_requests
from pipeline.requests.schema import EditRequest
from pipeline.running.processes import check_alike, join
from pipeline.running.trainer import Runtime, callbacks_of, hush, weights_dtype
from pipeline.study.race import RACE, race, seeding


def prepare(options: CommandOptions) -> None:
    """Hush the libraries, join the other processes where somebody started them, and seed every draw."""
    hush(options.verbose)
    if isinstance(options, ComputeOptions) and is_one_of_several():
        join(options.trainer)  # join at once: to name one output folder, and to fail together
    seed_everything(getattr(options, "seed", 0), verbose=False)


@contextmanager
def working(options: Any, command: str, may_change: Collection[str] = ()) -> Iterator[RunLog]:
    """The command's output folder, loggers and report, made once its name is known to be free."""
    prepare(options)
    saved = as_config(options) | {"overwrite": False}  # who repeats the command by them replaces nothing unasked
    with run_log(command, options.output, options.overwrite, saved, may_change) as log:
        if isinstance(options, ComputeOptions):
            options.trainer.folder = log.folder
            callbacks_of(options.trainer)  # what is wrong with them is known before the work
        yield log


def read_requests(options: RequestOptions) -> list[EditRequest]:
    """The requests that the options name; what is left out of them is told."""
    return load_requests(options.requests, options.limit, options.offset, options.skip_bad, options.fields)


def load(
    options: Any,
    model: str | None = None,
    requests: Sequence[EditRequest] = (),
    layers: Collection[int] = (),
    **made: GoldenProfile | WeightUpdate | None,
) -> LLM:
    """See that all processes were given the same, and load the model, which is to have these blocks.

    What is `made`, by what it is, is for this model: said before weights are read where its fingerprint is known. A
    note says where it was made with a chat template and is used without one, or the other way round.
    """
    name, verbose, chat = model or options.model, options.verbose, getattr(options, "chat", False)

    def fits(blocks: int, known: str | None) -> None:
        check_exist(layers, blocks, name)
        for what, one in made.items():
            if one and known:
                check_made_for(what, (one.model, one.fingerprint), name, known)

    if not isinstance(options, ComputeOptions):
        return load_model(name, verbose=verbose, fits=fits)
    trainer = options.trainer
    device = join(trainer)
    check_alike("requests", requests)
    if trainer.precision == NF4:
        trainer.check_whole(f"precision {NF4}")
    spread, nf4 = (device if asked else None for asked in (trainer.strategy in SHARDED, trainer.precision == NF4))
    llm = load_model(name, weights_dtype(trainer), verbose, chat, spread, fits, nf4)
    if not spread:
        llm.model.to(device)  # type: ignore[arg-type]  # where every stage finds it
    check_alike("model", [llm.fingerprint])
    for what, one in made.items():
        if isinstance(one, WeightUpdate):
            one.check_fits(llm)
        if one and one.chat != getattr(options, "chat", one.chat):
            ways = ("with", "without") if one.chat else ("without", "with")
            say("note: the {} was made {} --chat and is used {} it".format(what, *ways))
    return llm


def find_and_keep(
    log: RunLog,
    llm: LLM,
    requests: list[EditRequest],
    attribution: AttributionOptions,
    how: EditOptions,
    options: AttributeCommand | RunCommand,
) -> GoldenProfile:
    """Stage one: score, choose, maybe let blocks race by how edits will be made, and keep profile and scores; a
    resumed command goes on with what it has.
    """
    scores = None
    if log.has(PROFILE_FILE):
        profile = GoldenProfile.load(log.folder)
    else:
        work, seeds = log.work / "attribution", seeding(attribution)
        scores = score_requests(llm, requests, seeds, options.trainer, options.seed, work)
        name = options.requests if options.requests == "demo" else Path(options.requests).name
        profile = choose(scores, seeds, name, options.seed)
        if attribution.method == RACE:
            profile = race(llm, profile, requests, how, Runtime(options.trainer, seed=options.seed), work)
    log.keep_profile(profile, scores)
    return profile


def edit_and_prove(
    log: RunLog,
    llm: LLM,
    requests: list[EditRequest],
    profile: GoldenProfile | None,
    how: EditOptions,
    options: RunCommand | EditCommand,
    after: WeightUpdate | None = None,
) -> None:
    """Stages two and three: edit, save the update, measure what was saved."""
    trainer, work = options.trainer, log.work
    Evaluator(llm, requests, options.evaluation, trainer)  # texts that do not fit are found before the edit
    if log.has(UPDATE_FILE):
        update = WeightUpdate.load(log.folder)
    else:
        update = edit(llm, requests, profile, how, trainer, log.loggers, options.seed, after, work / "edit")
    with log.keeping(update):
        measured = evaluate(llm, update.requests, update, options.evaluation, trainer, work)
    log.keep_metrics(llm.name, update.requests, measured, update, profile)

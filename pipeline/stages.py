"""What commands have in common: how one begins, and the stages that several of them run.

Imports stand inside the functions, so that `--help` answers without loading torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.options import (
    AttributeCommand,
    AttributionOptions,
    ComputeOptions,
    EditOptions,
    EvaluationOptions,
    ModelOptions,
    ProvingOptions,
    RequestOptions,
    RequestsCommand,
    RunCommand,
    TrainerOptions,
)

if TYPE_CHECKING:
    from pipeline.attribution import GoldenProfile
    from pipeline.editing import WeightUpdate
    from pipeline.model import LLM
    from pipeline.reporting import RunLog
    from pipeline.requests import EditRequest


def prepare(options: ModelOptions | RequestsCommand) -> None:
    """Hush the libraries, join the other processes where somebody started them, and seed every draw."""
    from lightning.pytorch import seed_everything

    from pipeline.model import hush
    from pipeline.running.processes import is_one_of_several, launch

    hush(options.verbose)
    if isinstance(options, ComputeOptions) and is_one_of_several():
        launch(_trainer(options))  # join at once: to name one output folder, and to fail together
    seed_everything(getattr(options, "seed", 0), verbose=False)


def working(options: Any, command: str, may_change: Collection[str] = ()) -> Any:
    """The command's output folder, tensorboard and report, made once its name is known to be free."""
    from pipeline.reporting.run_log import run_log

    prepare(options)
    resume = getattr(options, "resume", False)
    saved = asdict(options) | {"overwrite": False}  # who repeats the command by them replaces nothing unasked
    return run_log(command, options.output, options.overwrite, saved, resume, may_change)


def read_requests(options: RequestOptions) -> list[EditRequest]:
    """The requests that the options name; what is left out of them is told."""
    from pipeline.reporting.terminal import say
    from pipeline.requests import load_requests

    return load_requests(options.requests, options.limit, options.offset, options.skip_bad, tell=say)


def load(options: ModelOptions, model: str | None = None, requests: Sequence[EditRequest] = ()) -> LLM:
    """Start the other processes, if any, see that all were given the same, and load the model."""
    from pipeline.model import load_model, weights_dtype
    from pipeline.running.processes import check_alike, launch
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


def note_chat(llm: LLM, what: str, chat: bool) -> None:
    """Say so when what was made with a chat template is used without one, or the other way round."""
    from pipeline.reporting import say

    if chat != llm.chat:
        made, used = ("with", "without") if chat else ("without", "with")
        say(f"note: the {what} was made {made} --chat and is used {used} it")


def find_and_keep(
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


def _request_set(options: Any) -> str:
    return options.requests if options.requests == "demo" else Path(options.requests).name


def edit_and_prove(
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

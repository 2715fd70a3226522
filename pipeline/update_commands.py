"""The commands that work on a store of knowledge updates: thin, as those in `commands.py`, where the table is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError, check_choice
from pipeline.options import (
    DiffCommand,
    ExportCommand,
    GenerateCommand,
    HistoryCommand,
    ModelOptions,
    ProvingOptions,
    RetractCommand,
    ScheduleCommand,
    StoreOptions,
    SubmitCommand,
    UpdateCommand,
    VerifyCommand,
    VersionCommand,
    time_of,
)
from pipeline.shipped import program

if TYPE_CHECKING:
    from pipeline.editing import WeightUpdate
    from pipeline.model import LLM
    from pipeline.updates import BatchResult, Store

FOLLOWING = 0.5  # seconds between looks at a store's current version


def submit(options: SubmitCommand) -> None:
    """Put the requests of a file into a store's queue."""
    from pipeline.reporting import show_submitted
    from pipeline.requests import stream_requests
    from pipeline.updates import Store, submit

    if not Path(options.store).exists():
        for _ in stream_requests(options.file):  # a file that is refused makes no store
            pass
    with Store(options.store, options.model, make=True) as store:
        store.check_model(options.model)
        done = submit(store, options.file, options.source, time_of(options.not_before), options.again)
        show_submitted(store, done)


def update(options: UpdateCommand) -> None:
    """Edit, prove and publish what is due in a store, once."""
    from pipeline.updates import Stopping, Store

    _hush(options)
    _check(options)
    stopping = Stopping()
    with Store(options.store, options.model, make=True) as store, stopping.listening():
        _update(store, options, stopping)


def schedule(options: ScheduleCommand) -> None:
    """Stay, and update a store at set times."""
    from pipeline.reporting import say
    from pipeline.updates import Stopping, Store, run_schedule, trigger

    _hush(options)
    _check(options)
    when, stopping = trigger(options.cron, options.every), Stopping()

    def work() -> None:
        with Store(options.store, options.model, make=True) as store:
            _update(store, options, stopping)

    with stopping.listening():
        Store(options.store, options.model, make=True).close()  # what is wrong with it is said now
        run_schedule(work, when, say, stopping, at_once=options.every is not None)


def _update(store: Store, options: UpdateCommand, stopping: Callable[[], bool]) -> None:
    from pipeline.reporting import say, show_batch, show_on_board
    from pipeline.updates import BusyError, counts, update

    def report(result: BatchResult) -> None:
        show_batch(store, result, options.dry_run)

    try:
        worked = update(store, options, _loading(options), report, stopping)
    except BusyError as busy:  # no failure: what is due is in good hands
        say(f"{busy}; nothing to do here")
        return
    finally:
        show_on_board(store)
    if not worked:
        say(f"nothing is due in {store.folder}; {counts(store).get('queued', 0)} waiting for their date")


def history(options: HistoryCommand) -> None:
    """List a store's versions and what happened, or tell the story of one request."""
    from pipeline.reporting import show_history, show_story
    from pipeline.updates import Store, find

    with Store(options.store) as store:
        if options.request is None:
            show_history(store, options.limit)
        else:
            show_story(store, find(store, options.request)[0])


def show(options: VersionCommand) -> None:
    """Show what a version holds: its figures, gates and facts."""
    from pipeline.reporting import show_version
    from pipeline.updates import Store

    with Store(options.store) as store:
        show_version(store, options.version)


def diff(options: DiffCommand) -> None:
    """Show which facts two versions differ in."""
    from pipeline.reporting import say, show_facts
    from pipeline.updates import Store, difference

    with Store(options.store) as store:
        gained, lost = difference(store, options.older, options.newer)
        say(f"from version {options.older} to {options.newer}: {len(gained)} facts gained, {len(lost)} lost")
        show_facts(store, gained, "+")
        show_facts(store, lost, "-")


def rollback(options: VersionCommand) -> None:
    """Make an earlier version the current one, or a later one again."""
    from pipeline.reporting import say
    from pipeline.updates import Store, rollback

    with Store(options.store) as store:
        before = store.current
        gained, lost = rollback(store, options.version)
        say(f"version {options.version} is current, after {before}: {len(lost)} facts less, {len(gained)} more")
        if lost:
            say(f"the former are held back; `{program()} submit FILE --again` queues them anew")


def verify(options: VerifyCommand) -> None:
    """Check every file of a store against its SHA-256, and that every version loads."""
    from pipeline.reporting import say
    from pipeline.updates import Store, verify

    _hush(options)
    with Store(options.store) as store:
        wrong = 0
        for number, problem in verify(store, _loading(options), options.model):
            say(f"version {number}: {problem or 'as it was written, and loads'}")
            wrong += bool(problem)
        if wrong:
            raise UserError(f"store: {store.folder}: {wrong} versions are damaged, as listed")


def retract(options: RetractCommand) -> None:
    """Take a request out of the queue, or edit its fact back."""
    from pipeline.reporting import say, show_on_board
    from pipeline.updates import Store, retract

    _hush(options)
    _check(options)
    with Store(options.store) as store:
        done = retract(store, options, _loading(options))
        if done.version is None:
            say("retracted; it was in the queue only")
            return
        show_on_board(store)
        assert done.before and done.after
        sides = [side.metrics["rewrite"].mean for side in (done.before, done.after)]
        say(f"version {done.version}: retracted; its new answer: {sides[0]:.3f} -> {sides[1]:.3f}")


def of_store(options: ExportCommand) -> tuple[WeightUpdate, str]:
    """The version that `export` is to write, and its base model's name.

    Raises:
        UserError: for the base itself, which needs no export, or a version that does not exist.
    """
    from pipeline.updates import Store, check_number, load_version

    assert options.store is not None
    with Store(options.store) as store:
        number = store.current if options.version is None else options.version
        found = load_version(store.folder, number, check_number(store, number))
        if found is None:
            raise UserError(f"export: version {number} of {store.folder} is the base model {store.model} as it is")
        return found, _model_of(store, options)


def generate_live(prompts: list[str], options: GenerateCommand, load: Callable[[str], LLM]) -> None:
    """Answer prompts by a store's current version and, with `--follow`, by every later one."""
    from pipeline.model import generate
    from pipeline.reporting import show_answers
    from pipeline.updates import LiveModel, Stopping, Store

    assert options.store is not None
    with Store(options.store) as store:
        name = _model_of(store, options)
    llm = load(name)
    how = (prompts, options.max_new_tokens, options.batch_size, options.trainer)
    answers = {"base": generate(llm, *how)}
    live, stopping, shown = LiveModel(options.store, llm), Stopping(), None
    with stopping.listening():
        while not stopping():
            if shown != live.follow():
                texts, shown = live.generate(*how)
                answers[f"version {shown}"] = texts
                show_answers(prompts, answers)
                answers = {f"version {shown}": texts}  # the next one stands beside it
            if not options.follow:
                return
            stopping.asked.wait(FOLLOWING)


def _model_of(store: Store, options: ModelOptions) -> str:
    """The model to load for a store: the one that it knows, unless another is named."""
    named = type(options).__dataclass_fields__["model"].default != options.model
    return options.model if named else store.model


def _check(options: ProvingOptions) -> None:
    """See that the options name what there is, before a store is made or a request is held back for their sake.

    Raises:
        UserError: for an unknown method, a missing or damaged profile, or a text that is no file.
    """
    from pipeline.attribution import GoldenProfile, check_method
    from pipeline.editing import METHODS

    check_choice("edit.method", options.edit.method, METHODS)
    check_method([], options.attribution)
    if profile := getattr(options, "profile", None):
        GoldenProfile.load(profile)
    for flag, text in (("edit.statistics", options.edit.statistics.text), ("evaluation", options.evaluation.text)):
        if text and not Path(text).is_file():
            raise UserError(f"{flag}.text: {text}: no such file; expected plain UTF-8 text")


def _hush(options: StoreOptions) -> None:
    from lightning.pytorch import seed_everything

    from pipeline.model import hush

    hush(options.verbose)
    seed_everything(getattr(options, "seed", 0), verbose=False)


def _loading(options: StoreOptions) -> Any:
    from pipeline.model import load_model, weights_dtype

    trainer = options.trainer if isinstance(options, ProvingOptions) else None

    def load(name: str) -> LLM:
        return load_model(name, weights_dtype(trainer), options.verbose)

    return load

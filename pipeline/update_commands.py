"""The commands that work on a store of knowledge updates: thin, as those in `commands.py`, where the table is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
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

if TYPE_CHECKING:
    from pipeline.editing import WeightUpdate
    from pipeline.model import LLM
    from pipeline.updates import Store, Worked

NAMED = 5  # requests that a line spells out
FOLLOWING = 0.5  # seconds between looks at a store's current version


def submit(options: SubmitCommand) -> None:
    """Put the requests of a file into a store's queue."""
    from pipeline.updates import Store, submit

    with Store(options.store, options.model, make=True) as store:
        store.check_model(options.model)
        _mind_the_clock(store)
        done = submit(store, options.file, options.source, time_of(options.not_before), options.again)
        parts = [f"{done.queued} new"]
        parts += [f"{done.again} queued anew"] if done.again else []
        parts += [f"{done.known} known already"] if done.known else []
        _say(f"{', '.join(parts)}; in the queue of {store.folder}: {_queue(store)}")
        if done.left:
            _say(f"{done.left} of the known ones are held back, superseded or retracted; --again queues them anew")
        if done.changing:
            _say(f"{done.changing} are about facts that are applied already, and will take their place")
        _tell_superseded(store, done.superseded)


def update(options: UpdateCommand) -> None:
    """Edit, prove and publish what is due in a store, once."""
    from pipeline.updates import Stopping, Store

    _hush(options)
    stopping = Stopping()
    with Store(options.store, options.model, make=True) as store, stopping.listening():
        _update(store, options, stopping)


def schedule(options: ScheduleCommand) -> None:
    """Stay, and update a store at set times."""
    from pipeline.updates import Stopping, Store, run_schedule, trigger

    _hush(options)
    when, stopping = trigger(options.cron, options.every), Stopping()

    def work() -> None:
        with Store(options.store, options.model, make=True) as store:
            _update(store, options, stopping)

    with stopping.listening():
        Store(options.store, options.model, make=True).close()  # what is wrong with it is said now
        run_schedule(work, when, _say, stopping, at_once=options.every is not None)


def _update(store: Store, options: UpdateCommand, stopping: Callable[[], bool]) -> None:
    from pipeline.reporting import show_on_board
    from pipeline.updates import BusyError, update

    def told(done: Worked) -> None:
        _tell(store, done, options.dry_run)

    _mind_the_clock(store)
    try:
        worked = update(store, options, _loading(options), told, stopping)
    except BusyError as busy:  # no failure: what is due is in good hands
        _say(f"{busy}; nothing to do here")
        return
    finally:
        show_on_board(store)
    if not worked:
        _say(f"nothing is due in {store.folder}: {_queue(store)}")


def _tell(store: Store, done: Worked, dry_run: bool) -> None:
    """What came of a batch, in a few lines."""
    outcome = done.outcome
    head = f"version {done.version}" if done.version is not None else "nothing published"
    if dry_run:
        head = "dry run, nothing changed"
    elif done.overtaken:
        head = "nothing published: another version became current meanwhile; the requests are in the queue again"
    _say(f"{head}: {len(outcome.applied)} applied, {len(outcome.held)} held back")
    if outcome.gates:
        _say(f"  gates: {', '.join(map(str, outcome.gates))}")
    for number, reason, _ in outcome.held[:NAMED]:
        _say(f"  held back: request {number}: {reason}")
    _tell_superseded(store, done.superseded)


def _tell_superseded(store: Store, pairs: Iterable[tuple[int, int]]) -> None:
    from pipeline.updates import request_row

    pairs = list(pairs)
    for older, newer in pairs[:NAMED]:
        old, new = request_row(store, older), request_row(store, newer)
        _say(
            f"  contradiction: request {older} ({old['new_answer']!r}) is superseded by {newer} "
            f"({new['new_answer']!r}): {new['prompt']}"
        )
    if len(pairs) > NAMED:
        _say(f"  and {len(pairs) - NAMED} more contradictions")


def history(options: HistoryCommand) -> None:
    """List a store's versions and what happened, or tell the story of one request."""
    from pipeline.updates import Store, counts, events, find, request_row, story, versions

    with Store(options.store) as store:
        if options.request is not None:
            number, state = find(store, options.request)
            row = request_row(store, number)
            _say(f"request {number} ({row['id']}), {state}: {row['prompt']} -> {row['new_answer']}")
            for line in story(store, number):
                _say(f"  {line.at}  {line.what}")
            return
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts(store).items())) or "none"
        _say(f"store of {store.model}; requests: {states}")
        for row in versions(store, options.limit):
            mark = "*" if row["number"] == store.current else " "
            on = "the base model" if row["parent"] is None else f"on {row['parent']}"
            _say(
                f"{mark} {row['number']:04d}  {row['made']}  {on}, {row['applied']} applied, "
                f"{row['held_back']} held back"
            )
        for line in events(store, options.limit):
            _say(f"  {line.at}  {line.what}")


def show(options: VersionCommand) -> None:
    """Show what a version holds: its figures, gates and facts."""
    from pipeline.updates import Store, check_number, in_force, read_metrics, version_folder

    with Store(options.store) as store:
        check_number(store, options.version)
        held = in_force(store, options.version)
        current = ", the current one" if options.version == store.current else ""
        folder = version_folder(store.folder, options.version)
        _say(f"version {options.version}{current}: {len(held)} facts; {folder}")
        if options.version:
            figures = read_metrics(folder)
            before, after = figures["before"], figures["after"]
            _say(f"  {figures['method']} in block {', '.join(map(str, figures['layers']))}")
            for name, estimate in after["metrics"].items():
                _say(f"  {name}: {before['metrics'][name]['mean']:.3f} -> {estimate['mean']:.3f}")
            _say(f"  perplexity x {after['perplexity_ratio']:.3f}, drift {after['drift']:.3f}")
            for gate in figures["gates"]:
                sign = ">=" if gate["least"] else "<="
                passed = "passed" if gate["passed"] else "missed"
                _say(f"  gate {gate['name']}: {gate['value']:.3f}, asked {sign} {gate['bound']:g}: {passed}")
        _list(store, sorted(held), " ")


def diff(options: DiffCommand) -> None:
    """Show which facts two versions differ in."""
    from pipeline.updates import Store, difference

    with Store(options.store) as store:
        change = difference(store, options.older, options.newer)
        _say(
            f"from version {options.older} to {options.newer}: {len(change.gained)} facts gained, "
            f"{len(change.lost)} lost"
        )
        _list(store, change.gained, "+")
        _list(store, change.lost, "-")


def rollback(options: VersionCommand) -> None:
    """Make an earlier version the current one, or a later one again."""
    from pipeline.updates import Store, rollback

    with Store(options.store) as store:
        before = store.current
        change = rollback(store, options.version)
        _say(
            f"version {options.version} is current, after {before}: {len(change.lost)} facts less, "
            f"{len(change.gained)} more"
        )
        if change.lost:
            _say("the former are held back; `run.py submit FILE --again` queues them anew")


def verify(options: VerifyCommand) -> None:
    """Check every file of a store against its SHA-256, and that every version loads."""
    from pipeline.updates import Store, verify

    _hush(options)
    with Store(options.store) as store:
        wrong = 0
        for number, problem in verify(store, _loading(options), options.model):
            _say(f"version {number}: {problem or 'as it was written, and loads'}")
            wrong += bool(problem)
        if wrong:
            raise UserError(f"store: {store.folder}: {wrong} versions are damaged, as listed")


def retract(options: RetractCommand) -> None:
    """Take a request out of the queue, or edit its fact back."""
    from pipeline.reporting import show_on_board
    from pipeline.updates import Store, retract

    _hush(options)
    with Store(options.store) as store:
        done = retract(store, options, _loading(options))
        if done.version is None:
            _say("retracted; it was in the queue only")
            return
        show_on_board(store)
        assert done.outcome and done.outcome.after and done.outcome.before
        sides = [side.metrics["rewrite"].mean for side in (done.outcome.before, done.outcome.after)]
        _say(f"version {done.version}: retracted; its new answer: {sides[0]:.3f} -> {sides[1]:.3f}")


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


def _list(store: Store, numbers: list[int], mark: str) -> None:
    from pipeline.updates import request_row

    for number in numbers:
        row = request_row(store, number)
        _say(f"{mark} {number} ({row['id']})  {row['prompt']} -> {row['new_answer']}")


def _queue(store: Store) -> str:
    from pipeline.updates import counts

    waiting = counts(store).get("queued", 0)
    return f"{waiting} request{'' if waiting == 1 else 's'} waiting"


def _mind_the_clock(store: Store) -> None:
    if (behind := store.behind()) > 60:
        _say(f"note: this machine's clock is {behind / 60:.0f} minutes behind the store's; order counts, not time")


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


def _say(text: str) -> None:
    print(text, flush=True)

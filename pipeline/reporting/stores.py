"""What people see of a store in the terminal: what came of a submission or an update, versions, facts, stories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.reporting.tables import version_line, version_table
from pipeline.reporting.terminal import say, show_table
from pipeline.updates.folders import read_metrics, version_folder
from pipeline.updates.history import NAMED, counts, events, request_row, story, versions
from pipeline.updates.lineage import in_force
from pipeline.updates.store import Store

if TYPE_CHECKING:
    from pipeline.updates.proving import BatchResult
    from pipeline.updates.queue import Submitted


def show_submitted(store: Store, done: Submitted) -> None:
    """What came of a submission."""
    parts = [f"{done.queued} new"]
    parts += [f"{done.again} queued anew"] if done.again else []
    parts += [f"{done.known} known already"] if done.known else []
    say(f"{', '.join(parts)}; in the queue of {store.folder}: {counts(store).get('queued', 0)}")
    if done.left:
        say(f"{done.left} of the known ones are held back, superseded or retracted; --again queues them anew")
    _show_superseded(store, done.superseded)


def show_batch(store: Store, done: BatchResult, dry_run: bool) -> None:
    """What came of a batch, in a few lines."""
    head = f"version {done.version}" if done.version is not None else "nothing published"
    if dry_run:
        head = "dry run, nothing changed"
    say(f"{head}: {len(done.applied)} applied, {len(done.held)} held back")
    if done.gates:
        say(f"  gates: {', '.join(map(str, done.gates))}")
    for number, reason in done.held[:NAMED]:
        say(f"  held back: request {number}: {reason}")
    _show_superseded(store, done.superseded)


def _show_superseded(store: Store, pairs: Sequence[tuple[int, int]]) -> None:
    for older, newer in pairs[:NAMED]:
        old, new = request_row(store, older), request_row(store, newer)
        say(
            f"  contradiction: request {older} ({old['new_answer']!r}) is superseded by {newer} "
            f"({new['new_answer']!r}): {new['prompt']}"
        )
    if len(pairs) > NAMED:
        say(f"  and {len(pairs) - NAMED} more contradictions")


def show_history(store: Store, limit: int) -> None:
    """The latest versions, and what happened."""
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts(store).items())) or "none"
    say(f"store of {store.model}; requests: {states}")
    for row in versions(store, limit):
        mark = "*" if row["number"] == store.current else " "
        on = "the base model" if row["parent"] is None else f"on {row['parent']}"
        figures = f"{row['applied']} applied, {row['held_back']} held back"
        say(f"{mark} {row['number']:04d}  {row['made']}  {on}, {figures}")
    for at, what in events(store, limit):
        say(f"  {at}  {what}")


def show_story(store: Store, number: int) -> None:
    """A request, and what happened to it."""
    row = request_row(store, number)
    say(f"request {number} ({row['id']}), {row['state']}: {row['prompt']} -> {row['new_answer']}")
    for at, what in story(store, number):
        say(f"  {at}  {what}")


def show_version(store: Store, version: int) -> None:
    """A version's figures, gates and facts."""
    held, folder = in_force(store, version), version_folder(store.folder, version)
    say(f"version {version}{', the current one' if version == store.current else ''}: {len(held)} facts; {folder}")
    if version:
        figures = read_metrics(store.folder, version)
        say(f"  {version_line(figures)}")
        show_table(*version_table(figures))
    show_facts(store, sorted(held), " ")


def show_facts(store: Store, numbers: Sequence[int], mark: str) -> None:
    """Requests by their numbers, a line each."""
    for number in numbers:
        row = request_row(store, number)
        say(f"{mark} {number} ({row['id']})  {row['prompt']} -> {row['new_answer']}")

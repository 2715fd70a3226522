"""A store whose processes are killed at random moments: what went wrong is counted.

Children are forked from a process that has the model loaded, so that a kill costs milliseconds.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.bench import Figures
from pipeline import LLM, EditRequest, UserError
from pipeline.options.updates import RetractCommand, UpdateCommand
from pipeline.requests.readers import write_requests
from pipeline.updates import (
    BusyError,
    Store,
    counts,
    in_force,
    prune,
    retract,
    rollback,
    submit,
    update,
    verify,
    versions,
)

FINE, REFUSED, BUSY, FAULT = 0, 1, 3, 4


@dataclass
class Scene:
    """A store with its model, and requests dealt out into files of a few.

    Attributes:
        llm: the base model.
        options: how updates are made; `options.store` is the store's folder.
        files: request files.
        each: how many requests a file holds.
    """

    llm: LLM
    options: UpdateCommand
    files: list[Path]
    each: int

    @classmethod
    def made(
        cls, llm: LLM, options: UpdateCommand, requests: Sequence[EditRequest], each: int, folder: Path
    ) -> Scene:
        """Deal requests out into files in a folder, and make the store."""
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(requests) - each + 1, each)
        files = [write_requests(folder / f"{start}.jsonl", requests[start : start + each]) for start in starts]
        Store(options.store, llm.name, make=True).close()
        return cls(llm, options, files, each)

    def open(self) -> Store:
        """The store, opened anew."""
        return Store(self.options.store)

    def update(self, store: Store) -> None:
        """Work through everything that is due."""
        update(store, self.options, lambda _: self.llm)

    def retract(self, store: Store, number: int) -> None:
        """Take one request out."""
        shared = {name: getattr(self.options, name) for name in ("store", "edit", "evaluation", "gates", "trainer")}
        retract(store, RetractCommand(request=f"#{number}", **shared), lambda _: self.llm)

    def missing(self, files: int) -> int:
        """How many requests of so many files are not in force."""
        with self.open() as store:
            return abs(files * self.each - len(in_force(store, store.current)))


def forked(work: Callable[[], None]) -> int:
    """Run something in a child; returns its process number. The child ends with FINE, REFUSED, BUSY or FAULT."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = FAULT
    try:
        torch.set_num_threads(1)  # threads do not live through a fork
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            work()
        code = FINE
    except BusyError:
        code = BUSY
    except (UserError, OSError):
        code = REFUSED
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child; its exit code, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_random(scene: Scene, kills: int, seed: int = 0, seconds: float = float("inf")) -> Figures:
    """kill -9 children that do all that changes a store, at random moments; then finish the work.

    No more turns begin after so many seconds.

    Returns:
        lost: requests of submissions that were acknowledged, and are not in the store; or of others, but in part.
        twice: requests that more than one version in force applied, or whose state says other than the versions.
        broken: kills after which the store did not verify.
        unfinished: requests that the update after the last kill did not bring to an end.
        kills: turns whose child was killed in the middle of something.
    """
    chance = random.Random(seed)
    started = time.perf_counter()
    if (code := ended(forked(partial(_episode, scene, scene.files[0], 0)))) != FINE:
        raise UserError(f"kills: an episode that nobody killed ended with {code}")
    span = time.perf_counter() - started
    found = dict.fromkeys(("lost", "twice", "broken", "unfinished", "kills"), 0.0)
    for turn in range(1, kills + 1):
        if time.perf_counter() - started > seconds:
            kills = turn - 1
            break
        child = forked(partial(_episode, scene, scene.files[turn], turn))
        moment = chance.uniform(0, span)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        if ended(child) == -signal.SIGKILL:
            found["kills"] += 1
        else:
            span = moment  # it was done by then: the machine has become faster
        for name, count in _wrong(scene, turn + 1).items():
            found[name] += count
    with scene.open() as store:
        for file in scene.files[: kills + 1]:
            submit(store, file, again=True)
        scene.update(store)
    return found | {"unfinished": float(scene.missing(kills + 1))}


def _episode(scene: Scene, file: Path, seed: int) -> None:
    """Submit and say so, update, go back to some version, update again, take a request out, and prune."""
    chance = random.Random(seed)
    with scene.open() as store:
        submit(store, file)
        _acknowledged(file).touch()
        scene.update(store)
        rollback(store, chance.choice([row["number"] for row in versions(store, 9) if not row["pruned"]]))
        submit(store, file, again=True)
        scene.update(store)
        scene.retract(store, chance.choice(sorted(in_force(store, store.current))))
        store.database.execute("UPDATE versions SET shown = 1")  # as TensorBoard would have it
        prune(store, keep=2)


def _acknowledged(file: Path) -> Path:
    return file.with_suffix(".acknowledged")


def _wrong(scene: Scene, files: int) -> Figures:
    """What is wrong after a kill, when so many files may have been submitted."""
    least = scene.each * sum(_acknowledged(file).exists() for file in scene.files[:files])
    try:
        with Store(scene.options.store, reading=True) as store:
            broken = any(problem for _, problem in verify(store))
            by_state = counts(store)
            held, applied = len(in_force(store, store.current)), _applied(store)
    except UserError:
        return {"broken": 1.0}
    there = sum(by_state.values())
    return {
        "broken": float(broken),
        "lost": float(max(0, least - there) + there % scene.each),
        "twice": float(abs(applied - held) + abs(by_state.get("applied", 0) - held)),
    }


def _applied(store: Store) -> int:
    """How often the version in force, and those that it was made on, applied a request less than took one out."""
    rows = {row["number"]: row for row in versions(store, 10_000)}
    number, line = store.current, []
    while number is not None:
        line.append(number)
        number = rows[number]["parent"]
    (applied,) = store.database.execute(
        f"SELECT sum(iif(what = 'applied', 1, -1)) FROM changes WHERE version IN ({','.join(map(str, line))})"
    ).fetchone()
    return applied or 0

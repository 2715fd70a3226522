"""Ill-treating a store: killed at random moments, written to by many at once, out of disk.

Children are forked from a process that has the model loaded, so that a kill costs milliseconds. Each function
counts what went wrong: zeros are what is wanted.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.files import write_text
from pipeline.model import LLM
from pipeline.options import UpdateCommand
from pipeline.requests import EditRequest
from pipeline.updates import BusyError, Store, check_number, in_force, rollback, submit, update, versions
from pipeline.updates.lineage import ancestors
from pipeline.updates.versions import check_version, read_manifest

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
        files = []
        for start in range(0, len(requests) - each + 1, each):
            part = requests[start : start + each]
            lines = "".join(one.model_dump_json(exclude_defaults=True) + "\n" for one in part)
            files.append(write_text(folder / f"requests-{start}.jsonl", lines))
        Store(options.store, llm.name, make=True).close()
        return cls(llm, options, files, each)

    def open(self) -> Store:
        return Store(self.options.store)

    def update(self, store: Store) -> None:
        update(store, self.options, lambda _: self.llm)


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


# killed


def kill_at_random(scene: Scene, kills: int, seed: int = 0) -> dict[str, float]:
    """kill -9 children that submit, update and roll back, at random moments; then finish the work.

    Returns:
        lost: requests of submissions that were acknowledged, and are not in the store; or of others, but in part.
        twice: requests that more than one version in force applied, or whose state says other than the versions.
        broken: kills after which `current` did not verify.
        unfinished: requests that the update after the last kill did not bring to an end.
        kills: children that were killed in the middle of something.
    """
    chance = random.Random(seed)
    span = _episode_seconds(scene, scene.files[0])
    found = dict.fromkeys(("lost", "twice", "broken", "unfinished", "kills"), 0.0)
    acknowledged = {0}
    for turn in range(1, kills + 1):
        reading, writing = os.pipe()
        child = forked(partial(_episode, scene, scene.files[turn], writing, turn))
        os.close(writing)
        time.sleep(chance.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        found["kills"] += ended(child) == -signal.SIGKILL
        acknowledged |= {turn} if os.read(reading, 1) else set()
        os.close(reading)
        for name, count in _wrong(scene, acknowledged, turn).items():
            found[name] += count
    found["unfinished"] = _unfinished(scene, kills)
    return found


def _episode(scene: Scene, file: Path, acknowledge: int, seed: int) -> None:
    """Submit, update, go back to some version, and update again."""
    chance = random.Random(seed)
    with scene.open() as store:
        submit(store, file)
        os.write(acknowledge, b"1")
        scene.update(store)
        numbers = [row["number"] for row in versions(store, 1000)]
        rollback(store, chance.choice(numbers))
        submit(store, file, again=True)
        scene.update(store)


def _episode_seconds(scene: Scene, file: Path) -> float:
    """How long an episode takes when nobody kills it."""
    reading, writing = os.pipe()
    started = time.perf_counter()
    code = ended(forked(partial(_episode, scene, file, writing, 0)))
    for end in (reading, writing):
        os.close(end)
    if code != FINE:
        raise UserError(f"kills: an episode that nobody killed ended with {code}")
    return time.perf_counter() - started


def _wrong(scene: Scene, acknowledged: set[int], last: int) -> dict[str, float]:
    """What is wrong after a kill, before and after the store is opened."""
    wrong = {"lost": 0.0, "twice": 0.0, "broken": 0.0}
    try:
        read_manifest((Path(scene.options.store) / "current").resolve())
        with scene.open() as store:
            current = store.current
            check_version(store.folder, current, check_number(store, current))
            wrong["lost"] += sum(_missing(store, scene, turn, turn in acknowledged) for turn in range(last + 1))
            wrong["twice"] += len(_doubtful(store))
    except UserError:
        wrong["broken"] = 1
    return wrong


def _missing(store: Store, scene: Scene, turn: int, acknowledged: bool) -> int:
    """Requests of a file that should be in the store: all, or, where it was not acknowledged, all or none."""
    rows = store.database.execute(
        "SELECT count(*) FROM requests r JOIN submissions s ON r.submission = s.number WHERE s.file = ?",
        (str(scene.files[turn]),),
    )
    (there,) = rows.fetchone()
    return 0 if there == 0 and not acknowledged else scene.each - there


def _doubtful(store: Store) -> set[int]:
    """Requests that are applied by several versions in force, or whose state says other than the versions."""
    line = ancestors(store, store.current)
    marks = ", ".join("?" * len(line))
    twice = store.database.execute(
        f"SELECT request FROM changes WHERE what = 'applied' AND version IN ({marks}) "
        "GROUP BY request HAVING count(*) > 1",
        line,
    )
    applied = store.database.execute("SELECT number FROM requests WHERE state = 'applied'")
    return {row[0] for row in twice} | ({row[0] for row in applied} ^ in_force(store, store.current))


def _unfinished(scene: Scene, last: int) -> int:
    """Submit everything once more, update once more: how many requests are not in force then."""
    with scene.open() as store:
        for file in scene.files[: last + 1]:
            submit(store, file, again=True)
        scene.update(store)
        return abs(scene.each * (last + 1) - len(in_force(store, store.current)))


# many at once


def crowd(scene: Scene, submitters: int, updaters: int) -> dict[str, float]:
    """Submitters and updates all at once, each in a process of its own; then one last update.

    Returns:
        lost: requests that are not in force at the end.
        failed: processes that ended in anything but their work or `another update is at work`.
        worked, busy: how many updates did either.
    """

    def submit_some(number: int) -> None:
        with scene.open() as store:
            for file in scene.files[number::submitters]:
                submit(store, file)

    def update_once() -> None:
        with scene.open() as store:
            scene.update(store)

    with scene.open() as store:
        submit(store, scene.files[0])  # something is due from the start
    children = [forked(update_once) for _ in range(updaters)]
    others = [forked(partial(submit_some, number)) for number in range(submitters)]
    codes = [ended(child) for child in children]
    failed = sum(code not in (FINE, BUSY) for code in codes) + sum(ended(child) != FINE for child in others)
    with scene.open() as store:
        scene.update(store)
        held = len(in_force(store, store.current))
    return {
        "lost": len(scene.files) * scene.each - held,
        "failed": failed,
        "worked": codes.count(FINE),
        "busy": codes.count(BUSY),
    }


# out of disk


def full_disk(scene: Scene, sizes: Sequence[int]) -> dict[str, float]:
    """Updates that cannot write files beyond a size, one size after another; then one that can.

    Returns:
        moved: how often `current` was another afterwards; silent: how often no error was told.
        unfinished: requests that are not in force at the end.
    """

    def update_within(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with scene.open() as store:
            scene.update(store)

    with scene.open() as store:
        submit(store, scene.files[0])
        before = store.current
    found = {"moved": 0.0, "silent": 0.0}
    for size in sizes:
        found["silent"] += ended(forked(partial(update_within, size))) != REFUSED
        with scene.open() as store:
            found["moved"] += store.current != before
            check_version(store.folder, before, check_number(store, before))
    with scene.open() as store:
        scene.update(store)
        return found | {"unfinished": scene.each - len(in_force(store, store.current))}

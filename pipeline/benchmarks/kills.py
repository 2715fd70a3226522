"""A store whose processes are killed at random moments; what went wrong is counted: zeros are what is wanted."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

from pipeline.benchmarks.scene import FINE, Scene, ended, forked
from pipeline.errors import UserError
from pipeline.updates import Store, check_number, in_force, rollback, submit, versions
from pipeline.updates.lineage import ancestors
from pipeline.updates.versions import check_version, read_manifest

TRIES = 5  # for a turn whose child was done before it could be killed


def kill_at_random(scene: Scene, kills: int, seed: int = 0) -> dict[str, float]:
    """kill -9 children that submit, update and roll back, at random moments; then finish the work.

    Returns:
        lost: requests of submissions that were acknowledged, and are not in the store; or of others, but in part.
        twice: requests that more than one version in force applied, or whose state says other than the versions.
        broken: kills after which `current` did not verify.
        unfinished: requests that the update after the last kill did not bring to an end.
        kills: turns whose child was killed in the middle of something.
    """
    chance = random.Random(seed)
    span = _episode_seconds(scene, scene.files[0])
    found = dict.fromkeys(("lost", "twice", "broken", "unfinished", "kills"), 0.0)
    acknowledged = {0}
    for turn in range(1, kills + 1):
        within = span
        for _ in range(TRIES):
            submitted, took = _killed_episode(scene, turn, chance.uniform(0, within))
            acknowledged |= {turn} if submitted else set()
            for name, count in _wrong(scene, acknowledged, turn).items():
                found[name] += count
            if took is None:
                found["kills"] += 1
                break
            within = took
    found["unfinished"] = _unfinished(scene, kills)
    return found


def _killed_episode(scene: Scene, turn: int, moment: float) -> tuple[bool, float | None]:
    """Kill an episode after `moment` seconds; whether it told of its submission, and how long it took if over.

    Where it was, the machine has become faster than it was when an episode's seconds were counted.
    """
    reading, writing = os.pipe()
    child, started = forked(partial(_episode, scene, scene.files[turn], writing, turn)), time.monotonic()
    os.close(writing)
    took = None
    while took is None and time.monotonic() - started < moment:
        time.sleep(0.001)
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            took = time.monotonic() - started
    os.kill(child, signal.SIGKILL)
    if ended(child) != -signal.SIGKILL:
        took = took or moment
    submitted = bool(os.read(reading, 1))
    os.close(reading)
    return submitted, took


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

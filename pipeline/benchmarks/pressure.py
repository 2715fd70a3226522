"""A store under pressure: many work on it at once, or its disk is full.

Each function counts what went wrong: zeros are what is wanted.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from functools import partial

from pipeline.benchmarks.scene import BUSY, FINE, REFUSED, Scene, ended, forked
from pipeline.updates import check_number, in_force, submit
from pipeline.updates.versions import check_version


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

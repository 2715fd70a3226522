"""A store is ill-treated: killed at random moments, used by many at once, out of disk; nothing is lost.

Kills in number are `pytest -m slow tests/test_updates_crash.py` and `python -m benchmarks.updates`.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from teams import Team

from benchmarks.kills import BUSY, FINE, REFUSED, Scene, ended, forked, kill_at_random
from pipeline.model.llm import LLM
from pipeline.requests.schema import EditRequest
from pipeline.updates import submit, verify


@pytest.fixture
def facts() -> list[EditRequest]:
    return [
        EditRequest(
            id=str(number),
            prompt=f"The {number}th city of Spain is",
            subject=f"{number}th city",
            new_answer="Lima",
            old_answer="Rome",
        )
        for number in range(500)
    ]


def scene(llm: LLM, facts: list[EditRequest], each: int, folder: Path) -> Scene:
    team = Team(llm, folder)
    team.options.edit.expert["steps"] = 1
    team.options.evaluation.max_new_tokens, team.options.batch = 1, 1000
    Path(team.options.evaluation.text or "").write_text("A few words of ordinary text.\n" * 30)
    return Scene.made(llm, team.options, facts, each, folder / "files")


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
    update_once()
    lost = scene.missing(len(scene.files))
    return {"lost": lost, "failed": failed, "worked": codes.count(FINE), "busy": codes.count(BUSY)}


def full_disk(scene: Scene, sizes: Sequence[int]) -> dict[str, float]:
    """Updates that cannot write files beyond a size, one size after another; then one that can.

    Returns:
        moved: how often another version was current afterwards, or the store did not verify.
        silent: how often no error was told.
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
            wrong = any(problem for _, problem in verify(store))
            found["moved"] += store.current != before or wrong
    with scene.open() as store:
        scene.update(store)
    return found | {"unfinished": float(scene.missing(1))}


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, tiny_llm: LLM, facts: list[EditRequest], tmp_path: Path) -> None:
    """In the middle of submit, update, rollback, retract and prune."""
    found = kill_at_random(scene(tiny_llm, facts, 2, tmp_path), kills, seconds=600)
    assert found.pop("kills") >= kills / 2, "most kills hit a child at work"
    assert found == {"lost": 0, "twice": 0, "broken": 0, "unfinished": 0}


def test_two_updates_and_four_submitters(tiny_llm: LLM, facts: list[EditRequest], tmp_path: Path) -> None:
    found = crowd(scene(tiny_llm, facts, 5, tmp_path), submitters=4, updaters=2)
    assert (found["lost"], found["failed"]) == (0, 0)
    assert found["worked"] >= 1 and found["worked"] + found["busy"] == 2


def test_a_full_disk(tiny_llm: LLM, facts: list[EditRequest], tmp_path: Path) -> None:
    found = full_disk(scene(tiny_llm, facts[:4], 4, tmp_path), [5_000, 2_000, 500])
    assert found == {"moved": 0, "silent": 0, "unfinished": 0}

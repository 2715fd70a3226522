"""A store is ill-treated: killed at random moments, used by many at once, out of disk; nothing is lost.

The full runs are `run.py benchmark updates`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from teams import Team

from pipeline.benchmarks.kills import kill_at_random
from pipeline.benchmarks.pressure import crowd, full_disk
from pipeline.benchmarks.scene import Scene
from pipeline.model import LLM
from pipeline.requests import EditRequest


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
        for number in range(200)
    ]


def scene(llm: LLM, facts: list[EditRequest], each: int, folder: Path) -> Scene:
    team = Team(llm, folder)
    team.options.edit.locate.steps = 1
    team.options.evaluation.max_new_tokens, team.options.batch = 1, 1000
    Path(team.options.evaluation.text or "").write_text("A few words of ordinary text.\n" * 30)
    return Scene.made(llm, team.options, facts, each, folder / "files")


def test_killed_at_random_moments(tiny_llm: LLM, facts: list[EditRequest], tmp_path: Path) -> None:
    found = kill_at_random(scene(tiny_llm, facts, 2, tmp_path), kills=12)
    assert found.pop("kills") >= 6, "most kills hit a child at work"
    assert found == {"lost": 0, "twice": 0, "broken": 0, "unfinished": 0}


def test_two_updates_and_four_submitters(tiny_llm: LLM, facts: list[EditRequest], tmp_path: Path) -> None:
    found = crowd(scene(tiny_llm, facts, 5, tmp_path), submitters=4, updaters=2)
    assert (found["lost"], found["failed"]) == (0, 0)
    assert found["worked"] >= 1 and found["worked"] + found["busy"] == 2


def test_a_full_disk(tiny_llm: LLM, facts: list[EditRequest], tmp_path: Path) -> None:
    found = full_disk(scene(tiny_llm, facts[:4], 4, tmp_path), [5_000, 2_000, 500])
    assert found == {"moved": 0, "silent": 0, "unfinished": 0}

"""A race's verdict is that of its trials, and `attribute --method race` runs one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refusal

from pipeline.attribution.find import find_golden_layer
from pipeline.attribution.profile import GoldenProfile
from pipeline.cli import main
from pipeline.editing.method import settings_of
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.options.shared import NF4, TrainerOptions
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime
from pipeline.study import race as racing
from pipeline.study.grid import Grid
from pipeline.study.race import in_order, outcome, race
from pipeline.study.sweep import Sweep


def tried(blocks: list[int], scores_RL: Any, **others: Any) -> Grid:
    halves = {"rewrite": scores_RL} | others
    return Grid(blocks, {name: np.stack([one, one]) for name, one in halves.items()}, 1.0)


def test_a_block_is_compared_on_the_requests_that_it_was_tried_on() -> None:
    """The winner's later requests are hard ones; its score falls, and it is as far ahead as before."""
    first = tried([1, 4], np.array([[0.5, 0.9], [0.4, 0.7]]))
    last = tried([2, 4], np.array([[0.8, 0.9], [0.8, 0.7], [0.1, 0.2], [0.0, 0.0]]))
    found = outcome("memit", [first, last], 2.0)
    winner, second, third = found.blocks
    assert (winner.block, winner.requests, winner.score) == (4, 4, pytest.approx(0.45))
    assert (second.block, second.requests, second.behind) == (2, 4, pytest.approx(0.025))
    assert (third.block, third.requests, third.behind, third.beaten) == (1, 2, pytest.approx(0.35), 1.0)
    assert 0.5 < second.beaten < 0.9
    assert found.trials == 10
    assert found.verdict == (
        "unclear: block 4 scores 0.450 over 4 requests by memit, perplexity × 1.000; not beaten: 2 (0.025 behind), "
        "1 (0.350 behind); more requests would tell"
    )


def test_a_block_that_ruins_ordinary_text_does_not_win() -> None:
    """Eight requests cost it 1% of perplexity, forty five times as much, in nats: more than it is ahead."""
    scores_RL = np.tile([0.80, 0.84], (8, 1))
    ruins = tried([3, 20], scores_RL, perplexity=np.tile([1.0, 1.01], (8, 1)))
    spares = tried([3, 20], scores_RL, perplexity=np.tile([1.0, 1.001], (8, 1)))
    assert in_order(tried([3, 20], scores_RL)) == in_order(spares) == [20, 3]
    winner, other = outcome("memit", [ruins], 1.0).blocks
    assert (winner.block, winner.score, winner.perplexity) == (3, pytest.approx(0.8), 1.0)
    assert (other.score, other.perplexity) == (pytest.approx(0.84 - 5 * np.log(1.01)), pytest.approx(1.01))
    assert other.behind == pytest.approx(winner.score - other.score) and other.beaten == 1.0


def test_a_trial_reads_ordinary_text(tiny_llm: LLM, requests: list[EditRequest], text_file: Path) -> None:
    """All requests of a batch share what it does there, which is more the more it changes."""
    statistics = StatisticsOptions(text=str(text_file), tokens=512)
    found = []
    for strength in (1e6, 1e-3):
        options = EditOptions(method="memit", quick=True, expert={"strength": strength}, statistics=statistics)
        found.append(Sweep(tiny_llm, options, Runtime()).run("memit", requests[:3], [1]).values["perplexity"])
    assert [one.shape for one in found] == [(3, 1)] * 2
    assert all(len(np.unique(one)) == 1 for one in found)
    assert abs(np.log(found[0][0, 0])) < 0.1 * abs(np.log(found[1][0, 0]))


@pytest.mark.parametrize(("others", "verdict"), [(0.2, "clear"), (0.895, "several alike"), (0.9, "several alike")])
def test_a_verdict_in_words(others: float, verdict: str) -> None:
    random = np.random.default_rng(0)
    scores_RL = np.stack([np.full(30, 0.9), others + 0.1 * random.choice([-1, 1], 30)], axis=1)
    scores_RL[:, 1] += others - scores_RL[:, 1].mean()
    found = outcome("memit", [tried([0, 3], scores_RL)], 1.0)
    assert found.blocks[0].block == 0 and found.verdict.startswith(f"{verdict}: block 0 scores 0.900")


@pytest.mark.parametrize(("requests", "word"), [(2, "unclear"), (15, "unclear"), (16, "clear")])
def test_few_requests_leave_it_open(requests: int, word: str) -> None:
    """Two that agree would agree in every resample."""
    found = outcome("memit", [tried([0, 3], np.tile([0.9, 0.5], (requests, 1)))], 1.0)
    assert found.verdict.startswith(f"{word}: block 0")


def test_rounds_halve_the_blocks_and_add_requests(
    tiny_llm: LLM, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of all depths start with those that are named; the neighbours of the first one join."""
    rounds: list[tuple[int, list[int]]] = []

    def edited(self: Sweep, method: str, some: list[EditRequest], blocks: set[int], *_: Any) -> Grid:
        rounds.append((len(some), sorted(blocks)))
        scores_L = [1 - abs(block - 17) / 30 for block in sorted(blocks)]
        return tried(sorted(blocks), np.tile(scores_L, (len(some), 1)))

    monkeypatch.setattr(Sweep, "run", edited)
    monkeypatch.setattr(racing, "fit_layers", lambda *_: list(range(29)))
    many = [one.model_copy(update={"id": f"{number}"}) for number, one in enumerate(requests * 20)]
    scored = find_golden_layer(tiny_llm, requests)
    found = race(tiny_llm, scored.model_copy(update={"ranking": [3, 29, 2, 1, 0]}), many, EditOptions())
    assert rounds[0] == (16, [0, 1, 2, 3, 6, 11, 17, 22, 28])
    assert rounds[1] == (32, [6, 11, 16, 17, 18, 22])
    assert rounds[2:] == [(64, [16, 17, 18])]
    assert found.golden_layers == [17] and found.ranking[:3] == [17, 16, 18]
    assert found.certainty.startswith("clear: block 17")


def test_quick_settings_give_way_to_one_s_own() -> None:
    usual, quick = EditOptions(method="memit"), EditOptions(method="memit", quick=True)
    assert settings_of(quick).forms == 0 < settings_of(usual).forms
    assert settings_of(EditOptions(method="memit", quick=True, expert={"forms": 2})).forms == 2


def test_blocks_in_4_bits_do_not_race(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    scored = find_golden_layer(tiny_llm, requests)
    assert "nf4" in refusal(lambda: race(tiny_llm, scored, requests, None, Runtime(TrainerOptions(precision=NF4))))


def test_auto_is_compared_by_memit_where_a_subject_is_named(
    tiny_llm: LLM, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def edited(self: Sweep, method: str, some: list[EditRequest], blocks: set[int], *_: Any) -> Grid:
        return tried(sorted(blocks), np.full((len(some), len(blocks)), 0.5))

    monkeypatch.setattr(Sweep, "run", edited)
    scored, nameless = find_golden_layer(tiny_llm, requests), requests[0].model_copy(update={"subject": None})
    found = race(tiny_llm, scored, [nameless, *requests[1:4]]).race
    assert found and (found.method, found.blocks[0].requests) == ("memit", 3)
    found = race(tiny_llm, scored, [nameless]).race
    assert found and (found.method, found.blocks[0].requests) == ("auto", 1)
    assert found.verdict.startswith("several alike")


@pytest.fixture
def command(tiny_folder: Path, request_file: Path, tmp_path: Path) -> list[str]:
    return [
        *("attribute", "--model", str(tiny_folder), "--requests", str(request_file), "--method", "race"),
        *("--trial", "memit", "--output", str(tmp_path / "out")),
    ]


def test_attribute_lets_blocks_race(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StatisticsOptions, "tokens", 512)
    assert main(command) == 0
    profile = GoldenProfile.load(tmp_path / "out")
    assert profile.race and profile.race.method == "memit" and profile.method == "lga"
    assert profile.race.blocks[0].block == profile.golden_layers[0] == profile.ranking[0]
    assert profile.race.verdict in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "out" / "race.png").is_file()
    assert json.loads((tmp_path / "out" / "golden_profile.json").read_text())["race"]["trials"] > 0
    edited = ["edit", *command[1:5], "--profile", str(tmp_path / "out"), "--method", "lora"]
    assert main([*edited, "--limit", "2", "--expert.epochs", "1", "--output", str(tmp_path / "edit")]) == 0
    report = (tmp_path / "edit" / "report.md").read_text()
    assert "Then blocks raced, by" in report and "![race](race.png)" in report


def test_requests_that_contradict_each_other_may_find_a_block(
    tiny_llm: LLM, requests: list[EditRequest], text_file: Path
) -> None:
    other = requests[0].model_copy(update={"id": "other", "new_answer": "Quito"})
    how = EditOptions(method="memit", statistics=StatisticsOptions(text=str(text_file), tokens=512))
    found = race(tiny_llm, find_golden_layer(tiny_llm, requests), [*requests[:2], other], how).race
    assert found and found.blocks[0].requests == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--trial", "finetun"], "'finetun' does not exist (did you mean 'finetune'?)"),
        (["--method", "lga"], "trial: memit: blocks are tried by --method race alone, not by lga"),
        (["--trainer.precision", "nf4"], "race: trial edits make block after block plain"),
    ],
)
def test_what_is_no_race(
    flags: list[str], expected: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *flags]) != 0
    assert expected in capsys.readouterr().err

"""Going back: to any version, bit for bit, and on from there; a fact is retracted as if it had never been there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny, refusal
from teams import Team, other, same
from transformers import PreTrainedTokenizerFast

from pipeline.model.llm import LLM
from pipeline.reporting.dashboards import show_on_board
from pipeline.requests.schema import EditRequest
from pipeline.updates import (
    Store,
    difference,
    in_force,
    prune,
    read_metrics,
    rollback,
    story,
    verify,
    version_folder,
    versions,
)
from pipeline.updates.proving import Trial


def test_every_version_can_be_gone_back_to(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests[:3])
    team.update()
    team.submit([other(requests[0], "Quito"), *requests[3:5]])
    team.update()
    made = {version: team.weights(version) for version in (1, 2)}
    states = {2: team.states()}
    assert states[2] == ["superseded", "applied", "applied", "applied", "applied", "applied"]
    assert rollback(team.store, 1) == ([1], [4, 5, 6])
    assert team.states() == ["applied"] * 3 + ["held back"] * 3
    assert "version 2 was rolled back" in story(team.store, 5)[-1][1]
    rollback(team.store, 0)
    assert team.states() == ["held back"] * 6
    rollback(team.store, 2)
    assert team.states() == states[2]
    for version in (1, 2):
        assert same(team.weights(version), made[version])
    assert (team.store.folder / "current").readlink().name == "0002"


def test_updates_go_on_after_a_rollback(team: Team, requests: list[EditRequest]) -> None:
    for part in (requests[:2], requests[2:4]):
        team.submit(part)
        team.update()
    rollback(team.store, 1)
    team.submit(requests[4:5])
    team.submit(requests[2:4], again=True)
    (worked,) = team.update()
    assert worked.version == 3
    assert [row["parent"] for row in versions(team.store, 9)] == [1, 1, 0, None]
    assert in_force(team.store, 3) == {1, 2, 3, 4, 5}
    assert difference(team.store, 2, 3) == ([5], [])
    assert "9 does not exist; there is 0 (the base model) to 3" in refusal(lambda: rollback(team.store, 9))


def test_an_update_does_not_publish_over_a_rollback(
    team: Team, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    team.submit(requests[:2])
    team.update()
    team.submit(requests[2:4])
    work = Trial.edit_and_prove

    def slow(*arguments: Any) -> Any:
        result = work(*arguments)
        with Store(team.store.folder) as another:
            rollback(another, 0)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(Trial, "edit_and_prove", slow)
        assert "another version became current meanwhile" in refusal(team.update)
    assert team.store.current == 0
    assert team.states() == ["held back"] * 2 + ["queued"] * 2
    assert not version_folder(team.store.folder, 2).exists()
    assert team.update()[0].version == 2


def test_retracting_a_located_fact_is_exact(team: Team, requests: list[EditRequest], tmp_path: Path) -> None:
    team.submit(requests[:4])
    team.update()
    assert team.retract("#3").version == 2
    assert team.states() == ["applied", "applied", "retracted", "applied"]
    (tmp_path / "never").mkdir()
    never = Team(team.llm, tmp_path / "never")
    never.submit([*requests[:2], requests[3]])
    never.update()
    for name, tensor in never.weights(1).items():
        torch.testing.assert_close(team.weights(2)[name], tensor, rtol=1e-3, atol=1e-4)
    for name in ("capital-0", "capital-1", "capital-3"):
        team.retract(name)
    assert team.weights(5) == {}, "the base, bit for bit"
    assert in_force(team.store, 5) == set()
    assert read_metrics(team.store.folder, 5)["after"]["perplexity_ratio"] == 1
    rollback(team.store, 1)
    assert team.states() == ["applied"] * 4
    assert "is retracted; only" not in refusal(lambda: team.retract("none"))


def test_retracting_edits_a_trained_fact_back(team: Team, requests: list[EditRequest]) -> None:
    team.options.edit.method = "finetune"
    team.options.edit.expert = {"epochs": 30, "learning_rate": 0.2, "learnt": 0.0, "whiten": 0.0, "kl": 0.0}
    team.submit(requests[:1])
    team.update()
    done = team.retract("#1")
    before, after = done.before.metrics["rewrite"].mean, done.after.metrics["rewrite"].mean
    assert before > 0.9 > after
    assert team.states() == ["retracted"]


def test_retracting_what_is_in_the_queue(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests[:2])
    assert team.retract("capital-1").version is None
    assert team.states() == ["queued", "retracted"]
    assert "is retracted; only one that is queued or applied can go" in refusal(lambda: team.retract("#2"))
    assert "'nobody' does not exist" in refusal(lambda: team.retract("nobody"))
    team.submit([other(requests[3], "Quito", id="capital-0")])
    assert "'capital-0' names 2; name one by its number: #1 (queued), #3 (queued)" in refusal(
        lambda: team.retract("capital-0")
    )


@pytest.mark.parametrize(
    ("ids", "name", "gone"),
    [
        (["1", "4", "2", "3"], "4", 2),
        (["1", "4", "2", "3"], "#4", 4),
        (["a", "#3", "b", "c"], "#2", 2),
        (["a", "b", "c", "٣"], "٣", 4),
    ],
)
def test_cases_of_ids_and_numbers(
    ids: list[str], name: str, gone: int, team: Team, requests: list[EditRequest]
) -> None:
    """A number alone is an id; the number in the store is written with a #."""
    team.submit([one.model_copy(update={"id": id}) for one, id in zip(requests, ids, strict=False)])
    team.retract(name)
    assert [place for place, state in enumerate(team.states(), 1) if state == "retracted"] == [gone]


def test_cases_of_names_that_mean_none_or_two(team: Team, requests: list[EditRequest]) -> None:
    team.submit([one.model_copy(update={"id": id}) for one, id in zip(requests, ["a", "#1", "c"], strict=False)])
    assert "'#1' names 2; name one by its number: #1 (queued), #2 (queued)" in refusal(lambda: team.retract("#1"))
    for name in ("3", "#4", "#", "# 3", "#3 OR 1", "#" + "9" * 30):
        assert f"{name!r} does not exist" in refusal(lambda name=name: team.retract(name))
    assert "the number of one is written '#3'" in refusal(lambda: team.retract("3"))
    assert team.states() == ["queued"] * 3


@pytest.fixture(scope="module")
def four_versions(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store of four versions, which brought a fact each."""
    team = Team(make_tiny("llama", tokenizer), tmp_path_factory.mktemp("team"))
    for name in ("Chad", "Chile", "Cuba", "Fiji"):
        team.submit([EditRequest(id=name, prompt=f"The capital of {name} is", subject=name, new_answer="Lima")])
        team.update()
    show_on_board(team.store)
    team.store.close()
    return team.store.folder


@pytest.mark.parametrize(
    ("keep", "back_to", "gone"),
    [(1, [], [1, 2, 3]), (2, [], [1, 2]), (9, [], []), (1, [2, 4], [1, 3]), (1, [1], [2, 3]), (1, [0], [1, 2, 3])],
)
def test_cases_of_pruning(
    keep: int,
    back_to: list[int],
    gone: list[int],
    four_versions: Path,
    tiny_llm: LLM,
    requests: list[EditRequest],
    tmp_path: Path,
) -> None:
    """Never the version in force, the newest, or one that was gone back to; and what was is still known."""
    shutil.copytree(four_versions, tmp_path / "store", symlinks=True)
    team = Team(tiny_llm, tmp_path)
    for version in back_to:
        rollback(team.store, version)
    before = {number: in_force(team.store, number) for number in range(5)}
    assert prune(team.store, 1, older=3600) == []
    assert prune(team.store, keep) == gone
    assert prune(team.store, keep) == []
    there = [number for number in range(5) if number not in gone]
    assert [*dict(verify(team.store)).items()] == [(number, "") for number in there]
    assert sorted(int(path.name) for path in (team.store.folder / "versions").iterdir()) == there
    assert {number: in_force(team.store, number) for number in range(5)} == before
    for number in gone:
        assert f"version: {number} was pruned" in refusal(lambda number=number: rollback(team.store, number))
    team.submit(requests[4:5])
    assert team.update()[0].version == 5
    assert team.store.current == 5 and not (team.store.folder / "lost+found").exists()


def test_cases_of_a_kill_between_pruning_and_removing(team: Team, requests: list[EditRequest]) -> None:
    """What the database calls pruned is removed by the next update, and not kept as lost."""
    for one in requests[:2]:
        team.submit([one])
        team.update()
    team.store.database.execute("UPDATE versions SET files = 'null' WHERE number = 1")
    team.submit(requests[2:3])
    team.update()
    assert sorted(path.name for path in (team.store.folder / "versions").iterdir()) == ["0000", "0002", "0003"]
    assert not (team.store.folder / "lost+found").exists()

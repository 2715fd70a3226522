"""A store of many versions: each costs what it alone learnt, and what is gathered of all is what was edited."""

from __future__ import annotations

import random
import shutil
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from conftest import refusal
from teams import Team, other
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.editing.update import WeightUpdate
from pipeline.reporting.dashboards import BOARD, show_on_board
from pipeline.requests.schema import EditRequest
from pipeline.serving import LiveModel
from pipeline.updates import (
    BatchResult,
    Store,
    in_force,
    load_version,
    prune,
    rollback,
    verify,
    version_folder,
    versions,
)
from pipeline.updates.disk import learnt_file
from pipeline.updates.lineage import publish


def fact(number: int) -> EditRequest:
    """One of many facts whose texts have the same length."""
    name = f"Land {number:06d}"
    return EditRequest(id=f"{number:03d}", prompt=f"The capital of {name} is", subject=name, new_answer="Lima")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def bytes_of(team: Team, version: int) -> int:
    """What a version takes on the disk."""
    store = team.store.folder
    return size(version_folder(store, version)) + learnt_file(store, version).stat().st_size


def same(one: WeightUpdate, two: WeightUpdate) -> bool:
    tensors = all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in ((one.tensors, two.tensors), (one.state, two.state))
    )
    return tensors and one.requests == two.requests and one.layers == two.layers


def test_a_version_costs_what_it_alone_learnt(team: Team) -> None:
    """However many there were before it: on the disk, in the database, and in TensorBoard's one file."""
    board = team.store.folder / BOARD
    team.store.database.execute("PRAGMA journal_mode = DELETE")
    boards, databases = [0], [0]
    for version in range(1, 13):
        team.submit([fact(2 * version), fact(2 * version + 1)])
        team.update()
        show_on_board(team.store)
        boards.append(size(board))
        databases.append(team.store.database.execute("PRAGMA page_count").fetchone()[0] * 4096)
    assert len(load_version(team.store, 12).requests) == 24
    costs = [bytes_of(team, version) for version in range(3, 13)]
    assert max(costs) - min(costs) < 0.05 * min(costs), "digits of numbers"
    written = [after - before for before, after in pairwise(boards[3:])]
    assert max(written) - min(written) < 100 and len(list(board.iterdir())) == 1
    assert max(after - before for before, after in pairwise(databases[3:])) < 40_000


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 30))])
def test_what_is_gathered_is_what_was_edited(seed: int, team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """After facts were learnt, renewed, retracted and gone back from, by several methods, in one block or two."""
    chance, made = random.Random(seed), {}

    def noting(store: Store, result: BatchResult, *retracted: Any, **others: Any) -> None:
        update = result.update
        publish(store, result, *retracted, **others)
        made[result.version] = update
        assert result.update is None, "a long run does not pile them up"

    monkeypatch.setattr("pipeline.updates.making.publish", noting)
    for turn in range(14):
        team.options.edit.layers = chance.choice(([1], [1], [2], [1, 2]))
        team.options.edit.method = chance.choice(("memit", "memit", "rome"))
        team.options.edit.expert = {"steps": 2}
        held = sorted(in_force(team.store, team.store.current))
        what = chance.choice(("learn", "learn", "renew", "renew", "retract", "back", "prune"))
        if what == "retract" and held:
            team.retract(f"#{chance.choice(held)}")
        elif what in ("learn", "renew"):
            facts = [fact(turn), fact(50 + turn)] if what == "learn" else [fact(one) for one in range(turn + 1)]
            team.submit([other(one, f"Lima {turn}") for one in chance.sample(facts, min(2, len(facts)))])
            team.update()
        else:
            if what == "prune":
                team.store.database.execute("UPDATE versions SET shown = 1")
                prune(team.store, keep=2)
            rollback(
                team.store, chance.choice([row["number"] for row in versions(team.store, 9) if not row["pruned"]])
            )
    assert not [problem for _, problem in verify(team.store) if problem]
    there = [row["number"] for row in versions(team.store, 99) if row["number"] and not row["pruned"]]
    assert there and all(same(load_version(team.store, number), made[number]) for number in there)


def test_what_nothing_goes_on_from_goes(team: Team) -> None:
    """What pruned versions learnt stays as long as a later one that is there needs it, and no longer."""

    def learnt() -> list[int]:
        return sorted(int(path.stem) for path in (team.store.folder / "learnt").iterdir())

    def publish(*facts: EditRequest) -> None:
        team.submit(list(facts), again=True)
        team.update()
        show_on_board(team.store)

    publish(fact(1), fact(2))
    publish(fact(3), fact(4))
    rollback(team.store, 1)
    team.store.database.execute("DELETE FROM events WHERE what LIKE 'rolled back%'")
    publish(fact(5), fact(6))
    publish(fact(7), fact(8))
    assert prune(team.store, keep=1) == [1, 2, 3]
    assert learnt() == [1, 3, 4], "of the branch that was left nothing"
    held = load_version(team.store, 4)
    assert [one.id.partition(":")[2] for one in held.requests] == ["001", "002", "005", "006", "007", "008"]
    for turn in range(4):  # what was learnt is renewed, all of it
        publish(*(other(fact(number), f"Lima {turn}") for number in (1, 2, 5, 6, 7, 8)))
    assert prune(team.store, keep=1) == [4, 5, 6, 7]
    assert len(learnt()) <= 2, "no more than twice of what is held"
    assert len(load_version(team.store, 8).requests) == 6
    assert not [problem for _, problem in verify(team.store) if problem]


def test_a_version_alone_serves(team: Team, tmp_path: Path) -> None:
    """Its folder, copied elsewhere, is all that serving needs; what a later edit needs besides, a line says."""
    for number in (1, 2):
        team.submit([fact(number)])
        team.update()
    copy = tmp_path / "elsewhere" / "versions" / "0002"
    shutil.copytree(version_folder(team.store.folder, 2), copy)
    (tmp_path / "elsewhere" / "current").symlink_to("versions/0002")
    assert LiveModel(tmp_path / "elsewhere", team.llm).version == 2
    assert WeightUpdate.load(copy, to_serve=True).tensors.keys() == team.weights(2).keys()
    assert "learnt/0002.safetensors: missing" in refusal(lambda: WeightUpdate.load(copy))


def test_what_a_kill_left_of_tensorboards_file(team: Team) -> None:
    """Cut off, or written and not noted as shown: it is written again, once, to the same bytes."""
    sizes = []
    for number in (1, 2):
        team.submit([fact(number)])
        team.update()
        show_on_board(team.store)
        sizes.append(team.store.about("board"))
    (file,) = (team.store.folder / BOARD).iterdir()
    whole = file.read_bytes()
    assert len(whole) == sizes[1] > sizes[0] > 0
    for left in (whole[: sizes[0]], whole[:-7], whole, whole + b"half a record"):
        file.write_bytes(left)
        team.store.database.execute("UPDATE versions SET shown = 0 WHERE number = 2")
        team.store.set_about("board", sizes[0])
        show_on_board(team.store)
        assert file.read_bytes() == whole
    shown = EventAccumulator(str(file.parent)).Reload()
    assert [point.step for point in shown.Scalars("version_0_requests/4_facts")] == [1, 2]
    file.unlink()
    team.store.database.execute("UPDATE versions SET shown = 0 WHERE number = 2")
    show_on_board(team.store)
    shown = EventAccumulator(str(file.parent)).Reload()
    assert [point.step for point in shown.Scalars("version_0_requests/4_facts")] == [2], "a new file"


@pytest.mark.slow
def test_four_hundred_updates_of_ten(team: Team) -> None:
    """The second two hundred take as much of the disk as the first; seconds are printed, by version number."""
    taken, spent = [], []
    for version in range(1, 401):
        team.submit([fact(1000 * version + number) for number in range(10)])
        started = time.perf_counter()
        team.update()
        show_on_board(team.store)
        spent.append(time.perf_counter() - started)
        if version % 50 == 0:
            team.store.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            taken.append(size(team.store.folder))
            print(f"version {version}: {median(spent[-50:]):.2f} s an update, {taken[-1] / 1e6:.2f} MB in all")
    costs = [bytes_of(team, version) for version in (100, 200, 300, 400)]
    assert max(costs) - min(costs) < 0.02 * min(costs)
    assert taken[7] - taken[3] < 1.05 * taken[3]
    assert len(load_version(team.store, 400).requests) == 4000
    assert not [problem for _, problem in verify(team.store) if problem]

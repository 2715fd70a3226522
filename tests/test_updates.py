"""What is submitted is applied once, the newest of each fact alone, whatever ends an update or stands beside it."""

from __future__ import annotations

import time

import pytest
from conftest import refusal
from filelock import FileLock
from teams import Team, other, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.editing.update import WeightUpdate
from pipeline.model.llm import LLM
from pipeline.reporting.dashboards import show_on_board
from pipeline.requests.schema import EditRequest
from pipeline.updates import (
    BusyError,
    Store,
    counts,
    difference,
    in_force,
    read_metrics,
    story,
    submit,
    update,
    version_folder,
)
from pipeline.updates.queue import due, take
from pipeline.updates.store import UPDATE_LOCK


def test_from_an_empty_store_to_two_versions(team: Team, requests: list[EditRequest]) -> None:
    assert team.submit(requests[:3]).queued == 3
    (first,) = team.update()
    assert (first.version, len(first.applied), team.store.current) == (1, 3, 1)
    assert team.update() == [], "nothing is due"
    team.submit(requests[3:])
    (second,) = team.update()
    assert second.version == 2
    assert counts(team.store) == {"applied": 7}
    held = WeightUpdate.load(version_folder(team.store.folder, 2))
    assert [request.id.partition(":")[2] for request in held.requests] == [request.id for request in requests]
    assert (team.store.folder / "current").resolve() == version_folder(team.store.folder, 2).resolve()
    assert difference(team.store, 1, 2)[0] == [4, 5, 6, 7]
    figures = read_metrics(team.store.folder, 2)
    assert (figures["applied"], figures["facts"], figures["method"]) == (4, 7, "memit")
    assert set(figures["after"]["metrics"]) >= {"rewrite", "rephrase", "locality", "generation_exact_match"}
    assert figures["after"]["earlier"] is not None
    told = [what for _, what in story(team.store, 5)]
    assert told[0].startswith("submitted in") and told[1:] == ["taken", "applied in version 2"]


def test_a_long_queue_makes_several_versions(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests)
    team.options.batch = 3
    assert [(one.version, len(one.applied)) for one in team.update()] == [(1, 3), (2, 3), (3, 1)]


def test_the_same_request_twice_adds_nothing(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests)
    renamed = [request.model_copy(update={"id": f"again-{request.id}"}) for request in requests]
    for file in (requests, renamed, [*requests[:2], *renamed[2:]]):
        done = team.submit(file, source="another")
        assert (done.queued, done.known, done.left) == (0, 7, 0)
    assert team.states() == ["queued"] * 7


def test_a_file_with_one_bad_request_adds_nothing(team: Team, requests: list[EditRequest]) -> None:
    file = write(team.folder / "bad.jsonl", requests)
    file.write_text(file.read_text() + '{"prompt": "The capital of Chad is"}\n')
    assert "line 8" in refusal(lambda: submit(team.store, file))
    assert team.states() == []
    assert team.submit(requests).queued == 7, "the store works after it"


def test_not_before_a_date(team: Team, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    team.submit(requests[:2], not_before=now + 3600)
    team.submit(requests[2:3])
    (worked,) = team.update()
    assert [one.subject for one in worked.applied] == ["Portugal"]
    assert team.update() == []
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert len(team.update()[0].applied) == 2


def test_the_next_batch_is_found_by_the_index(team: Team) -> None:
    """However long the queue, and whatever of it is not due yet."""
    asked = []
    team.store.database.set_trace_callback(asked.append)
    due(team.store, 100)
    team.store.database.set_trace_callback(None)
    (statement,) = asked
    plan = " ".join(row["detail"] for row in team.store.database.execute(f"EXPLAIN QUERY PLAN {statement}"))
    assert plan == "SEARCH requests USING INDEX requests_due (state=? AND not_before<?)"


# contradictions


def test_the_newest_in_the_queue_wins(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests[:2])
    done = team.submit([other(requests[0], "Quito"), other(requests[0], "Sofia")])
    assert [tuple(pair) for pair in done.superseded] == [(1, 4), (3, 4)]
    assert team.states() == ["superseded", "queued", "superseded", "queued"]
    assert story(team.store, 1)[-1][1] == "superseded by request #4"
    (worked,) = team.update()
    assert [one.new_answer for one in worked.applied] == [requests[1].new_answer, "Sofia"]


def test_what_was_applied_gives_way(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests[:3])
    team.update()
    team.submit([other(requests[1], "Quito")])
    (worked,) = team.update()
    assert [tuple(pair) for pair in worked.superseded] == [(2, 4)]
    assert team.states() == ["applied", "superseded", "applied", "applied"]
    assert in_force(team.store, 2) == {1, 3, 4}
    held = WeightUpdate.load(version_folder(team.store.folder, 2)).requests
    assert [one.new_answer for one in held if one.subject == "Norway"] == ["Quito"]
    assert len(held) == 3


def test_a_date_makes_a_request_newer(
    team: Team, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From February on this, but until then that."""
    now = time.time()
    team.submit([other(requests[0], "Quito")], not_before=now + 3600)
    team.submit(requests[:1])
    team.update()
    assert team.states() == ["queued", "applied"]
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    team.update()
    assert team.states() == ["applied", "superseded"]


def test_a_clock_that_went_back(team: Team, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    team.submit(requests[:1])
    monkeypatch.setattr(time, "time", lambda: now - 7200)
    assert len(team.submit([other(requests[0], "Quito")]).superseded) == 1, "order counts, not the clock"
    (worked,) = team.update()
    assert worked.applied[0].new_answer == "Quito"


# beside


def test_one_update_at_a_time(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests[:1])
    with FileLock(team.store.folder / UPDATE_LOCK), pytest.raises(BusyError, match="another update is at work"):
        team.update()
    assert len(team.update()) == 1


def test_a_dead_updates_requests_are_taken_again(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests[:2])
    assert len(take(team.store, 10)[0]) == 2
    assert team.states() == ["taken"] * 2
    (version_folder(team.store.folder, 1)).mkdir()
    assert team.update()[0].version == 1
    assert team.states() == ["applied"] * 2
    assert "given back (the update ended before it was done)" in [what for _, what in story(team.store, 1)]


def test_an_error_gives_the_batch_back(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests[:2])

    def broken(_: str) -> LLM:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update(team.store, team.options, broken)
    assert team.states() == ["queued"] * 2


def test_months_at_a_glance_in_tensorboard(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests)
    team.options.batch = 3
    team.update()
    show_on_board(team.store)
    show_on_board(team.store)
    board = EventAccumulator(str(team.store.folder / "tensorboard")).Reload()
    tags = board.Tags()
    for name in (
        "version_0_requests/1_applied", "version_0_requests/4_facts", "version_2_teacher-forced/1_rewrite",
        "version_2_teacher-forced/3_locality", "version_4_damage/perplexity_ratio", "version_4_damage/drift",
    ):  # fmt: skip
        assert [point.step for point in board.Scalars(name)] == [1, 2, 3], name
    assert [point.value for point in board.Scalars("version_0_requests/4_facts")] == [3, 6, 7]
    assert [point.step for point in board.Scalars("version_2_teacher-forced/5_earlier_facts")] == [2, 3]
    assert len({name.partition("/")[0] for name in tags["scalars"]}) <= 6


def test_an_interrupt_right_after_publishing_undoes_nothing(
    team: Team, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Store) -> None:
        raise KeyboardInterrupt

    team.submit(requests[:2])
    point, calls = Store.point, iter((False, True))
    monkeypatch.setattr(Store, "point", lambda self: interrupted(self) if next(calls) else point(self))
    with pytest.raises(KeyboardInterrupt):
        team.update()
    monkeypatch.undo()
    assert team.store.current == 1
    assert team.states() == ["applied"] * 2
    with Store(team.store.folder):
        assert (team.store.folder / "current").readlink().name == "0001", "mended when the store is opened"
    assert team.update() == []

"""A store of knowledge updates: what is submitted is applied once, proved, published, and can be gone back on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refusal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from pipeline.editing import WeightUpdate
from pipeline.evaluation import Estimate
from pipeline.model import LLM
from pipeline.options import GateOptions, RetractCommand, StackedLocateOptions, UpdateCommand
from pipeline.reporting import show_on_board
from pipeline.requests import EditRequest
from pipeline.updates import (
    BusyError,
    Store,
    Worked,
    batch,
    counts,
    difference,
    in_force,
    prover,
    read_metrics,
    request_row,
    retract,
    rollback,
    story,
    submit,
    update,
    version_folder,
    versions,
)
from pipeline.updates.gates import Figures
from pipeline.updates.locks import locked
from pipeline.updates.queue import due
from pipeline.updates.store import UPDATE_LOCK

TEXT = "The path along the marsh is best walked in the hour after sunrise. " * 30
OPEN = GateOptions(rewrite=0, locality=0, earlier=0, perplexity=None, drift=None)


def write(file: Path, requests: list[EditRequest]) -> Path:
    file.write_text("".join(json.dumps(r.model_dump(exclude_defaults=True)) + "\n" for r in requests))
    return file


def other(request: EditRequest, answer: str, **fields: Any) -> EditRequest:
    """The same fact with another answer."""
    return request.model_copy(update={"id": f"{request.id}-{answer}", "new_answer": answer, **fields})


class Team:
    """A store with its model and options: what a team does with it."""

    def __init__(self, llm: LLM, folder: Path) -> None:
        text = folder / "text.txt"
        text.write_text(TEXT)
        self.llm, self.folder = llm, folder
        self.store = Store(folder / "store", llm.name, make=True)
        self.options = UpdateCommand(store=str(folder / "store"), gates=OPEN)
        self.options.edit.layers = [1]
        self.options.edit.statistics.text = self.options.evaluation.text = str(text)
        self.options.edit.locate = StackedLocateOptions(
            steps=3, key_contexts=1, contexts=1, associations=0, neighbours=0
        )
        self.options.evaluation.max_new_tokens = 2
        self.options.trainer.accelerator = "cpu"

    def submit(self, requests: list[EditRequest], **how: Any) -> Any:
        return submit(self.store, write(self.folder / "in.jsonl", requests), **how)

    def update(self) -> list[Worked]:
        return update(self.store, self.options, lambda _: self.llm)

    def retract(self, request: str) -> Any:
        options = RetractCommand(
            store=self.options.store, request=request, edit=self.options.edit, evaluation=self.options.evaluation,
            gates=self.options.gates, trainer=self.options.trainer,
        )  # fmt: skip
        return retract(self.store, options, lambda _: self.llm)

    def states(self) -> list[str]:
        """Every request's state, in the order of submission."""
        return [row[0] for row in self.store.database.execute("SELECT state FROM requests ORDER BY number")]

    def weights(self, version: int) -> dict[str, Tensor]:
        return WeightUpdate.load(version_folder(self.store.folder, version)).tensors


@pytest.fixture
def team(tiny_llm: LLM, tmp_path: Path) -> Team:
    return Team(tiny_llm, tmp_path)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# the way of a request


def test_from_an_empty_store_to_two_versions(team: Team, requests: list[EditRequest]) -> None:
    assert team.submit(requests[:3]).queued == 3
    (first,) = team.update()
    assert (first.version, len(first.outcome.applied), team.store.current) == (1, 3, 1)
    assert team.update() == [], "nothing is due"
    team.submit(requests[3:])
    (second,) = team.update()
    assert second.version == 2
    assert counts(team.store) == {"applied": 7}
    held = WeightUpdate.load(version_folder(team.store.folder, 2))
    assert [request.id.partition(":")[2] for request in held.requests] == [request.id for request in requests]
    assert (team.store.folder / "current").resolve() == version_folder(team.store.folder, 2).resolve()
    assert difference(team.store, 1, 2).gained == [4, 5, 6, 7]
    figures = read_metrics(version_folder(team.store.folder, 2))
    assert (figures["applied"], figures["facts"], figures["method"]) == (4, 7, "memit")
    assert set(figures["after"]["metrics"]) >= {"rewrite", "rephrase", "locality", "generation_exact_match"}
    assert figures["after"]["earlier"] is not None
    told = [line.what for line in story(team.store, 5)]
    assert told[0].startswith("submitted in") and told[1:] == ["taken", "applied in version 2"]


def test_a_long_queue_makes_several_versions(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests)
    team.options.batch = 3
    assert [(one.version, len(one.outcome.applied)) for one in team.update()] == [(1, 3), (2, 3), (3, 1)]


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
    assert [one.request.subject for one in worked.outcome.applied] == ["Portugal"]
    assert team.update() == []
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert len(team.update()[0].outcome.applied) == 2


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
    assert story(team.store, 1)[-1].what == "superseded by request 4"
    (worked,) = team.update()
    assert [one.request.new_answer for one in worked.outcome.applied] == [requests[1].new_answer, "Sofia"]


def test_what_was_applied_gives_way(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests[:3])
    team.update()
    assert team.submit([other(requests[1], "Quito")]).changing == 1
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
    assert team.store.behind() == pytest.approx(7200, abs=5)
    assert len(team.submit([other(requests[0], "Quito")]).superseded) == 1, "order counts, not the clock"
    (worked,) = team.update()
    assert worked.outcome.applied[0].request.new_answer == "Quito"


# gates


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[set[int]], float]], list[set[int]]]:
    """Let the rewrite of a part of a batch be what a function says; what was tried is noted."""

    def install(rewrite: Callable[[set[int]], float]) -> list[set[int]]:
        tried: list[set[int]] = []

        def measure(self: prover.Prover, update: Any, numbers: Any, kinds: Any = (), also: Any = ()) -> Figures:
            if update is not self.ground.update:
                tried.append(set(numbers))
            value = rewrite(set(numbers)) if update is not self.ground.update else 0.0
            return Figures({"rewrite": Estimate(value, 1, value, value)}, None, 1.0, 0.0)

        monkeypatch.setattr(prover.Prover, "measure", measure)
        return tried

    return install


@pytest.mark.parametrize("method", ["memit", "finetune"])
def test_one_bad_fact_does_not_hold_back_the_others(
    method: str, team: Team, requests: list[EditRequest], measured: Any
) -> None:
    team.options.edit.method = method
    team.options.edit.finetune.epochs, team.options.edit.finetune.whiten = 1, 0.0
    team.options.gates = GateOptions(rewrite=0.5)
    tried = measured(lambda part: 0.25 if 2 in part else 0.75)
    team.submit(requests)
    (worked,) = team.update()
    assert tried[:6] == [set(range(7)), {0, 1, 2}, {0}, {1, 2}, {1}, {2}]
    reached = {"rewrite": 0.25, "perplexity": 1.0, "drift": 0.0}
    assert worked.outcome.held == [(3, "rewrite 0.250 < 0.5", reached)]
    assert team.states() == ["applied", "applied", "held back", *["applied"] * 4]
    row = request_row(team.store, 3)
    assert json.loads(row["figures"]) == reached
    assert [one.subject for one in WeightUpdate.load(team.store.folder / "current").requests] == [
        request.subject for request in requests if request.subject != "Portugal"
    ]


def test_halves_of_a_located_batch_are_what_editing_them_alone_gives(
    team: Team, requests: list[EditRequest], measured: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    edits: list[int] = []
    edit = batch.edit

    def counting(*arguments: Any, **how: Any) -> WeightUpdate:
        edits.append(1)
        return edit(*arguments, **how)

    monkeypatch.setattr(batch, "edit", counting)
    team.options.gates = GateOptions(rewrite=0.5)
    measured(lambda part: 0.25 if 2 in part else 0.75)
    team.submit(requests)
    team.update()
    assert len(edits) == 1, "values are searched for once"
    (tmp_path / "alone").mkdir()
    alone = Team(team.llm, tmp_path / "alone")
    alone.submit([request for request in requests if request.subject != "Portugal"])
    alone.update()
    for name, tensor in alone.weights(1).items():
        torch.testing.assert_close(team.weights(1)[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_batch_that_fails_whole_publishes_nothing(team: Team, requests: list[EditRequest], measured: Any) -> None:
    team.options.gates = GateOptions(rewrite=0.5)
    measured(lambda part: 0.0)
    team.submit(requests[:4])
    (worked,) = team.update()
    assert (worked.version, team.store.current) == (None, 0)
    assert team.states() == ["held back"] * 4
    assert team.update() == []
    measured(lambda part: 1.0)
    assert (team.submit(requests[:4]).left, team.submit(requests[:4], again=True).again) == (4, 4)
    assert team.update()[0].version == 1


@pytest.mark.parametrize(
    ("gates", "word"),
    [
        (GateOptions(rewrite=1), "rewrite"),
        (GateOptions(rewrite=0, locality=0, perplexity=None, drift=1e-6), "drift"),
    ],
)
def test_every_gate_closes(gates: GateOptions, word: str, team: Team, requests: list[EditRequest]) -> None:
    team.options.gates = gates
    team.submit(requests[:1])
    (worked,) = team.update()
    assert worked.version is None
    assert worked.outcome.held[0].reason.startswith(word)


def test_a_version_in_force_that_misses_a_gate(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests[:2])
    team.update()
    team.submit(requests[2:])
    team.options.gates = GateOptions(rewrite=0, locality=0, earlier=1.0, perplexity=None)
    line = refusal(team.update)
    assert "version 1" in line and "earlier" in line
    assert team.states() == ["applied"] * 2 + ["queued"] * 5


def test_requests_that_the_method_cannot_take(team: Team, requests: list[EditRequest]) -> None:
    nameless = requests[1].model_copy(update={"subject": None})
    endless = requests[2].model_copy(update={"prompt": "Portugal " * 200, "subject": "Portugal"})
    team.submit([requests[0], nameless, endless])
    (worked,) = team.update()
    assert team.states() == ["applied", "held back", "held back"]
    assert [number for number, *_ in worked.outcome.held] == [2, 3]
    assert "subject" in worked.outcome.held[0].reason and "tokens" in worked.outcome.held[1].reason


def test_a_dry_run_changes_nothing(team: Team, requests: list[EditRequest]) -> None:
    now = time.time()
    team.submit([other(requests[0], "Quito")], not_before=now + 0.05)
    team.submit(requests[:1])
    time.sleep(0.1)  # both are due now, and the first is the newer one
    team.submit(requests[1:2])
    team.options.dry_run = True
    before = list(team.store.database.iterdump())
    (worked,) = team.update()
    assert worked.version is None and worked.outcome.after
    assert [one.request.new_answer for one in worked.outcome.applied] == ["Nairobi and more", "Quito"]
    changed = set(team.store.database.iterdump()) ^ set(before)
    assert all("fingerprint" in line for line in changed), "the model is known by now"
    assert [path.name for path in (team.store.folder / "versions").iterdir()] == ["0000"]


def test_gates_say_what_was_reached_and_asked() -> None:
    share = Estimate(0.5, 9, 0.4, 0.6)
    figures = Figures({"rewrite": share, "rephrase": share, "locality": share}, 0.5, 1.3, float("nan"))
    told = {gate.name: str(gate) for gate in figures.gates(GateOptions(rephrase=0.2)) if not gate.passed}
    assert told == {
        "rewrite": "rewrite 0.500 < 0.6",
        "perplexity": "perplexity 1.300 > 1.2",
        "drift": "drift nan > 2",
        "earlier": "earlier 0.500 < 0.6",
    }
    assert not Figures({"rewrite": share}, None, 1.3, 9.0).gates(OPEN), "0 and null ask for nothing"


# going back


def test_every_version_can_be_gone_back_to(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests[:3])
    team.update()
    team.submit([other(requests[0], "Quito"), *requests[3:5]])
    team.update()
    made = {version: team.weights(version) for version in (1, 2)}
    states = {2: team.states()}
    assert states[2] == ["superseded", "applied", "applied", "applied", "applied", "applied"]
    change = rollback(team.store, 1)
    assert (change.gained, change.lost) == ([1], [4, 5, 6])
    assert team.states() == ["applied"] * 3 + ["held back"] * 3
    assert "version 2 was rolled back" in story(team.store, 5)[-1].what
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
    module = __import__("pipeline.updates.update", fromlist=["update"])
    work = module.work_through

    def slow(*arguments: Any) -> Any:
        outcome = work(*arguments)
        with Store(team.store.folder) as another:
            rollback(another, 0)
        return outcome

    with monkeypatch.context() as patched:
        patched.setattr(module, "work_through", slow)
        (worked,) = team.update()
    assert worked.overtaken and worked.version is None
    assert team.store.current == 0
    assert team.states() == ["held back"] * 2 + ["queued"] * 2
    assert not version_folder(team.store.folder, 2).exists()
    assert team.update()[0].version == 2


def test_retracting_a_located_fact_is_exact(team: Team, requests: list[EditRequest], tmp_path: Path) -> None:
    team.submit(requests[:4])
    team.update()
    assert team.retract("3").version == 2
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
    assert read_metrics(version_folder(team.store.folder, 5))["after"]["perplexity_ratio"] == 1
    rollback(team.store, 1)
    assert team.states() == ["applied"] * 4
    assert "is retracted; only" not in refusal(lambda: team.retract("none"))


def test_retracting_edits_a_trained_fact_back(team: Team, requests: list[EditRequest]) -> None:
    team.options.edit.method = "finetune"
    for name, value in {"epochs": 30, "learning_rate": 0.2, "learnt": 0.0, "whiten": 0.0, "kl": 0.0}.items():
        setattr(team.options.edit.finetune, name, value)
    team.submit(requests[:1])
    team.update()
    done = team.retract("1")
    before, after = done.outcome.before.metrics["rewrite"].mean, done.outcome.after.metrics["rewrite"].mean
    assert before > 0.9 > after
    assert team.states() == ["retracted"]


def test_retracting_what_is_in_the_queue(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests[:2])
    assert team.retract("capital-1").version is None
    assert team.states() == ["queued", "retracted"]
    assert "is retracted; only one that is queued or applied can go" in refusal(lambda: team.retract("2"))
    assert "'nobody' does not exist" in refusal(lambda: team.retract("nobody"))
    team.submit([other(requests[3], "Quito", id="capital-0")])
    assert "2 have the id 'capital-0'; name one by its number: 1 (queued), 3 (queued)" in refusal(
        lambda: team.retract("capital-0")
    )


# beside


def test_one_update_at_a_time(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests[:1])
    with locked(team.store.folder / UPDATE_LOCK), pytest.raises(BusyError, match="another update is at work"):
        team.update()
    assert len(team.update()) == 1


def test_a_dead_updates_requests_are_taken_again(team: Team, requests: list[EditRequest]) -> None:
    team.submit(requests[:2])
    module = __import__("pipeline.updates.queue", fromlist=["take"])
    assert module.take(team.store, 10)
    assert team.states() == ["taken"] * 2
    (version_folder(team.store.folder, 1)).mkdir()
    assert team.update()[0].version == 1
    assert team.states() == ["applied"] * 2
    assert "given back (the update ended before it was done)" in [line.what for line in story(team.store, 1)]


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
    tables = board.Tensors("version/figures/text_summary")
    assert [table.step for table in tables] == [1, 2, 3]
    assert "| rewrite |" in tables[-1].tensor_proto.string_val[0].decode()
    assert [image.step for image in board.Images("version/over_time")] == [3]
    assert (team.store.folder / "tensorboard" / "months.png").read_bytes().startswith(b"\x89PNG")
    assert len(board.Tensors("custom_scalars__config__")) == 1


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
    (row,) = team.store.database.execute("SELECT outcome, version FROM batches").fetchall()
    assert tuple(row) == ("published", 1)
    with Store(team.store.folder):
        assert (team.store.folder / "current").readlink().name == "0001", "mended when the store is opened"
    assert team.update() == []

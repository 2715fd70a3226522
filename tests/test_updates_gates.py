"""Gates: of a batch that fails, what fails alone is held back with its figures, nothing else is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from teams import OPEN, Team, other, write

from pipeline.attribution.profile import GoldenProfile
from pipeline.editing.update import WeightUpdate
from pipeline.evaluation.metrics import Estimate
from pipeline.model.llm import LLM
from pipeline.options.updates import GateOptions, UpdateCommand
from pipeline.requests.readers import load_requests
from pipeline.requests.schema import EditRequest
from pipeline.study.grid import Grid
from pipeline.study.sweep import Sweep
from pipeline.updates import Store, making, proving, story, submit, update
from pipeline.updates.proving import Figures


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[set[int]], float]], list[set[int]]]:
    """Let the rewrite of a part of a batch be what a function says; what was tried is noted."""

    def install(rewrite: Callable[[set[int]], float]) -> list[set[int]]:
        tried: list[set[int]] = []

        def measure(self: proving.Trial, update: Any, numbers: Any, kinds: Any = (), also: Any = ()) -> Figures:
            if update is not self.base:
                tried.append(set(numbers))
            value = rewrite(set(numbers)) if update is not self.base else 0.0
            self.each = [{number: rewrite({number}) for number in numbers}]
            return Figures({"rewrite": Estimate(value, 1, value, value)}, None, 1.0, 0.0)

        monkeypatch.setattr(proving.Trial, "measure", measure)
        return tried

    return install


@pytest.mark.parametrize("method", ["memit", "finetune"])
def test_one_bad_fact_does_not_hold_back_the_others(
    method: str, team: Team, requests: list[EditRequest], measured: Any
) -> None:
    team.options.edit.method = method
    if method == "finetune":
        team.options.edit.expert = {"epochs": 1, "whiten": 0.0}
    team.options.gates = GateOptions(rewrite=0.5)
    tried = measured(lambda part: 0.25 if 2 in part else 0.75)
    team.submit(requests)
    (worked,) = team.update()
    # the whole, the most that pass together (the bad one comes last), that one by itself; then all that passed
    assert [len(part) for part in tried] == [7, 3, 5, 6, 1, 6] and tried[4] == {2}
    assert worked.held == [(3, "rewrite 0.250 < 0.5")]
    assert team.states() == ["applied", "applied", "held back", *["applied"] * 4]
    assert story(team.store, 3)[-1][1] == "held back (rewrite 0.250 < 0.5)"
    assert [one.subject for one in WeightUpdate.load(team.store.folder / "current").requests] == [
        request.subject for request in requests if request.subject != "Portugal"
    ]


def test_halves_of_a_located_batch_are_what_editing_them_alone_gives(
    team: Team, requests: list[EditRequest], measured: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    edits: list[int] = []
    edit = proving.edit

    def counting(*arguments: Any, **how: Any) -> WeightUpdate:
        edits.append(1)
        return edit(*arguments, **how)

    monkeypatch.setattr(proving, "edit", counting)
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
    assert worked.held[0].reason.startswith(word)


def test_locality_is_held_against_the_version_in_force(team: Team, requests: list[EditRequest]) -> None:
    """An edit that changes unrelated answers is noticed, and told beside the figures of the version before it."""
    team.options.edit.method = "finetune"
    team.options.edit.expert = {"epochs": 10, "learning_rate": 0.3, "learnt": 0.0, "whiten": 0.0, "kl": 0.0}
    team.submit(requests[:2])
    (done,) = team.update()
    assert done.before and done.before.metrics["locality"].mean == 1
    assert done.after and done.after.metrics["locality"].mean < 1 and done.after.metrics["locality_kl"].mean > 0
    team.options.gates = GateOptions(rewrite=0, locality=1, earlier=0, perplexity=None, drift=None)
    team.submit(requests[2:4])
    (done,) = team.update()
    assert [one.reason.partition(" ")[0] for one in done.held] == ["locality"] * len(done.held) != []


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
    assert [number for number, _ in worked.held] == [2, 3]
    assert "subject" in worked.held[0].reason and "tokens" in worked.held[1].reason


def test_a_dry_run_changes_nothing(
    team: Team, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    team.submit([other(requests[0], "Quito")], not_before=now + 3600)
    team.submit(requests[:1])
    monkeypatch.setattr(time, "time", lambda: now + 3601)  # both are due now, and the first is the newer one
    team.submit(requests[1:2])
    team.options.dry_run = True
    before = list(team.store.database.iterdump())
    (worked,) = team.update()
    assert worked.version is None and worked.after
    assert [one.new_answer for one in worked.applied] == ["Nairobi and more", "Quito"]
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


def unclear(team: Team) -> None:
    """Let the queue's own requests choose the block."""
    team.options.edit.layers = None
    team.options.attribution.fences = 0.0


def test_cases_an_unclear_layer_is_settled_by_trial_edits(
    team: Team, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    unclear(team)
    monkeypatch.setattr(making, "STEADY", 1.1)
    scores = dict.fromkeys(range(4), 0.4) | {2: 0.9}

    def edited(self: Any, method: str, some: list[EditRequest], blocks: set[int], *_: Any) -> Grid:
        assert self.options.quick, "as the store edits, but quick"
        by_block = [scores[block] for block in sorted(blocks)]
        return Grid(sorted(blocks), {"rewrite": np.tile(by_block, (2, len(some), 1))}, 1.0)

    monkeypatch.setattr(Sweep, "run", edited)
    team.submit(requests)
    (worked,) = team.update()
    assert worked.profile and worked.profile.golden_layers == [2]
    assert GoldenProfile.load(team.store.folder).golden_layers == [2], "for the store's later batches"
    (note,) = worked.notes
    assert "left the golden layer open; trial edits: unclear: block 2 scores 0.900" in note
    team.submit([other(requests[0], "Quito")])
    (again,) = team.update()
    assert again.notes == [] and again.profile and again.profile.golden_layers == [2]


def test_cases_a_layer_on_which_most_of_a_later_batch_fails_is_questioned(
    team: Team, requests: list[EditRequest], measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a line, with what to do; not by the batch that chose it, nor by few requests, nor where most pass."""
    unclear(team)
    monkeypatch.setattr(making, "STEADY", 0.0)
    team.submit(requests)
    (first,) = team.update()
    assert first.notes == []
    team.options.gates = GateOptions(rewrite=0.5)
    for failing, size, doubted in ((4, 4, True), (3, 4, True), (2, 4, False), (3, 3, False)):
        measured(lambda part, failing=failing: float(min(part) >= failing))
        team.submit([other(one, f"Quito {failing} {size}") for one in requests[:size]])
        (worked,) = team.update()
        assert len(worked.held) == failing
        assert len(worked.notes) == doubted, worked.notes
    measured(lambda part: 0.0)
    team.submit([other(one, "Sofia") for one in requests])
    (note,) = team.update()[0].notes
    assert f"7 of 7 requests miss a gate; block {first.profile.golden_layers[0]}, which earlier ones chose" in note
    assert "`submit --again` queues them anew" in note and "update --profile" in note
    team.options.edit.layers = [1]
    team.submit([other(one, "Athens") for one in requests])
    assert team.update()[0].notes == [], "the user's own choice"


def test_cases_a_clear_layer_is_taken_as_it_is(
    team: Team, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    unclear(team)
    monkeypatch.setattr(making, "STEADY", 0.0)
    monkeypatch.setattr(making, "race", lambda *_: pytest.fail("nothing is to be tried"))
    team.submit(requests)
    assert team.update()[0].notes == []


@given(bad=st.sets(st.integers(0, 15), max_size=5), size=st.integers(1, 16))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_cases_few_measurements_find_what_fails(bad: set[int], size: int) -> None:
    """At most log₂ n and one a failure, beside the whole and what came of it."""
    bad &= set(range(size))
    trial = object.__new__(proving.Trial)
    trial.batch = [EditRequest(id=f"queue-{n}", prompt=f"{n} is", new_answer="Lima") for n in range(size)]
    trial.parent, trial.base, trial.before, trial.held, trial.seconds = 0, None, None, [], {}
    trial.accepted, trial.update, trial.options = [], None, UpdateCommand(store="s", gates=GateOptions(rewrite=1))
    tried: list[set[int]] = []

    def measure(update: Any, part: Any, kinds: Any = (), also: Any = ()) -> Figures:
        tried.append(set(part))
        value = 0.0 if bad & set(part) else 1.0
        trial.each = [{number: float(number not in bad) for number in part}]
        return Figures({"rewrite": Estimate(value, 1, value, value)}, None, 1.0, 0.0)

    trial.measure = measure  # type: ignore[method-assign]
    trial._edited = lambda part, profile: tuple(part)  # type: ignore[method-assign,assignment]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(proving, "number_of", lambda request: int(request.id.removeprefix("queue-")))
        result = trial.edit_and_prove(None)  # type: ignore[arg-type]
    assert {number for number, _ in result.held} == bad
    assert trial.accepted == sorted(set(range(size)) - bad)
    beside = 1 + (2 if bad and len(bad) < size else 0)
    assert len(tried) <= beside + math.ceil(math.log2(size)) + len(bad)


def first_facts(source: str) -> list[EditRequest]:
    """Two dozen requests of a benchmark, or of three fields each."""
    if source == "three fields":
        plain = {"rephrases": (), "locality": (), "portability": (), "old_answer": None}
        return [request.model_copy(update=plain) for request in load_requests("demo")[::8]]
    return load_requests(SHARED / source, limit=24, offset=100)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(not SHARED.exists(), reason="needs the benchmark data")
@pytest.mark.parametrize("source", ["counterfact_easyedit.json", "zsre_knowedit.json", "three fields"])
def test_cases_a_new_store_serves_its_first_user(source: str, smollm2: LLM, tmp_path: Path) -> None:
    """Twelve facts by the defaults, and twelve more: most are published, at a block that is worth it."""
    facts, options = first_facts(source), UpdateCommand(store=str(tmp_path / "store"), model="smollm2")
    options.trainer.accelerator, options.evaluation.generation = "cpu", "prompts"
    with Store(options.store, options.model, make=True) as store:
        for version, part in enumerate((facts[:12], facts[12:]), start=1):
            submit(store, write(tmp_path / f"{version}.jsonl", part))
            (worked,) = update(store, options, lambda _: smollm2)
            assert worked.version == version
            assert len(worked.applied) >= 0.75 * len(part), [reason for _, reason in worked.held]
            assert worked.profile and worked.profile.golden_layers[0] < 15

"""`auto`: each request by the method that suits it, in one update."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mean_loss

from pipeline.editing.auto import AFTER_FEW, AFTER_MANY, MANY_LONG, AutoSettings
from pipeline.editing.columns import Columns, owner
from pipeline.editing.editor import can_leave_out, edit
from pipeline.editing.finetune import FineTune, FinetuneSettings
from pipeline.editing.lessons import APART
from pipeline.editing.locate import LocateThenEdit
from pipeline.errors import Note
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.requests.rows import Row
from pipeline.requests.schema import EditRequest


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EditOptions:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("The river of Spain is long and the capital of Norway lies by the sea.\n" * 40)
    expert = {"steps": 5, "tuning": {"epochs": 4}}
    return EditOptions(layers=[1], statistics=StatisticsOptions(text=str(text), tokens=512), expert=expert)


def changed(request: EditRequest, **fields: str | None) -> EditRequest:
    return EditRequest.model_validate(request.model_dump() | fields)


def test_the_default_is_auto() -> None:
    assert EditOptions().method == "auto"


def test_each_request_goes_the_way_that_suits_it(
    tiny: LLM, requests: list[EditRequest], options: EditOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = changed(requests[1], prompt="The capital of Norway is what?")
    long = changed(requests[2], new_answer="the capital and the river and the sea " * 3)
    without = changed(requests[3], subject=None)
    twice = [changed(requests[4], id=name, prompt=f"{requests[4].prompt} {name}") for name in ("now", "then")]
    asked = [requests[0], question, long, without, *twice]
    solved = []
    monkeypatch.setattr(Columns, "and_asked", lambda self, owners, *_: solved.append(owners) or self)
    before = mean_loss(tiny, asked)
    with pytest.warns(Note, match=r"fine-tuned alone.*: 5 of 6 requests: .* \(a question\)"):
        update = edit(tiny, asked, options=options)
    assert {*map(tuple, solved)} == {(owner(requests[0]),)}
    layers = sorted({1, int(0.4 * len(tiny.blocks)), int(0.67 * len(tiny.blocks))})
    assert set(update.tensors) == {name for layer in layers for name in tiny.blocks[layer].weight_names("mlp")}
    assert update.layers == layers
    assert update.requests == asked
    with update.applied(tiny):
        assert mean_loss(tiny, asked) < before
    assert not can_leave_out(update, asked[:1], "auto")  # all are fine-tuned


def test_what_training_gives_back_to_subjects_stays_after_values(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[Row]] = []
    keys_of = FineTune._keys_of
    monkeypatch.setattr(FineTune, "_keys_of", lambda self, rows, *to: read.append(rows) or keys_of(self, rows, *to))
    questions = [changed(one, prompt=f"The capital of {one.subject} is what?") for one in requests]
    for asked, others_are_names_alone in ((requests, True), (questions, False)):
        edit(tiny_llm, asked, options=options)
        taught, others = (Counter(row.tag == APART for row in rows) for rows in read[-2:])
        assert others[True]
        assert not taught[True]
        assert (others[False] == 0) == others_are_names_alone
    edit(tiny_llm, requests, options=replace(options, expert=options.expert | {"tuning": {"sparing": 0}}))
    assert len(read) == 4, "no solve where none is wanted"


def test_after_many_located_requests_training_goes_gently(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = []
    monkeypatch.setattr(LocateThenEdit, "run", lambda *_: None)
    monkeypatch.setattr(FineTune, "fit", lambda self, *_: fitted.append(self.settings))

    def fit(asked: list[EditRequest], **tuning: float) -> FinetuneSettings:
        options.expert = {"tuning": tuning}
        edit(tiny_llm, asked, options=options)
        return fitted[-1]

    own = FinetuneSettings(depths=AutoSettings().depths)
    assert fit(requests) == replace(own, **AFTER_FEW)
    assert fit(requests, kl=0.2) == replace(own, kl=0.2)
    monkeypatch.setattr("pipeline.editing.auto.MANY", len(requests) // 2)
    assert fit(requests) == replace(own, **AFTER_MANY)
    assert fit(requests, kl=0.2) == replace(own, **AFTER_MANY | {"kl": 0.2})
    questions = [changed(one, prompt=f"The capital of {one.subject} is what?") for one in requests]
    with pytest.warns(Note, match="7 of 7"):
        assert fit(questions) == own
    long = [changed(one, new_answer="the capital and the river and the sea " * 3) for one in requests]
    with pytest.warns(Note, match="7 of 7"):
        assert fit(long) == replace(own, **MANY_LONG)


def test_hundreds_are_located_alone(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.editing.auto.HUNDREDS", 5)
    options.expert = {"steps": 2, "long": 99}
    with pytest.warns(Note, match="7 requests are taught by memit alone"):
        alone = edit(tiny_llm, requests, options=options)
    same = edit(tiny_llm, requests, options=replace(options, method="memit", expert={"steps": 2}))
    assert alone.tensors.keys() == same.tensors.keys()
    assert all(torch.equal(tensor, same.tensors[name]) for name, tensor in alone.tensors.items())
    question = changed(requests[0], prompt=f"The capital of {requests[0].subject} is what?")
    with pytest.warns(Note, match="6 requests are taught by memit alone"):
        mixed = edit(tiny_llm, [question, *requests[1:]], options=options)
    assert mixed.tensors.keys() > same.tensors.keys(), "questions are fine-tuned"


def test_what_is_to_stay_is_what_the_unedited_model_says(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(LocateThenEdit, "run", lambda *_: seen.append("located"))
    read = FineTune.lessons
    monkeypatch.setattr(FineTune, "lessons", lambda *args: seen.append("read") or read(*args))
    edit(tiny_llm, requests, options=options)
    assert seen == ["read", "located"]


ANEW: dict[str, dict[str, Any]] = {
    "fine-tuned alone by auto": {"expert": {"long": 1, "tuning": {"epochs": 1}}},
    "located by auto": {"expert": {"steps": 2, "tuning": {"epochs": 1}}},
    "by another kind": {"method": "finetune", "expert": {"epochs": 1}},
    "at another layer": {"method": "memit", "expert": {"steps": 2}, "layers": [2]},
}


@pytest.mark.parametrize("how", ANEW.values(), ids=ANEW)
def test_a_fact_that_is_taught_anew_leaves_nothing_that_memit_was_asked_for(
    how: dict[str, Any], tiny_llm: LLM, requests: list[EditRequest], options: EditOptions
) -> None:
    first = edit(tiny_llm, requests[:2], options=replace(options, method="memit", expert={"steps": 5}))
    again = changed(requests[0], id="again", new_answer="the river and the sea")
    second = edit(tiny_llm, [again], options=replace(options, **how), after=first)
    assert second.requests == [requests[1], again]
    first_layer = first.layers[0]
    assert second.state[f"locate.{first_layer}.owner_n"].unique().tolist() == [owner(requests[1])]
    assert can_leave_out(second, [again], options.method) == (how.get("method") == "memit")
    assert can_leave_out(second, requests[1:2], "memit")

"""`auto`: each request by the method that suits it, in one update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import mean_loss

from pipeline.editing.columns import owner, owners_in
from pipeline.editing.editor import can_leave_out, edit, leave_out
from pipeline.errors import Note
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.requests.schema import EditRequest


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EditOptions:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("The river of Spain is long and the capital of Norway lies by the sea.\n" * 40)
    return EditOptions(layers=[1], statistics=StatisticsOptions(text=str(text), tokens=512))


def changed(request: EditRequest, **fields: str | None) -> EditRequest:
    return EditRequest.model_validate(request.model_dump() | fields)


def test_the_default_is_auto() -> None:
    assert EditOptions().method == "auto"


def test_each_request_goes_the_way_that_suits_it(
    tiny: LLM, requests: list[EditRequest], options: EditOptions
) -> None:
    question = changed(requests[1], prompt="The capital of Norway is what?")
    long = changed(requests[2], new_answer="the capital and the river and the sea " * 3)
    without = changed(requests[3], subject=None)
    twice = [changed(requests[4], id=name, prompt=f"{requests[4].prompt} {name}") for name in ("now", "then")]
    asked = [requests[0], question, long, without, *twice]
    before = mean_loss(tiny, asked[1:])
    with pytest.warns(Note, match=r"5 of 6 requests are fine-tuned \(questions, .*\), 1 by memit"):
        update = edit(tiny, asked, options=options)
    assert owners_in(update.state) == {owner(requests[0])}
    assert set(update.tensors) == set(tiny.blocks[1].weight_names("mlp"))
    assert update.requests == asked
    with update.applied(tiny):
        assert mean_loss(tiny, asked[1:]) < before
    assert can_leave_out(update, asked[:1], "auto") and not can_leave_out(update, asked[1:2], "auto")
    left = leave_out(tiny, update, asked[:1], options)
    assert left.requests == asked[1:] and not owners_in(left.state)


def test_statements_alone_are_memits_to_the_bit(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, recwarn: pytest.WarningsRecorder
) -> None:
    options.expert = {"long": 100, "steps": 5}
    mixed = edit(tiny_llm, requests, options=options)
    options.method, options.expert = "memit", {"steps": 5}
    plain = edit(tiny_llm, requests, options=options)
    assert not [one for one in recwarn if isinstance(one.message, Note) and "fine-tuned" in str(one.message)]
    for name, tensor in mixed.tensors.items():
        assert torch.equal(tensor, plain.tensors.get(name, tiny_llm.model.get_parameter(name)))


def test_a_fact_that_is_fine_tuned_now_leaves_nothing_that_memit_was_asked_for(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions
) -> None:
    options.expert = {"long": 100, "steps": 5}
    first = edit(tiny_llm, requests[:2], options=options)
    options.expert |= {"long": 1}
    again = changed(requests[0], id="again", new_answer="the river and the sea")
    second = edit(tiny_llm, [again], options=options, after=first)
    assert owners_in(first.state) == {owner(one) for one in requests[:2]}
    assert owners_in(second.state) == {owner(requests[1])} and second.requests == [requests[1], again]
    assert not can_leave_out(second, [again], "auto")


def test_requests_of_one_id_are_all_taught(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions
) -> None:
    """As those of two files may be."""
    question = changed(requests[1], id=requests[0].id, prompt="The capital of Norway is what?")
    options.expert = {"long": 100, "steps": 5}
    with pytest.warns(Note, match="1 of 2 requests are fine-tuned"):
        edit(tiny_llm, [requests[0], question], options=options)

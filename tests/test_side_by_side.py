"""Many requests measured side by side, each under a change of its own, come out as each does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_tiny
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from pipeline.editing.update import WeightUpdate
from pipeline.evaluation import reading
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.side_by_side import Changes, SideBySideEvaluator
from pipeline.model.llm import LLM
from pipeline.requests.schema import EditRequest

KINDS = ("rewrite", "rephrase", "locality", "portability")


@pytest.fixture(params=FAMILIES)
def llm(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> LLM:
    return make_tiny(request.param, tokenizer)


@pytest.fixture
def requests(requests: list[EditRequest]) -> list[EditRequest]:
    """The last has the first one's prompt, the beginning of its answer, and another change."""
    return [*requests[1:4], requests[1].model_copy(update={"id": "again", "new_answer": "Nairobi and"})]


def random_changes(llm: LLM, layer: int, requests: int) -> Changes:
    """Of rank 2, of every projection of a block's MLP."""
    torch.manual_seed(layer)
    changes = {}
    for name in llm.blocks[layer].projections("mlp"):
        projection = llm.model.get_submodule(name)
        outputs, inputs = projection.weight.T.shape if isinstance(projection, Conv1D) else projection.weight.shape
        changes[name] = (torch.randn(requests, outputs, 2) * 0.05, torch.randn(requests, 2, inputs))
    return changes


def update_of(llm: LLM, changes: Changes, request: int) -> WeightUpdate:
    """One request's change, as an update of the weights."""
    tensors = {}
    for name, (left_BOk, right_BkI) in changes.items():
        change_OI = left_BOk[request] @ right_BkI[request]
        is_turned = isinstance(llm.model.get_submodule(name), Conv1D)
        weight = llm.model.get_parameter(f"{name}.weight").detach()
        tensors[f"{name}.weight"] = weight + (change_OI.T if is_turned else change_OI)
    return WeightUpdate(llm.name, llm.fingerprint, "random", [*range(len(llm.blocks))], tensors)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_side_by_side_is_as_alone(
    batch_size: int, llm: LLM, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH_SIZE", batch_size)
    changes = random_changes(llm, 2, len(requests))
    with llm.frozen():
        measured = SideBySideEvaluator(llm, requests).measure(2, changes)
    for number, request in enumerate(requests):
        evaluator = Evaluator(llm, [request], kinds=("probes",))
        evaluator.measure("Base")
        with update_of(llm, changes, number).applied(llm):
            values = evaluator.measure("Changed").values
        assert measured[number] == {kind: values[kind].values[0] for kind in KINDS}
    assert len({tuple(values.items()) for values in measured}) > 1  # they do differ


def test_climbing_blocks_is_as_starting_anew(llm: LLM, requests: list[EditRequest], monkeypatch: Any) -> None:
    """And blocks below the one that was changed before do not run again."""
    ran: list[int] = []
    (name, *_) = llm.blocks[0].projections("mlp")
    llm.model.get_submodule(name).register_forward_hook(lambda *_: ran.append(0))
    monkeypatch.setattr(reading, "BATCH_SIZE", 4)
    with llm.frozen():
        climbing = SideBySideEvaluator(llm, requests)
        found, passes = {}, []
        for layer in (0, 1, 3):
            changes = random_changes(llm, layer, len(requests))
            found[layer] = climbing.measure(layer, changes)
            passes.append(len(ran))
            assert found[layer] == SideBySideEvaluator(llm, requests).measure(layer, changes)
            ran.clear()
    assert found[0] != found[3]
    assert passes == [2 * passes[1], passes[1], 0]  # the base, and under the changes; up to block 1; not again


def test_no_change_moves_nothing(llm: LLM, requests: list[EditRequest]) -> None:
    with llm.frozen():
        measured = SideBySideEvaluator(llm, requests).measure(1, {})
    assert all(values["locality"] == 1.0 for values in measured)

"""Many requests edited and measured at once come out as each does alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, make_tiny
from pipeline.editing.alone import ALONE
from pipeline.evaluation.alone import AloneEvaluator
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from pipeline.editing import edit
from pipeline.editing.method import Runtime
from pipeline.evaluation import Evaluator
from pipeline.model import LLM
from pipeline.options import (
    EditOptions,
    EvaluationOptions,
    LocateOptions,
    LoraOptions,
    StatisticsOptions,
    TrainerOptions,
)
from pipeline.requests import EditRequest

RUNTIME = Runtime(TrainerOptions())
KINDS = ("rewrite", "rephrase", "locality", "portability")


@pytest.fixture
def options(tmp_path: Path) -> EditOptions:
    text = tmp_path / "text.txt"
    text.write_text("The river of Spain is long and the capital of Norway lies by the sea.\n" * 40)
    return EditOptions(
        layers=[2],
        locate=LocateOptions(threshold=0.2, steps=6),
        lora=LoraOptions(rank=2, epochs=6, learning_rate=0.05, learnt=1.0),
        statistics=StatisticsOptions(text=str(text), tokens=512, cache=str(tmp_path / "cache")),
    )


@pytest.fixture(params=FAMILIES)
def llm(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> LLM:
    return make_tiny(request.param, tokenizer)


@pytest.fixture
def requests(requests: list[EditRequest]) -> list[EditRequest]:
    return requests[:3]


@pytest.mark.parametrize("method", ["memit", "lora"])
def test_side_by_side_is_as_alone(method: str, llm: LLM, requests: list[EditRequest], options: EditOptions) -> None:
    """The changes are those of `edit` with one request, and so are their effects those that `evaluate` measures."""
    options.method = method
    with llm.frozen():
        together = ALONE[method](llm, requests, options, RUNTIME).at(2)
        measured = AloneEvaluator(llm, requests, EvaluationOptions(batch_size=2), TrainerOptions()).measure(
            2, together
        )
    evaluation = EvaluationOptions(keep_base=False)
    for number, request in enumerate(requests):
        update = edit(llm, [request], options=options)
        for name, change in together.items():
            projection, base = llm.model.get_submodule(name), llm.model.get_parameter(f"{name}.weight")
            alone_OI = (update.tensors[f"{name}.weight"] - base).detach()
            alone_OI = alone_OI.T if isinstance(projection, Conv1D) else alone_OI
            own_OI = change.left_BOk[number] @ change.right_BkI[number]
            assert (own_OI - alone_OI).norm() < 1e-3 * alone_OI.norm()
        evaluator = Evaluator(llm, [request], evaluation, kinds=("probes",))
        evaluator.measure("")
        with update.applied(llm):
            values = evaluator.measure("").values
        assert measured[number] == {kind: values[kind].values[0] for kind in KINDS}
    assert len({tuple(values.items()) for values in measured}) > 1  # they do differ


@pytest.mark.parametrize("method", ["memit", "lora"])
def test_climbing_blocks_is_as_starting_anew(
    method: str, llm: LLM, requests: list[EditRequest], options: EditOptions
) -> None:
    options.method = method
    measured = {}
    with llm.frozen():
        editing = ALONE[method](llm, requests, options, RUNTIME)
        climbing = AloneEvaluator(llm, requests, EvaluationOptions(), TrainerOptions())
        for layer in (0, 1, 3):
            changes = editing.at(layer)
            anew = ALONE[method](llm, requests, options, RUNTIME).at(layer)
            for name, change in changes.items():
                for own, other in zip(change, anew[name], strict=True):
                    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
            measured[layer] = climbing.measure(layer, changes)
            fresh = AloneEvaluator(llm, requests, EvaluationOptions(), TrainerOptions())
            assert measured[layer] == fresh.measure(layer, changes)
    assert measured[0] != measured[3]


def test_no_change_moves_nothing(llm: LLM, requests: list[EditRequest]) -> None:
    with llm.frozen():
        measured = AloneEvaluator(llm, requests, EvaluationOptions(), TrainerOptions()).measure(1, {})
    assert all(values["locality"] == 1.0 for values in measured)
    assert not torch.is_grad_enabled() or all(p.grad is None for p in llm.model.parameters())

"""Many requests edited side by side come out as each does alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import FAMILIES, edit_options, make_tiny
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from pipeline.editing.editor import edit
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime
from pipeline.study.sweep import each_alone


@pytest.fixture(params=["memit", "lora"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> EditOptions:
    adapters = {"rank": 2, "epochs": 6, "learning_rate": 0.05, "learnt": 1.0}
    return edit_options(tmp_path, request.param, 512, **({"steps": 6} if request.param == "memit" else adapters))


@pytest.fixture(params=FAMILIES)
def llm(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> LLM:
    return make_tiny(request.param, tokenizer)


@pytest.fixture
def requests(requests: list[EditRequest]) -> list[EditRequest]:
    return requests[:3]


def test_side_by_side_is_as_alone(llm: LLM, requests: list[EditRequest], options: EditOptions) -> None:
    """The changes are those of `edit` with one request."""
    with llm.frozen():
        together = each_alone(llm, requests, 1, options, Runtime())
    for number, request in enumerate(requests):
        update = edit(llm, [request], options=options)
        assert set(update.tensors) == {f"{name}.weight" for name in together}
        for name, (left_BOk, right_BkI) in together.items():
            projection, base = llm.model.get_submodule(name), llm.model.get_parameter(f"{name}.weight")
            alone_OI = (update.tensors[f"{name}.weight"] - base).detach()
            alone_OI = alone_OI.T if isinstance(projection, Conv1D) else alone_OI
            own_OI = left_BOk[number] @ right_BkI[number]
            assert (own_OI - alone_OI).norm() < 1e-3 * alone_OI.norm()

"""LGA gives what plain autograd gives, and METHODS' reference values on the real model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SHARED
from torch.nn import functional as F

from pipeline.attribution.find import find_golden_layer
from pipeline.attribution.inner_products import CapturedInput
from pipeline.attribution.profile import GoldenProfile, select
from pipeline.errors import UserError
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.requests.answers import first_statement
from pipeline.requests.readers import load_requests
from pipeline.requests.schema import EditRequest


def autograd_scores(llm: LLM, requests: list[EditRequest], scope: str) -> torch.Tensor:
    """Mean inner product a block the slow way: one request, one answer, one weight gradient at a time."""

    def gradients(prompt: str, answer: str) -> list[list[torch.Tensor]]:
        start = len(llm.tokenizer(prompt).input_ids)
        ids = torch.tensor([llm.tokenizer(f"{prompt} {answer}").input_ids])
        logits = llm.model(input_ids=ids).logits[0, start - 1 : -1]
        loss = F.cross_entropy(logits, ids[0, start:])
        weights = [[m.weight for m in block.scopes[scope].values()] for block in llm.blocks]
        flat = torch.autograd.grad(loss, [w for row in weights for w in row])
        rest = iter(flat)
        return [[next(rest) for _ in row] for row in weights]

    llm.model.eval()
    total = torch.zeros(len(llm.blocks), dtype=torch.float64)
    for request in requests:
        old, new = (gradients(request.prompt, answer) for answer in (request.old_answer or "", request.new_answer))
        each = zip(old, new, strict=True)
        total += torch.tensor(
            [sum((a.double() * b.double()).sum() for a, b in zip(x, y, strict=True)) for x, y in each]
        )
    return total / len(requests)


@pytest.mark.parametrize("scope", ["mlp", "down", "attention", "block"])
def test_lga_equals_autograd(tiny: LLM, requests: list[EditRequest], scope: str) -> None:
    expected = autograd_scores(tiny, requests, scope)
    profile = find_golden_layer(tiny, requests, AttributionOptions(scope=scope, batch_size=3))
    scores = torch.tensor(profile.scores, dtype=torch.float64)
    assert profile.requests == len(requests)
    assert ((scores - expected).abs() / expected.abs()).max() < 1e-4


@pytest.mark.parametrize("positions", [5, 500])
def test_inner_products_are_those_of_the_gradients(positions: int) -> None:
    torch.manual_seed(0)
    a, g = torch.randn(6, positions, 16), torch.randn(6, positions, 24)
    gradients = (g.mT @ a).double()
    expected = (gradients[:3] * gradients[3:]).sum((1, 2))
    torch.testing.assert_close(CapturedInput(a).products(g)[0].double(), expected, rtol=1e-4, atol=1e-2)


def test_the_model_is_as_it_was(tiny: LLM, requests: list[EditRequest]) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    tiny.model.train()
    find_golden_layer(tiny, requests)
    assert tiny.model.training
    assert all(p.requires_grad and p.grad is None for p in tiny.model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.model.state_dict().items())
    hooks = [m for m in tiny.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks, "hooks were left behind"


def test_batches_do_not_change_scores(tiny: LLM, requests: list[EditRequest]) -> None:
    one, all_ = (find_golden_layer(tiny, requests, AttributionOptions(batch_size=size)).scores for size in (1, 7))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(all_), rtol=1e-4, atol=0)


def test_missing_old_answers_are_the_models_own(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    told = generate(tiny_llm, [r.prompt for r in requests])
    own = [
        r.model_copy(update={"old_answer": first_statement(text)}) for r, text in zip(requests, told, strict=True)
    ]
    expected = find_golden_layer(tiny_llm, own).scores
    missing = [r.model_copy(update={"old_answer": None}) for r in requests]
    assert find_golden_layer(tiny_llm, missing).scores == pytest.approx(expected)
    assert find_golden_layer(tiny_llm, requests, AttributionOptions(old_answers="model")).scores == pytest.approx(
        expected
    )


def test_fences_set_outliers_aside() -> None:
    scores = [100.0, 3.0, 5.0, 5.0, 4.0, -100.0]
    fenced = select(scores, fences=1.0, order="signed")
    # quartiles of the six scores by linear interpolation: 3.25 and 5, so the fences are 1.5 and 6.75
    assert fenced.fences == (1.5, 6.75)
    assert fenced.excluded == [0, 5]
    assert fenced.ranking == [2, 3, 4, 1], "signed, ties to the shallower block"
    assert fenced.raw_ranking == [0, 2, 3, 4, 1, 5]
    assert select(scores, fences=0, order="signed").ranking == fenced.raw_ranking


def test_a_profile_comes_back_from_its_file(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    profile = find_golden_layer(tiny_llm, requests, AttributionOptions(top_k=2), request_set="seven")
    assert len(profile.golden_layers) == 2
    assert GoldenProfile.load(profile.save(tmp_path)) == GoldenProfile.load(tmp_path) == profile


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (AttributionOptions(method="magic"), "'magic' does not exist.*lga"),
        (AttributionOptions(top_k=9), "9 golden layers asked for"),
    ],
)
def test_bad_options(tiny_llm: LLM, requests: list[EditRequest], options: AttributionOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_golden_layer(tiny_llm, requests, options)


REFERENCE = """
191.77 90.29 281.73 45.99 33.97 25.24 21.43 19.08 25.08 113.94 29.82 483.45 20.48 19.22 17.80 15.67 13.51 12.20
15.74 15.40 24.76 15.23 16.05 9.32 7.66 6.27 5.58 7.80 27.31 375.93
"""  # mean inner product a block, first 128 CounterFact records, from an independent prototype


@pytest.mark.real_model
@pytest.mark.skipif(not SHARED.exists(), reason="needs the benchmark data")
def test_reference_values_of_counterfact(smollm2: LLM) -> None:
    profile = find_golden_layer(smollm2, load_requests(SHARED / "counterfact_easyedit.json", limit=128))
    assert profile.scores == pytest.approx([float(value) for value in REFERENCE.split()], rel=0.01)
    assert profile.excluded == [0, 1, 2, 9, 11, 29]
    assert select(profile.scores).ranking[:5] == [3, 4, 10, 28, 5]
    assert profile.golden_layers == [3]


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(not SHARED.exists(), reason="needs the benchmark data")
def test_reference_ranking_of_zsre(smollm2: LLM) -> None:
    profile = find_golden_layer(
        smollm2, load_requests(SHARED / "zsre_mend.json", limit=128), AttributionOptions(order="signed")
    )
    assert profile.excluded == [0, 2, 9, 11, 29]
    assert select(profile.scores, order="signed").ranking[:5] == [1, 28, 10, 20, 22]


def test_magnitude_ranks_negative_scores_by_size() -> None:
    scores = [-4.0, -9.0, -1.0, -5.0]
    assert select(scores, fences=0, order="signed").ranking == [2, 0, 3, 1]
    assert select(scores, fences=0, order="magnitude").ranking == [1, 3, 0, 2]
    positive = [4.0, 9.0, 1.0, 5.0]
    assert select(positive, 1.0, "magnitude") == select(positive, 1.0, "signed")

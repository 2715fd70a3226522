"""Whitened Adam is Adam in other coordinates, and spares what ordinary text uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import mean_loss
from torch import nn

from pipeline.editing import lessons
from pipeline.editing.contexts import neighbours
from pipeline.editing.editor import edit
from pipeline.editing.finetune import FineTune, FinetuneSettings
from pipeline.editing.statistics import KeyMoments
from pipeline.editing.whitening import WhitenedAdam, inverse_root, whitener
from pipeline.errors import UserError
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.requests.rows import Row
from pipeline.requests.schema import EditRequest
from pipeline.running.stage import run


@pytest.fixture
def moment() -> torch.Tensor:
    torch.manual_seed(0)
    inputs = torch.randn(500, 6) * torch.tensor([10.0, 3.0, 1.0, 1.0, 0.3, 0.1])
    return inputs.T @ inputs / 500


def test_a_gpus_inverse_root_is_that_of_the_eigenvectors() -> None:
    keys = torch.randn(200, 50, dtype=torch.float64) * torch.logspace(0, -5, 50, dtype=torch.float64)
    moment, ridge = keys.T @ keys, 1e-2  # of a rank that ends long before the ridge
    values, vectors = torch.linalg.eigh(moment)
    expected = vectors @ ((values + ridge) ** -0.5).diag() @ vectors.T
    torch.testing.assert_close(inverse_root(moment, ridge), expected, rtol=1e-6, atol=1e-6)


def test_the_whitener_evens_out_and_keeps_the_mean_square(moment: torch.Tensor) -> None:
    whitened = whitener(moment, 1e-9) @ moment @ whitener(moment, 1e-9)
    torch.testing.assert_close(whitened, torch.eye(6) * moment.trace() / 6, rtol=1e-2, atol=1e-2)
    ridged = whitener(moment, 0.1)
    mean = moment / moment.diagonal().mean()
    assert (ridged @ mean @ ridged).trace().item() == pytest.approx(6, rel=1e-3)
    torch.testing.assert_close(whitener(moment, 1e9), torch.eye(6), atol=1e-3, rtol=0)


@pytest.mark.parametrize("inputs", [0, 1])
def test_it_is_adam_on_v_in_w_plus_v_p(moment: torch.Tensor, inputs: int) -> None:
    P = whitener(moment, 0.01)
    shape = (4, 6) if inputs == 1 else (6, 4)
    start, target = torch.randn(shape), torch.randn(shape)
    weight, v = nn.Parameter(start.clone()), nn.Parameter(torch.zeros(shape))
    whitened = WhitenedAdam([{"params": [weight], "lr": 0.1}], {weight: (P, inputs)})
    plain = torch.optim.Adam([v], lr=0.1)
    for _ in range(10):
        whitened.zero_grad()

        def closure() -> torch.Tensor:
            loss = (weight - target).pow(4).sum()
            loss.backward()
            return loss

        whitened.step(closure)
        plain.zero_grad()
        changed = start + (v @ P if inputs == 1 else P @ v)
        (changed - target).pow(4).sum().backward()
        plain.step()
    expected = start + (v @ P if inputs == 1 else P @ v)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_training_moves_text_less_for_as_large_a_change(
    method: str, tiny: LLM, requests: list[EditRequest], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The river of Spain is long and the capital of Norway lies by the sea.\n" * 60)
    statistics = StatisticsOptions(text=str(text), tokens=1024)
    ids = tiny.tokenizer(text.read_text()).input_ids[:100]
    with tiny.frozen(), torch.no_grad():
        before = tiny.model(torch.tensor([ids])).logits
    moved = []
    for whiten in (0.0, 1e-3):
        expert = {"scope": "down", "epochs": 8, "learnt": 0.0, "kl": 0.0, "whiten": whiten}
        if method == "lora":
            expert |= {"rank": 4, "learning_rate": 0.02}
        options = EditOptions(method=method, layers=[2], statistics=statistics, expert=expert)
        update = edit(tiny, requests, options=options)
        ((name, tensor),) = update.tensors.items()
        size = (tensor - tiny.model.get_parameter(name)).norm().item()
        with update.applied(tiny), tiny.frozen(), torch.no_grad():
            moved.append((tiny.model(torch.tensor([ids])).logits - before).norm().item() / size)
    assert moved[1] < 0.8 * moved[0]


def test_kl_keeps_answers_about_something_else(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    texts = tiny_llm.tokens.texts([text for text, _ in neighbours(requests, 1, 256)])
    moved = []
    for kl in (0.0, 20.0):
        expert = {"epochs": 20, "learnt": 0.0, "learning_rate": 0.1, "kl": kl, "whiten": 0.0, "sparing": 0.0}
        update = edit(tiny_llm, requests, options=EditOptions(method="finetune", layers=[1], expert=expert))
        divergence = 0.0
        for ids in texts:
            with tiny_llm.frozen(), torch.no_grad():
                before = tiny_llm.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                with update.applied(tiny_llm):
                    after = tiny_llm.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            divergence += (before.exp() * (before - after)).sum().item()
        moved.append(divergence)
    assert moved[1] < 0.5 * moved[0]


def test_moments_are_of_what_is_read_of_rows_of_any_length(tiny: LLM) -> None:
    rows = [Row([5, 6, 7, 8, 9], 3), Row([7, 3], 2), Row([4, 9, 2], 1)]
    (name,) = tiny.blocks[2].down
    stage = KeyMoments(tiny, [name])
    with tiny.frozen():
        run(stage, rows, batch_size=3)
        keys = []
        for row in rows:
            with stage.activations.entering(name) as seen, torch.no_grad():
                tiny.model(torch.tensor([row.token_ids[: len(row.token_ids) - bool(row.targets)]]))
            keys.append(seen[name].reshape(-1, seen[name].shape[-1]))
    key_NI = torch.cat(keys)
    assert len(key_NI) == 4 + 2 + 2
    torch.testing.assert_close(stage.moments()[name], key_NI.T @ key_NI / len(key_NI), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_a_last_solve_spares_what_is_to_stay(
    method: str, tiny: LLM, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lessons, "PIECES", 10_000)  # to one of text: names alone, which are what is looked at
    texts = tiny.tokens.texts([text for text, _ in neighbours(requests, 9, 256)])
    base, moved, losses = last_logits(tiny, texts), [], []
    for sparing in (0.0, 0.3):
        expert = {"scope": "down", "epochs": 12, "learnt": 0.0, "kl": 0.1, "sparing": sparing}
        update = edit(tiny, requests, options=EditOptions(method=method, layers=[2], expert=expert))
        with update.applied(tiny):
            moved.append((last_logits(tiny, texts) - base).norm().item())
            losses.append(mean_loss(tiny, requests))
    gained = [mean_loss(tiny, requests) - loss for loss in losses]
    assert moved[1] / moved[0] < 0.8, "as much is done to other names as before"
    assert moved[1] / moved[0] < gained[1] / gained[0], "a smaller change would do as well"


def last_logits(llm: LLM, texts: list[list[int]]) -> torch.Tensor:
    """What follows each text."""
    with llm.frozen(), torch.no_grad():
        return torch.stack([llm.model(torch.tensor([ids])).logits[0, -1] for ids in texts])


def test_depths_lie_within_the_model(tiny_llm: LLM) -> None:
    assert FineTune(tiny_llm, [1], FinetuneSettings(depths=[0.5])).layers == [1, len(tiny_llm.blocks) // 2]
    with pytest.raises(UserError, match=r"depths: 1.5; expected parts"):
        FineTune(tiny_llm, [1], FinetuneSettings(depths=[1.5]))


def test_experts_are_whitened_as_one() -> None:
    torch.manual_seed(0)
    keys = torch.randn(3, 40, 5) * torch.tensor([3.0, 1.0, 0.1])[:, None, None]
    blocks = keys.mT @ keys / 40
    torch.testing.assert_close(torch.block_diag(*whitener(blocks, 0.01)), whitener(torch.block_diag(*blocks), 0.01))

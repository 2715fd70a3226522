"""One-pass editing against plain autograd and dense references, and that it learns without an optimiser."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import mean_loss, refusal
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.editing.editor import edit
from pipeline.editing.one_pass import Capturing, OnePass, OnePassSettings, normalised, ridge_solution, sums
from pipeline.model.activations import target_losses
from pipeline.model.blocks import sizes
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.options.shared import TrainerOptions
from pipeline.requests.rows import Row, collate
from pipeline.requests.schema import EditRequest
from pipeline.running.stage import run as run_stage
from pipeline.running.trainer import Runtime

ONE_PASS = EditOptions(method="one_pass", layers=[2])


def with_options(**changes: object) -> EditOptions:
    return replace(ONE_PASS, expert=changes)


def rows_of(llm: LLM, requests: list[EditRequest]) -> list[Row]:
    return llm.tokens.answered(requests, [request.new_answer for request in requests])


def run(
    llm: LLM, requests: list[EditRequest], options: EditOptions, earlier: dict[str, Tensor] | None = None
) -> OnePass:
    """Edit in place, as `edit` does before it undoes it."""
    method = OnePass(llm, options.layers or [], options, earlier)
    with llm.frozen(trainable=method.weight_names):
        method.run(requests, Runtime(TrainerOptions(accelerator="cpu")), [])
    return method


def test_what_is_captured_is_plain_autograds(tiny: LLM, requests: list[EditRequest]) -> None:
    rows, projections = rows_of(tiny, requests), tiny.blocks[2].mlp
    with tiny.frozen():
        captured = run_stage(Capturing(tiny, list(projections)), rows, batch_size=3)
    tiny.model.eval()
    for name, projection in projections.items():
        inputs, outputs, gradients = [], [], []
        for row in rows:  # alone, unpadded, with gradients of all weights
            seen: list[Tensor] = []

            def keep(_: nn.Module, args: tuple[Tensor], output: Tensor, seen: list[Tensor] = seen) -> None:
                seen.extend((args[0], output))

            handle = projection.register_forward_hook(keep)
            logits_TV = tiny.model(input_ids=torch.tensor([row.token_ids])).logits[0]
            handle.remove()
            target = torch.tensor(row.token_ids[row.target_start :])
            loss = F.cross_entropy(logits_TV[row.target_start - 1 : -1], target)
            (gradient,) = torch.autograd.grad(loss, seen[1])
            edited = slice(row.target_start - 1, len(row.token_ids) - 1)
            inputs.append(seen[0][0, edited])
            outputs.append(seen[1][0, edited])
            gradients.append(gradient[0, edited])
        for number, of_row in enumerate(captured):
            for found, expected in zip(of_row[name], (inputs, outputs, gradients), strict=True):
                torch.testing.assert_close(found, expected[number], rtol=1e-4, atol=1e-5)


def test_no_weight_gets_a_gradient_and_no_hook_stays(tiny: LLM, requests: list[EditRequest]) -> None:
    projections = tiny.blocks[2].mlp
    capturing = Capturing(tiny, list(projections)).capturing(len(requests))
    with tiny.frozen(), torch.enable_grad(), capturing:
        loss = target_losses(tiny.model, collate(rows_of(tiny, requests))).sum()
    leaves, seen, waiting = [], set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            waiting += [following for following, _ in node.next_functions]
    hidden = {sizes(projection)[1] for projection in projections.values()}
    assert leaves, "the graph starts at the projections' outputs"
    assert all(leaf.dim() == 3 and leaf.shape[-1] in hidden for leaf in leaves), "and nowhere else"
    assert not any(projection._forward_hooks for projection in projections.values())


@pytest.mark.parametrize("count", [5, 30])  # fewer tokens than inputs, and more
def test_the_solution_is_the_dense_one(count: int) -> None:
    torch.manual_seed(0)
    H, V = torch.randn(count, 12, dtype=torch.float64), torch.randn(count, 7, dtype=torch.float64)
    s = 0.1 * H.square().sum(1).mean()
    expected = torch.linalg.lstsq(
        torch.cat([H, s.sqrt() * torch.eye(12, dtype=H.dtype)]), torch.cat([V, V.new_zeros(12, 7)])
    ).solution.T
    torch.testing.assert_close(ridge_solution(H, V, 0.1), expected)
    torch.testing.assert_close(ridge_solution(1000 * H, V, 0.1) * 1000, expected)


def test_vectors_are_normalised_by_all_that_were_summed() -> None:
    torch.manual_seed(0)
    vectors = 3 + torch.randn(20, 4, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 0])
    merged = sums(vectors[:7]) + sums(vectors[7:])
    with_zero = torch.cat([vectors, torch.zeros(1, 4)])
    expected = (vectors - with_zero.mean(0)) / with_zero.std(0, correction=0)
    torch.testing.assert_close(normalised(vectors, merged), expected)
    one = normalised(vectors[:1], sums(vectors[:1]))
    torch.testing.assert_close(one, vectors[:1].sign(), msg="a token alone keeps its direction")


def test_a_later_update_goes_on_from_earlier_statistics(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    base = {name: tensor.clone() for name, tensor in tiny_llm.model.state_dict().items()}
    whole = run(tiny_llm, requests, ONE_PASS).state
    tiny_llm.model.load_state_dict(base)
    first = run(tiny_llm, requests[:3], ONE_PASS).state
    tiny_llm.model.load_state_dict(base)  # the same model for both, so that the vectors are the same
    kept = {name: tensor.clone() for name, tensor in first.items()}
    second = run(tiny_llm, requests[3:], ONE_PASS, earlier=first).state
    assert second.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(first[name], tensor) for name, tensor in kept.items()), "what was given stays"


@pytest.mark.parametrize("scope", ["mlp", "down"])
def test_new_answers_become_likelier_and_the_base_comes_back(
    tiny: LLM, requests: list[EditRequest], scope: str
) -> None:
    base = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    before = mean_loss(tiny, requests)
    options = replace(with_options(scope=scope, rate=0.5), layers=[2, 3])
    update = edit(tiny, requests, options=options, trainer=TrainerOptions(accelerator="cpu"))
    assert all(torch.equal(tensor, base[name]) for name, tensor in tiny.model.state_dict().items())
    assert list(update.tensors) == [name for layer in (2, 3) for name in tiny.blocks[layer].weight_names(scope)]
    undo = update.apply(tiny)
    assert mean_loss(tiny, requests) < 0.95 * before
    undo.apply(tiny)
    assert all(torch.equal(tensor, base[name]) for name, tensor in tiny.model.state_dict().items())


def test_one_request_alone_changes_a_weight_by_the_rank_of_its_tokens(
    tiny: LLM, requests: list[EditRequest]
) -> None:
    before = mean_loss(tiny, requests[:1])
    (row,) = rows_of(tiny, requests[:1])
    update = edit(tiny, requests[:1], options=ONE_PASS)
    ((name, changed),) = update.tensors.items()
    change = changed - dict(tiny.model.named_parameters())[name].detach()
    values = torch.linalg.svdvals(change.double())
    assert values[len(row.token_ids) - row.target_start] < 1e-5 * values[0]
    with update.applied(tiny):
        assert mean_loss(tiny, requests[:1]) < before


def test_bad_options_are_refused() -> None:
    for name, value in (("scope", "attention"), ("rate", 0), ("ridge", -1)):
        assert refusal(partial(OnePassSettings, **{name: value})).startswith(f"{name}: ")

"""Running the suffix of rows from one block on gives what running everything gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.model.llm import LLM
from pipeline.model.suffix import Suffixes
from pipeline.requests.rows import Row

ROWS = [
    Row([7, 8, 9, 10, 11, 12], subject=(2, 2), target_start=5),
    Row([20, 21, 22], subject=(0, 0), target_start=1),
    Row([30, 31, 32, 33, 34, 35, 36, 37, 37], subject=(6, 6), target_start=8),
    Row([40, 41, 42, 43, 44], subject=(1, 1), target_start=3),
]


def plain_logits(llm: LLM, layer: int, row: Row, change_O: Tensor) -> Tensor:
    """The slow way: the whole row through the whole model, with the change added by a hook."""
    (down,) = llm.blocks[layer].down.values()

    def add(_: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changed = output.clone()
        changed.view(len(row.token_ids), -1)[row.subject[1]] += change_O  # OPT's has no dimension for rows
        return changed

    handle = down.register_forward_hook(add)
    logits = llm.model(input_ids=torch.tensor([row.token_ids])).logits[0]
    handle.remove()
    return logits[row.target_start - 1 : -1]


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_suffix_equals_the_whole(tiny: LLM, layer: int) -> None:
    torch.manual_seed(0)
    change_BO = torch.randn(4, 32)
    with tiny.frozen(), torch.no_grad():
        rows = Suffixes(tiny, layer, ROWS)
        changed_NV = rows.run(change_BO)
        expected_base = torch.cat([plain_logits(tiny, layer, row, torch.zeros(32)) for row in ROWS])
        expected = torch.cat([plain_logits(tiny, layer, row, c) for row, c in zip(ROWS, change_BO, strict=True)])
    torch.testing.assert_close(rows.base_NV, expected_base, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changed_NV, expected, rtol=1e-4, atol=1e-4)
    assert (expected - expected_base).abs().max() > 1e-2, "the change must matter for this test to say anything"


def test_a_subset_gives_its_rows(tiny: LLM) -> None:
    torch.manual_seed(0)
    change_BO = torch.randn(4, 32)
    with tiny.frozen(), torch.no_grad():
        rows = Suffixes(tiny, 1, ROWS)
        everything = rows.run(change_BO)
        chosen = torch.tensor([0, 2, 3])
        part = rows.subset(chosen).run(change_BO[chosen])
    kept = torch.isin(rows.batch.row_N, chosen)
    torch.testing.assert_close(part, everything[kept])


def test_gradients_reach_the_change_alone(tiny: LLM) -> None:
    change_BO = torch.zeros(4, 32, requires_grad=True)
    with tiny.frozen():
        rows = Suffixes(tiny, 1, ROWS)
        rows.run(change_BO).sum().backward()
    assert change_BO.grad is not None
    assert change_BO.grad.abs().sum(1).min() > 0
    assert all(p.grad is None for p in tiny.model.parameters())

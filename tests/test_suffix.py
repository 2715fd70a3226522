"""Running the suffix of rows from one block on gives what running everything gives."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

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


def plain_logits(llm: LLM, row: Row, changes: dict[int, Tensor]) -> Tensor:
    """The slow way: the whole row through the whole model, with the blocks' changes added by hooks."""

    def add(change_O: Tensor, _: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changed = output.clone()
        changed.view(len(row.token_ids), -1)[row.subject[1]] += change_O  # OPT's has no dimension for rows
        return changed

    with ExitStack() as changed:
        for layer, change_O in changes.items():
            (down,) = llm.blocks[layer].down.values()
            changed.enter_context(down.register_forward_hook(partial(add, change_O)))
        logits = llm.model(input_ids=torch.tensor([row.token_ids])).logits[0]
    return logits[row.target_start - 1 : -1]


@pytest.mark.parametrize("layers", [[0], [2], [3], [0, 1, 3]])
def test_suffix_equals_the_whole(tiny: LLM, layers: list[int]) -> None:
    torch.manual_seed(0)
    change_BLO = torch.randn(4, len(layers), 32)
    with tiny.frozen(), torch.no_grad():
        rows = Suffixes(tiny, layers, ROWS)
        changed_NV = rows.run(change_BLO)
        expected_base = torch.cat([plain_logits(tiny, row, {}) for row in ROWS])
        changes = [dict(zip(layers, change_LO, strict=True)) for change_LO in change_BLO]
        expected = torch.cat([plain_logits(tiny, row, own) for row, own in zip(ROWS, changes, strict=True)])
    torch.testing.assert_close(rows.base_NV, expected_base, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changed_NV, expected, rtol=1e-4, atol=1e-4)
    assert (expected - expected_base).abs().max() > 1e-2, "the change must matter for this test to say anything"


def test_a_subset_gives_its_rows(tiny: LLM) -> None:
    torch.manual_seed(0)
    change_BLO = torch.randn(4, 2, 32)
    with tiny.frozen(), torch.no_grad():
        rows = Suffixes(tiny, [1, 2], ROWS)
        everything = rows.run(change_BLO)
        chosen = torch.tensor([0, 2, 3])
        part = rows.subset(chosen).run(change_BLO[chosen])
    kept = torch.isin(rows.batch.row_N, chosen)
    torch.testing.assert_close(part, everything[kept])


def test_gradients_reach_the_change_alone(tiny: LLM) -> None:
    change_BLO = torch.zeros(4, 2, 32, requires_grad=True)
    with tiny.frozen():
        rows = Suffixes(tiny, [1, 2], ROWS)
        rows.run(change_BLO).sum().backward()
    assert change_BLO.grad is not None
    assert change_BLO.grad.abs().sum(-1).min() > 0
    assert all(p.grad is None for p in tiny.model.parameters())

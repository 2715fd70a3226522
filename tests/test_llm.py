"""Freezing gives a model back as it was; a fingerprint sees every edited matrix; no block is made up."""

from __future__ import annotations

import pytest
import torch
from conftest import refusal
from torch import nn

from pipeline.model.llm import LLM


def states(model: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    """Which weights want a gradient, and which modules are in training mode."""
    return (
        {name: weight.requires_grad for name, weight in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_frozen_gives_the_models_state_back(tiny: LLM, training: bool, error: type[BaseException] | None) -> None:
    tiny.model.train(training)
    next(iter(tiny.blocks[1].mlp.values())).weight.requires_grad_(False)
    (trainable,) = tiny.blocks[2].weight_names("down")
    before = states(tiny.model)
    try:
        with tiny.frozen([trainable]):
            required, modes = states(tiny.model)
            assert [name for name, wanted in required.items() if wanted] == [trainable]
            assert not any(modes.values())
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert states(tiny.model) == before
    assert not all(before[0].values())


def test_frozen_gives_each_modules_mode_back(tiny_llm: LLM) -> None:
    tiny_llm.model.train()
    tiny_llm.model.model.layers[1].eval()
    before = states(tiny_llm.model)
    with tiny_llm.frozen():
        pass
    assert states(tiny_llm.model) == before


def test_a_fingerprint_sees_every_edited_matrix(tiny: LLM) -> None:
    def now() -> str:
        return LLM(tiny.model, tiny.tokenizer).fingerprint

    assert now() == tiny.fingerprint
    seen = {tiny.fingerprint}
    for name in [name for block in tiny.blocks for name in block.weight_names("mlp")]:
        weight = tiny.model.get_parameter(name)
        base = weight.detach().clone()
        with torch.no_grad():
            weight.add_(1e-3 * torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1])))
        seen.add(now())
        with torch.no_grad():
            weight.copy_(base)
    assert len(seen) == 1 + sum(len(block.mlp) for block in tiny.blocks)
    assert now() == tiny.fingerprint


def test_a_fingerprint_is_kept_and_checked(tiny_llm: LLM) -> None:
    tiny_llm.check_made_for("profile", "tiny", tiny_llm.fingerprint)
    message = refusal(lambda: tiny_llm.check_made_for("profile", "other", "0123456789abcdef"))
    assert message.startswith("profile") and "'other'" in message and tiny_llm.fingerprint in message


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_block_that_is_not_there_is_refused(tiny_llm: LLM, layer: int) -> None:
    tiny_llm.check_layers([0, 3])
    message = refusal(lambda: tiny_llm.check_layers([0, layer]))
    assert f"layers: {layer} " in message and "0 to 3" in message

"""Running the upper blocks alone gives what running all gives, for families that choose by block index, too."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, make_tiny
from transformers import PreTrainedTokenizerFast

from pipeline.editing import edit
from pipeline.model import LLM, collate_targets, encode, target_logits
from pipeline.model.upper import handing_on, passing_through, reading_enter
from pipeline.options import EditOptions, FinetuneOptions
from pipeline.requests import EditRequest


@pytest.fixture(params=FAMILIES)
def any_tiny(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> LLM:
    return make_tiny(request.param, tokenizer)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_upper_blocks_alone_give_the_same_logits(layer: int, any_tiny: LLM, requests: list[EditRequest]) -> None:
    batch = collate_targets(encode(any_tiny, [(r.prompt, r.new_answer) for r in requests]))
    with any_tiny.frozen(), torch.no_grad():
        expected_NV = target_logits(any_tiny.model, batch)
        with reading_enter(any_tiny, layer) as entering, passing_through(any_tiny, layer):
            any_tiny.model(input_ids=batch.input_ids_BT, use_cache=False)
        with handing_on(any_tiny, layer, entering[0]):
            found_NV = target_logits(any_tiny.model, batch)
        with handing_on(any_tiny, layer, torch.zeros_like(entering[0])):
            other_NV = target_logits(any_tiny.model, batch)
        again_NV = target_logits(any_tiny.model, batch)
    torch.testing.assert_close(found_NV, expected_NV, rtol=1e-5, atol=1e-5)
    assert (other_NV - expected_NV).abs().max() > 1e-2, "lower blocks did not run"
    assert torch.equal(again_NV, expected_NV), "and run again"


def test_a_forward_that_a_library_replaced_comes_back(tiny_llm: LLM) -> None:
    block = tiny_llm.model.get_submodule(tiny_llm.blocks[0].name)
    own = block.forward
    block.forward = own  # as accelerate's hooks do
    with handing_on(tiny_llm, 1, torch.zeros(1, 1, 32)):
        assert block.forward is not own
    assert vars(block)["forward"] == own


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_training_is_the_same_either_way(method: str, any_tiny: LLM, requests: list[EditRequest]) -> None:
    llm = LLM(any_tiny.model.double(), any_tiny.tokenizer, any_tiny.name)
    changed = []
    for reuse in (True, False):
        options = EditOptions(method=method, layers=[2, 3])
        for training in (options.finetune, options.lora):
            training.epochs, training.kl, training.learnt, training.whiten, training.reuse = 4, 0.5, 0.0, 0.0, reuse
        changed.append(edit(llm, requests, options=options).tensors)
    base = dict(llm.model.named_parameters())
    for name, tensor in changed[0].items():
        torch.testing.assert_close(tensor, changed[1][name], rtol=1e-5, atol=1e-5)
        assert (tensor - base[name]).abs().max() > 1e-4, name


def test_no_gradient_is_formed_that_nobody_reads(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    formed: set[str] = set()
    for name, weight in tiny_llm.model.named_parameters():
        weight.requires_grad_(True)
        weight.register_post_accumulate_grad_hook(lambda _, name=name: formed.add(name))
    options = FinetuneOptions(epochs=1, scope="down", whiten=0.0)
    update = edit(tiny_llm, requests, options=EditOptions(method="finetune", layers=[1], finetune=options))
    assert formed == set(update.tensors)

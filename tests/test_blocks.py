"""The map of blocks: every projection of an MLP and of attention is found; what cannot be edited is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_tiny, refusal
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from pipeline.model.blocks import find_blocks, sizes
from pipeline.model.llm import LLM

NAMES = {
    "llama": ("model.layers", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj"]),
}
MLP_SIZES = {
    "llama": {"mlp.gate_proj": (32, 48), "mlp.up_proj": (32, 48), "mlp.down_proj": (48, 32)},
    "gpt2": {"mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)},
}


@pytest.mark.parametrize("family", NAMES)
def test_blocks_are_found(tokenizer: PreTrainedTokenizerFast, family: str) -> None:
    blocks = find_blocks(make_tiny(family, tokenizer).model)
    place, attention = NAMES[family]
    assert [(block.index, block.name) for block in blocks] == [(i, f"{place}.{i}") for i in range(4)]
    for block in blocks:
        found = [(name, sizes(module)) for name, module in block.mlp.items()]
        assert found == [(f"{block.name}.{name}", size) for name, size in MLP_SIZES[family].items()]
        assert list(block.attention) == [f"{block.name}.{name}" for name in attention]


def test_scopes_name_weights_of_the_model(tiny: LLM) -> None:
    weights = dict(tiny.model.named_parameters())
    for block in tiny.blocks:
        mlp, attention = block.weight_names("mlp"), block.weight_names("attention")
        assert block.weight_names("down") == mlp[-1:]
        assert block.weight_names("block") == attention + mlp
        assert all(weights[name] is block.projections("block")[name[:-7]].weight for name in attention + mlp)
        assert all(weights[name].dim() == 2 for name in attention + mlp)


def test_an_unknown_scope_is_refused(tiny_llm: LLM) -> None:
    assert "did you mean 'down'" in refusal(lambda: tiny_llm.blocks[0].projections("downs"))


SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
BART = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "T5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=300, d_model=32, d_ff=48, num_layers=2, num_heads=2)
        ),
        "encoder-decoder",
    ),
    "BART": (
        lambda: BartForConditionalGeneration(BartConfig(vocab_size=300, d_model=32, encoder_ffn_dim=48, **BART)),
        "encoder-decoder",
    ),
    "JetMoe": (
        lambda: JetMoeForCausalLM(
            JetMoeConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, kv_channels=8, num_local_experts=4)
        ),
        "experts that are not run as the library runs them",
    ),
    "BERT": (
        lambda: BertLMHeadModel(BertConfig(**SMALL, num_attention_heads=4, intermediate_size=48)),
        "looks ahead",
    ),
    "Mamba": (lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)), "mixer.in_proj 32→128"),
    "no head": (lambda: LlamaModel(LlamaConfig(**SMALL, **HEADS)), "language-model head"),
}


@pytest.mark.parametrize(("build", "words"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_models_are_refused(
    tokenizer: PreTrainedTokenizerFast, build: Callable[[], Any], words: str
) -> None:
    model = build()
    message = refusal(lambda: LLM(model, tokenizer))
    assert type(model).__name__ in message and words in message


def test_blocks_that_share_weights_are_refused(tiny_llm: LLM) -> None:
    layers: Any = tiny_llm.model.get_submodule("model.layers")
    layers[2].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
    message = refusal(lambda: LLM(tiny_llm.model, tiny_llm.tokenizer))
    assert "blocks 1 and 2 share a weight (mlp.down_proj.weight)" in message


@pytest.mark.real_model
def test_the_bundled_model_is_mapped(smollm2: LLM) -> None:
    assert smollm2.name == "smollm2" and len(smollm2.blocks) == 30
    assert (
        smollm2.tokenizer("The").input_ids == smollm2.tokenizer("The", add_special_tokens=False).input_ids
    )  # no BOS
    for block in smollm2.blocks:
        assert [sizes(projection) for projection in block.mlp.values()] == [(576, 1536), (576, 1536), (1536, 576)]
        assert len(block.attention) == 4


@pytest.mark.real_model
@torch.no_grad()
def test_first_tokens_are_massive_after_blocks_2_9_and_11(smollm2: LLM) -> None:
    """METHODS: these blocks write activations to the first token that dwarf all others; 3 to 6 do not."""
    outputs: dict[int, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda _module, _args, output, index=block.index: outputs.update({index: output[0]})
        )
        for block in smollm2.blocks
        for module in block.down.values()
    ]
    try:
        smollm2.model(**smollm2.tokenizer("The capital of Spain is the city of", return_tensors="pt"))
    finally:
        for handle in handles:
            handle.remove()
    ratios = {index: (out[0].abs().max() / out[1:].abs().max()).item() for index, out in outputs.items()}
    assert min(ratios[index] for index in (2, 9, 11)) > 10
    assert max(ratios[index] for index in (3, 4, 5, 6)) < 2

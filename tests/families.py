"""A tiny random model of each family in docs/limits.md: three blocks, and what is peculiar to the family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from pipeline.model.llm import LLM

HIDDEN, BLOCKS, CONTEXT = 32, 3, 128
ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
OWN_HEADS = {**SHAPE, "num_key_value_heads": 4}
GPT = {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": CONTEXT}
TURNS = ["sliding_attention", "full_attention", "sliding_attention"]


def with_pictures(vocab_size: int, **settings: Any) -> Gemma3Config:
    """A text decoder beside a reader of pictures that has as many blocks, also called `layers`."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
    return Gemma3Config(
        text_config={"vocab_size": vocab_size, **settings},
        vision_config=vision | {"image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        **{f"{token}_token_index": vocab_size - 1 for token in ("boi", "eoi", "image")},
    )


FAMILIES: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, SHAPE),
    "mistral": (MistralConfig, SHAPE | {"sliding_window": 3}),
    "qwen2": (Qwen2Config, SHAPE | {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, SHAPE | {"head_dim": 16}),
    "gemma": (GemmaConfig, SHAPE | {"head_dim": 16}),
    "gemma2": (Gemma2Config, SHAPE | {"head_dim": 8, "sliding_window": 3, "layer_types": TURNS}),
    "gemma3": (Gemma3TextConfig, SHAPE | {"head_dim": 8, "sliding_window": 3, "layer_types": TURNS}),
    "gemma3 with pictures": (with_pictures, SHAPE | {"head_dim": 8, "sliding_window": 3, "layer_types": TURNS}),
    "gpt2": (GPT2Config, GPT),
    "gptj": (GPTJConfig, GPT | {"rotary_dim": 4}),
    "gpt_neox": (GPTNeoXConfig, OWN_HEADS | {"rotary_pct": 0.5}),
    "opt": (OPTConfig, OWN_HEADS | {"ffn_dim": 48}),
    "opt, norms behind": (
        OPTConfig,
        OWN_HEADS | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "bloom": (BloomConfig, {"hidden_size": HIDDEN, "n_layer": BLOCKS, "n_head": 4}),
    "falcon": (FalconConfig, OWN_HEADS | {"multi_query": True, "parallel_attn": True}),
    "falcon, ALiBi": (FalconConfig, OWN_HEADS | {"parallel_attn": False, "alibi": True, "bias": True}),
    "falcon, two norms": (FalconConfig, OWN_HEADS | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "phi": (PhiConfig, OWN_HEADS),
    "phi3": (Phi3Config, SHAPE),
    "olmo2": (Olmo2Config, SHAPE),
    "stablelm": (StableLmConfig, SHAPE | {"use_qkv_bias": True}),
    "smollm3": (SmolLM3Config, SHAPE | {"no_rope_layers": [1, 0, 1]}),
}


def family_model(family: str, vocabulary: int, seed: int = 0) -> PreTrainedModel:
    """A fresh model, its weights large enough for gradients and attention to differ from place to place."""
    make, settings = FAMILIES[family]
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(make(vocab_size=vocabulary, **ENDS | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)  # biases start at nought, where nothing would show that they are read
    return model.eval()


def family_llm(family: str, tokenizer: PreTrainedTokenizerBase) -> LLM:
    """The same with the tests' tokenizer."""
    return LLM(family_model(family, len(tokenizer)), tokenizer, f"tiny-{family}")

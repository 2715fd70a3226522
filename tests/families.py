"""A tiny random model of each family in docs/limits.md: three blocks, and what is peculiar to the family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    Lfm2MoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MiniMaxM2Config,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    NemotronHConfig,
    Olmo2Config,
    OlmoeConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLMoeConfig,
    SmolLM3Config,
    StableLmConfig,
)

from pipeline.model.llm import LLM
from pipeline.model.loading import decoder_of

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


VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": BLOCKS, "depth": 1}
VISION |= {"num_attention_heads": 2, "num_heads": 2, "head_dim": 8, "image_size": 8, "patch_size": 4}
VISION |= {"out_hidden_size": HIDDEN, "spatial_merge_size": 1, "deepstack_visual_indexes": [0]}


def with_pictures(make: Callable[..., PreTrainedConfig], **more: Any) -> Callable[..., PreTrainedConfig]:
    """A text decoder beside a reader of pictures, which may have as many blocks, also called `layers`."""

    def build(vocab_size: int, **settings: Any) -> PreTrainedConfig:
        own = {name: more[name] for name in more if name != "vision"}
        text = {"vocab_size": vocab_size, **settings, "pad_token_id": 0}
        return make(text_config=text, vision_config=VISION | more.get("vision", {}), **own)

    return build


EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
ROUTED |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1}
ERNIE |= {"moe_layer_start_index": 1}
LLAMA4 = {"intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8, "interleave_moe_layer_step": 2}
BY_LAYER = SHAPE | {"head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 500}
BY_LAYER |= {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 3}
GEMMA3N = {"intermediate_size": [48] * 3, "activation_sparsity_pattern": [0.0] * 3, "altup_num_inputs": 2}
GEMMA3N |= {"laurel_rank": 4, "num_kv_shared_layers": 0}
GEMMA4_EXPERTS = {"hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
GEMMA4_EXPERTS |= {"moe_intermediate_size": 24, "global_head_dim": 8, "num_kv_shared_layers": 0}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 8}
LINEAR |= {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
LINEAR |= {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
BY_PLACE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
BY_PLACE = {"head_dim": 8, "rope_parameters": BY_PLACE}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
MAMBA |= {"mamba_expand": 1, "mamba_chunk_size": 8}
GRANITE = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 40}
GRANITE |= {"layer_types": ["mamba", "attention", "mamba"]}
NEMOTRON = {"hybrid_override_pattern": "M-*", "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8}
NEMOTRON |= {"n_groups": 1, "chunk_size": 8, "head_dim": 8}

NEMOTRON_EXPERTS = {"hybrid_override_pattern": "ME*", "n_routed_experts": 4, "num_experts_per_tok": 2}
NEMOTRON_EXPERTS |= {"moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40, "moe_latent_size": 48}
NEMOTRON_EXPERTS |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}

FAMILIES: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, SHAPE),
    "mistral": (MistralConfig, SHAPE | {"sliding_window": 3}),
    "qwen2": (Qwen2Config, SHAPE | {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, SHAPE | {"head_dim": 16}),
    "gemma": (GemmaConfig, SHAPE | {"head_dim": 16}),
    "gemma2": (Gemma2Config, SHAPE | {"head_dim": 8, "sliding_window": 3, "layer_types": TURNS}),
    "gemma3": (Gemma3TextConfig, SHAPE | {"head_dim": 8, "sliding_window": 3, "layer_types": TURNS}),
    "gemma3 with pictures": (
        with_pictures(Gemma3Config, mm_tokens_per_image=4),
        SHAPE | {"head_dim": 8, "sliding_window": 3, "layer_types": TURNS},
    ),
    "mistral3 with pictures": (
        with_pictures(Mistral3Config, vision={"model_type": "pixtral"}, spatial_merge_size=1),
        SHAPE | {"model_type": "mistral", "head_dim": 8},
    ),
    "gpt2": (GPT2Config, GPT),
    "openai-gpt": (OpenAIGPTConfig, GPT),
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
    "glm4": (Glm4Config, SHAPE | {"head_dim": 8}),
    "cohere2": (Cohere2Config, SHAPE | {"sliding_window": 3}),
    "nemotron": (NemotronConfig, SHAPE),
    "gemma3n": (Gemma3nTextConfig, BY_LAYER | GEMMA3N),
    "gemma4": (Gemma4TextConfig, BY_LAYER | {"global_head_dim": 8, "num_kv_shared_layers": 0}),
    "gemma4, keys shared": (Gemma4TextConfig, BY_LAYER | {"global_head_dim": 8, "num_kv_shared_layers": 1}),
}
MIXTURES: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "qwen3_moe": (Qwen3MoeConfig, SHAPE | EXPERTS | {"head_dim": 8}),
    "qwen2_moe": (Qwen2MoeConfig, SHAPE | EXPERTS | {"shared_expert_intermediate_size": 40}),
    "olmoe": (OlmoeConfig, SHAPE | EXPERTS | {"intermediate_size": 24}),
    "mixtral": (MixtralConfig, SHAPE | {"num_local_experts": 4}),
    "gpt_oss": (GptOssConfig, SHAPE | LOCAL | {"head_dim": 8, "sliding_window": 3, "layer_types": TURNS}),
    "deepseek_v3": (DeepseekV3Config, SHAPE | LATENT | ROUTED),
    "glm4_moe": (Glm4MoeConfig, SHAPE | ROUTED | {"head_dim": 8}),
    "ernie4_5_moe": (Ernie4_5_MoeConfig, SHAPE | ERNIE),
    "minimax_m2": (MiniMaxM2Config, SHAPE | LOCAL | {"head_dim": 8, "rotary_dim": 8}),
    "llama4": (Llama4TextConfig, SHAPE | LLAMA4),
    "gemma4, experts": (Gemma4TextConfig, BY_LAYER | GEMMA4_EXPERTS),
    "qwen3_next": (Qwen3NextConfig, SHAPE | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 40}),
    "qwen3_5": (Qwen3_5TextConfig, SHAPE | LINEAR),
    "falcon_h1": (FalconH1Config, SHAPE | MAMBA | {"head_dim": 8}),
    "granitemoehybrid": (GraniteMoeHybridConfig, SHAPE | MAMBA | GRANITE),
    "lfm2_moe": (
        Lfm2MoeConfig,
        SHAPE | EXPERTS | {"layer_types": ["conv", "full_attention", "conv"]} | {"num_dense_layers": 1},
    ),
    "qwen3_vl_moe": (
        with_pictures(Qwen3VLMoeConfig),
        SHAPE | EXPERTS | {"head_dim": 8, "rope_parameters": BY_PLACE},
    ),
    "nemotron_h": (NemotronHConfig, SHAPE | NEMOTRON),
    "nemotron_h, experts": (NemotronHConfig, SHAPE | NEMOTRON | NEMOTRON_EXPERTS),
}


FAMILIES |= MIXTURES


def family_model(family: str, vocabulary: int, seed: int = 0) -> PreTrainedModel:
    """A fresh model, its weights large enough for gradients and attention to differ from place to place."""
    make, settings = FAMILIES[family]
    torch.manual_seed(seed)
    model: PreTrainedModel = decoder_of(make(vocab_size=vocabulary, **ENDS | settings), family)
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

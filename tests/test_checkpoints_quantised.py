"""Checkpoints that keep their weights in few bits are read as plain ones, edited, and written as plain ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import refusal
from families import CONTEXT, ENDS
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from pipeline.editing.editor import edit
from pipeline.editing.export import export_merged
from pipeline.model.loading import load_model
from pipeline.options.editing import EditOptions
from pipeline.requests.schema import EditRequest

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # e2m1, by its four bits
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SMALL |= {"max_position_embeddings": CONTEXT, **ENDS}

Tensors = dict[str, Tensor]


def as_mxfp4(tensors: Tensors) -> Tensors:
    """Replace experts by random blocks of 32 four-bit numbers, each with a power of two; what they come to."""
    plain = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = scales = torch.randint(120, 126, shape, dtype=torch.uint8)
        pairs = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], dim=-1).flatten(-2)
        plain[name] = (pairs * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).mT
    return plain


def as_fp8(tensors: Tensors) -> Tensors:
    """Replace linear maps by random eight-bit numbers with a scale for every 128 by 128 of them."""
    plain = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = numbers = torch.randn(rows, columns).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-rows // 128), -(-columns // 128)) / 100 + 0.001
        tensors[f"{name}_scale_inv"] = scales
        spread = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        plain[name] = numbers.float() * spread
    return plain


WAYS: dict[str, tuple[PreTrainedConfig, Callable[[Tensors], Tensors], dict[str, object]]] = {
    "mxfp4": (
        GptOssConfig(vocab_size=500, hidden_size=32, intermediate_size=32, num_local_experts=4, **SMALL),
        as_mxfp4,
        {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]},
    ),
    "fp8": (
        LlamaConfig(vocab_size=500, hidden_size=128, intermediate_size=256, **SMALL),
        as_fp8,
        {"weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    ),
}


def write(folder: Path, way: str, tokenizer: PreTrainedTokenizerFast, **changes: int) -> Tensors:
    """Write a checkpoint; what its weights come to."""
    config, quantise, about = WAYS[way]
    config = type(config)(**config.to_dict() | changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = quantise(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    saved = json.loads((folder / "config.json").read_text())
    saved["quantization_config"] = about | {"quant_method": way}
    (folder / "config.json").write_text(json.dumps(saved))
    return plain


@pytest.mark.parametrize("way", WAYS)
def test_they_are_read_edited_and_written_as_plain_ones(
    way: str, tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest], tmp_path: Path
) -> None:
    config, quantise, about = WAYS[way]
    torch.manual_seed(0)
    folder, exported = tmp_path / "quantised", tmp_path / "exported"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = quantise(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    saved = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": about | {"quant_method": way}
    }
    (folder / "config.json").write_text(json.dumps(saved))

    llm = load_model(str(folder))
    weights = dict(llm.model.named_parameters())
    assert plain
    for name, tensor in plain.items():
        torch.testing.assert_close(
            weights[name], tensor, rtol=0, atol=0, msg=lambda words, of=name: f"{of}: {words}"
        )
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    expert = {"epochs": 1, "contexts": 0, "whiten": 0.0, "sparing": 0.0}
    update = edit(llm, requests[:2], options=EditOptions(method="finetune", layers=[0], expert=expert))
    export_merged(llm, update, exported)
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    loaded, ids = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        base = llm.model(input_ids=ids).logits
        with update.applied(llm):
            expected = llm.model(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-4)


def test_sides_that_blocks_do_not_fill_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The library takes two scales of 192 rows as one for each 96."""
    write(tmp_path, "fp8", tokenizer, intermediate_size=192)
    message = refusal(lambda: load_model(str(tmp_path)))
    assert "model.layers.0.mlp.gate_proj is of 192 by 128 in FP8; expected multiples of 128" in message

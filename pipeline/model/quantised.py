"""A base model whose blocks stay in 4 bits while what is edited is plain: one large device then holds a 70B model.

What stays frozen is quantised by bitsandbytes as the model is loaded, and gradients go through it (QLoRA, arXiv
2305.14314). A map that is edited is put back as the checkpoint has it, so that an update holds the checkpoint's own
weights, changed, and fits the checkpoint in any precision.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.model.blocks import Block, find_blocks
from pipeline.model.fingerprints import sample

if TYPE_CHECKING:
    from pipeline.model.llm import LLM

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight: 4 bits, and scales of 64, of whose 256 in turn one


def quantise(model: PreTrainedModel, device: torch.device) -> None:
    """Put the linear maps of a model's blocks into 4 bits (NF4), one by one, on this device.

    Raises:
        UserError: where bitsandbytes is not installed, or blocks have other maps, such as stacked experts.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        install = "`pip install golden-layers[nf4]`"
        raise UserError(f"trainer.precision: nf4 needs bitsandbytes: run {install}, or give bf16-true") from None
    for block in find_blocks(model):
        for name, plain in linear_maps(block).items():
            sizes, bias = (plain.in_features, plain.out_features), plain.bias
            made = Linear4bit(
                *sizes, bias is not None, plain.weight.dtype, quant_type="nf4", device=torch.device("meta")
            )
            made.weight = Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4", module=made)
            made.bias, made.support_avx512bf16_for_cpu = bias, False  # no gradient goes through that way
            model.set_submodule(name, made.to(device))
    nn.Module.to(model, device)


def linear_maps(block: Block) -> dict[str, nn.Linear]:
    """A block's linear maps by full name; UserError where it has others, which do not come in 4 bits."""
    found = {}
    for name, one in (block.attention | block.mlp).items():
        if not isinstance(one, nn.Linear):
            raise UserError(f"trainer.precision: nf4: {name} is a {type(one).__name__}; expected linear maps")
        found[name] = one
    return found


def make_plain(llm: LLM, weights: Collection[str]) -> None:
    """Put back, as the checkpoint has them, those of these weights, by full name, that are quantised.

    Raises:
        UserError: for a quantised model that `load_model` has not made, of which no plain weights are known.
    """
    names = [llm.reading(weight)[0] for weight in weights]
    packed = [name for name in names if _is_packed(llm.model.get_submodule(name))]
    if not packed:
        return
    if llm.original is None:
        raise UserError(f"model: {packed[0]} of {llm.name} is quantised, and no plain weights of it are known")
    original = llm.original()
    for name in packed:
        llm.model.set_submodule(name, original.get_submodule(name).to(llm.embedding.device).requires_grad_(False))
    llm.blocks, llm.sample = find_blocks(llm.model), sample(llm.model)


def _is_packed(module: Any) -> bool:
    return isinstance(module, nn.Linear) and not module.weight.is_floating_point()

"""The map of a decoder's blocks and their editable projections, recognised by structure.

A decoder is supported when it holds one list of alike blocks, and each block, beside its attention, has an
MLP that projects the hidden state up (one or two linear maps, or two fused into one) and down again (one). Of a
model that reads pictures or sound as well, the text decoder is what counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError, check_choice

Projection = nn.Linear | Conv1D


@dataclass(frozen=True)
class Block:
    """One decoder block and its linear maps, by their full names in the model.

    It has a place, counted from 0, and a full name of its own; in its MLP the down-projection is the last.
    """

    index: int
    name: str
    module: nn.Module
    mlp: dict[str, Projection]
    attention: dict[str, Projection]

    @property
    def down(self) -> dict[str, Projection]:
        """The MLP's down-projection alone."""
        name = list(self.mlp)[-1]
        return {name: self.mlp[name]}

    def projections(self, scope: str) -> dict[str, Projection]:
        """The projections of a scope: mlp, down, attention or block (attention and mlp)."""
        scopes = {
            "mlp": self.mlp,
            "down": self.down,
            "attention": self.attention,
            "block": self.attention | self.mlp,
        }
        check_choice("scope", scope, scopes)
        return scopes[scope]

    def weight_names(self, scope: str) -> list[str]:
        """Full names of the scope's weight matrices (no biases, no norms)."""
        return [f"{name}.weight" for name in self.projections(scope)]


def sizes(projection: Projection) -> tuple[int, int]:
    """(inputs, outputs) of a linear map; GPT-2's Conv1D stores its weight the other way round."""
    rows, columns = projection.weight.shape
    return (rows, columns) if isinstance(projection, Conv1D) else (columns, rows)


def as_stored(projection: Projection, matrix_OI: Tensor) -> Tensor:
    """A matrix (O, I) as a linear map stores its weight; or such a weight as (O, I)."""
    return matrix_OI.T if isinstance(projection, Conv1D) else matrix_OI


def by_row(vectors: Tensor, rows: int) -> Tensor:
    """What enters or leaves a projection as (rows, T, D): OPT hands its MLP all rows' tokens as one list."""
    return vectors.reshape(rows, -1, vectors.shape[-1])


def find_blocks(model: PreTrainedModel, name: str = "") -> list[Block]:
    """Map every block of a decoder, which the user calls by this name.

    Raises:
        UserError: when the model is not built as this module's docstring says, with what was found.
    """
    kind = f"{name!r} ({type(model).__name__})" if name else type(model).__name__
    check_config(model.config, kind)
    config = model.config.get_text_config(decoder=True)
    inside = set(model.get_decoder().modules())
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and module in inside
        and len(module) == config.num_hidden_layers
        and len({type(block) for block in module}) == 1
    ]
    if not lists:
        raise UserError(f"model: {kind}: expected a list of {config.num_hidden_layers} alike blocks; found none")
    path, blocks = lists[0]
    return [
        _map_block(f"model: {kind}, block {index}", f"{path}.{index}", index, block, config.hidden_size)
        for index, block in enumerate(blocks)
    ]


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse what no edit can work on, as far as a model's config tells, before any weight is read.

    Raises:
        UserError: for an encoder-decoder, or weights that are kept quantised.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model: {name} is an encoder-decoder ({type(config).__name__}); expected a decoder alone")
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = getattr(quantization, "quant_method", None) or dict(quantization).get("quant_method", "unknown")
        raise UserError(
            f"model: {name} keeps its weights quantised ({getattr(method, 'value', method)}), which an edit cannot "
            "change exactly; expected plain weights (a GGUF file is dequantised as it is read)"
        )


def _map_block(where: str, name: str, index: int, block: nn.Module, hidden: int) -> Block:
    _check_block(where, block)
    attention: dict[str, Projection] = {}
    mlp: dict[str, Projection] = {}
    for inner, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            (attention if _is_attention(inner) else mlp)[f"{name}.{inner}"] = module
    down = [key for key, module in mlp.items() if sizes(module)[1] == hidden and sizes(module)[0] != hidden]
    ups = [key for key in mlp if key not in down]
    fits = (
        len(down) == 1
        and len(ups) in (1, 2)
        and all(sizes(mlp[key])[0] == hidden for key in ups)
        and sum(sizes(mlp[key])[1] for key in ups) % sizes(mlp[down[0]])[0] == 0
    )
    if not fits:
        found = ", ".join(f"{key.removeprefix(name + '.')} {sizes(m)[0]}→{sizes(m)[1]}" for key, m in mlp.items())
        raise UserError(
            f"{where}: expected an MLP of one or two linear maps up from {hidden} and one down to it; "
            f"found {found or 'no linear map beside attention'}"
        )
    return Block(index, name, block, {key: mlp[key] for key in [*ups, *down]}, attention)


def _is_attention(inner: str) -> bool:
    return "att" in inner.split(".")[0].lower()


def _check_block(where: str, block: nn.Module) -> None:
    """Raise UserError for a mixture of experts, attention that looks ahead, or weights that are no real numbers."""
    for inner, module in block.named_modules():
        stacked = [f"{inner}.{key}" for key, weight in module.named_parameters(recurse=False) if weight.dim() == 3]
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            stacked = [inner]
        if stacked and not _is_attention(inner) and not isinstance(module, nn.Conv1d):
            raise UserError(f"{where}: a mixture of experts ({stacked[0]}); expected one dense MLP a block")
        if getattr(module, "is_causal", True) is False:
            raise UserError(f"{where}: its attention looks ahead ({inner}); expected a causal decoder")
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            raise UserError(f"{where}: {inner} is quantised ({module.weight.dtype}); expected plain weights")

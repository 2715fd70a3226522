"""The map of a decoder's blocks and their editable projections, recognised by structure.

A decoder is supported when it holds one list of alike blocks, and each block, beside its attention, has an
MLP that projects the hidden state up (one or two linear maps) and down again (one).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError, check_choice

Projection = nn.Linear | Conv1D


@dataclass(frozen=True)
class Block:
    """One decoder block and its linear maps, by their full names in the model.

    Attributes:
        index: its place, counted from 0.
        name: the block's own full name.
        mlp: the MLP's projections, the down-projection last.
        attention: the attention's projections.
    """

    index: int
    name: str
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


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """Map every block of a decoder.

    Raises:
        UserError: when the model is not built as this module's docstring says, with what was found.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"model: {type(model).__name__} is an encoder-decoder; expected a decoder alone")
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == config.num_hidden_layers
        and len({type(block) for block in module}) == 1
    ]
    if not lists:
        raise UserError(
            f"model: {type(model).__name__}: expected a list of {config.num_hidden_layers} alike blocks; found none"
        )
    name, blocks = lists[0]
    return [_map_block(model, f"{name}.{index}", index, block, config) for index, block in enumerate(blocks)]


def _map_block(model: PreTrainedModel, name: str, index: int, block: nn.Module, config: PretrainedConfig) -> Block:
    hidden = config.hidden_size
    attention: dict[str, Projection] = {}
    mlp: dict[str, Projection] = {}
    for inner, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            is_attention = "att" in inner.split(".")[0].lower()
            (attention if is_attention else mlp)[f"{name}.{inner}"] = module
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
            f"model: {type(model).__name__}, block {index}: expected an MLP of one or two linear maps up from "
            f"{hidden} and one down to it; found {found or 'no linear map beside attention'}"
        )
    return Block(index, name, {key: mlp[key] for key in [*ups, *down]}, attention)

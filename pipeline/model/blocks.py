"""The map of a decoder's blocks and their editable projections, recognised by structure.

A decoder is supported when it holds one list of blocks, some of which have an MLP that projects the hidden state up
(one or two linear maps, or two fused into one) and down again (one), or routed experts, or both; what else is in a
block does not matter. Of a model that reads pictures or sound as well, the text decoder is what counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError, check_choice
from pipeline.model.experts import Stacked, as_maps, is_standard

Projection = nn.Linear | Conv1D | Stacked

DOWN = ("down", "w2", "fc2", "fc_out", "output", "dense_4h_to_h")  # how down-projections are called
READ_PLAIN = ("mxfp4", "fp8")  # ways of quantising that the library undoes on reading


@dataclass(frozen=True)
class Block:
    """One decoder block and its linear maps, by their full names in the model.

    It has a place, counted from 0, and a full name of its own. In its MLP the down-projection is the last; that of
    routed experts comes after a dense MLP beside them, which every token passes. A block may have no MLP.
    """

    index: int
    name: str
    module: nn.Module
    mlp: dict[str, Projection]
    attention: dict[str, Projection]

    @property
    def down(self) -> dict[str, Projection]:
        """The MLP's down-projection alone."""
        return dict([*self.mlp.items()][-1:])

    @property
    def scopes(self) -> dict[str, dict[str, Projection]]:
        """The projections of each scope; experts are those that tokens are sent to, shared the MLP beside them."""
        routed: dict[str, Projection] = {name: one for name, one in self.mlp.items() if isinstance(one, Stacked)}
        return {
            "mlp": self.mlp,
            "down": self.down,
            "attention": self.attention,
            "block": self.attention | self.mlp,
            "experts": routed,
            "shared": {name: one for name, one in self.mlp.items() if name not in routed} if routed else {},
        }

    def projections(self, scope: str) -> dict[str, Projection]:
        """The projections of a scope; UserError when the block has none."""
        scopes = self.scopes
        check_choice("scope", scope, scopes)
        if not scopes[scope]:
            there = ", ".join(name for name, found in scopes.items() if found) or "no linear maps that are known"
            raise UserError(f"block {self.index} has no weights of scope {scope!r}; it has {there}")
        return scopes[scope]

    def weight_names(self, scope: str) -> list[str]:
        """Full names of the scope's weight matrices (no biases, no norms)."""
        return [weight_name(name, projection) for name, projection in self.projections(scope).items()]


def weight_name(name: str, projection: Projection) -> str:
    """The full name of a projection's weight."""
    if isinstance(projection, Stacked):
        return f"{name.rpartition('.')[0]}.{projection.stored}"
    return f"{name}.weight"


def sizes(projection: Projection) -> tuple[int, int]:
    """(inputs, outputs) of a linear map; GPT-2's Conv1D stores its weight the other way round."""
    if isinstance(projection, Stacked):
        return projection.sizes
    if isinstance(projection, Conv1D):
        return projection.nx, projection.nf
    return projection.in_features, projection.out_features


def as_stored(projection: Projection, matrix_OI: Tensor) -> Tensor:
    """A matrix (O, I) as a linear map stores its weight."""
    if isinstance(projection, Stacked):
        return projection.as_stored(matrix_OI)
    return matrix_OI.T if isinstance(projection, Conv1D) else matrix_OI


def as_matrix(projection: Projection, stored: Tensor) -> Tensor:
    """A weight as a linear map stores it, or its change, as a matrix (O, I)."""
    return projection.as_matrix(stored) if isinstance(projection, Stacked) else as_stored(projection, stored)


def inputs_last(projection: Projection) -> bool:
    """Whether a stored weight's last dimension is what its inputs lie on; else it is the one before."""
    return not (projection.transposed if isinstance(projection, Stacked) else isinstance(projection, Conv1D))


def moment_shape(projection: Projection) -> tuple[int, ...]:
    """The shape of its keys' second moment: (I, I), or (E, I, I) of experts, each of whose keys are apart."""
    if isinstance(projection, Stacked) and projection.across == "inputs":
        return (len(projection.weight), projection.of_each[0], projection.of_each[0])
    return (sizes(projection)[0],) * 2


def second_moment(key_NI: Tensor, shape: Sequence[int]) -> Tensor:
    """Σ k kᵀ of keys, or of each expert's part of them, in such a shape."""
    if len(shape) == 2:
        return key_NI.T @ key_NI
    key_ENI = key_NI.view(len(key_NI), *shape[:2]).transpose(0, 1)
    return key_ENI.mT @ key_ENI


def by_row(vectors: Tensor, rows: int) -> Tensor:
    """What enters or leaves a projection as (rows, T, D): OPT hands its MLP all rows' tokens as one list."""
    return vectors.reshape(rows, -1, vectors.shape[-1])


def check_exist(layers: Iterable[int], blocks: int, name: str, flag: str = "layers") -> None:
    """Raise UserError for a layer that is none of so many blocks of a model of this name."""
    for layer in layers:
        if not 0 <= layer < blocks:
            raise UserError(f"{flag}: {layer} is not a block of {name}; it has 0 to {blocks - 1}")


def find_blocks(model: PreTrainedModel, name: str = "") -> list[Block]:
    """Map every block of a decoder; UserError for one that is not built as this module's docstring says."""
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
        and all(any(isinstance(part, nn.Linear | Conv1D) for part in block.modules()) for block in module)
    ]
    if not lists:
        raise UserError(f"model: {kind}: expected a list of {config.num_hidden_layers} blocks; found none")
    path, modules = lists[0]
    for index, module in enumerate(modules):
        for inner, part in module.named_modules():
            if getattr(part, "is_causal", True) is False:
                ahead = f"its attention looks ahead ({inner}); expected a causal decoder"
                raise UserError(f"model: {kind}, block {index}: {ahead}")
    blocks = [
        _map_block(f"{path}.{index}", index, module, config.hidden_size) for index, module in enumerate(modules)
    ]
    if not any(block.mlp for block in blocks):
        raise UserError(f"model: {kind}, block 0: {_why_none(blocks[0], config.hidden_size)}")
    _check_own(f"model: {kind}", blocks)
    return blocks


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Raise UserError for an encoder-decoder, or quantised weights, as far as a config tells."""
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model: {name} is an encoder-decoder ({type(config).__name__}); expected a decoder alone")
    method = quantised_by(config)
    if method and method not in READ_PLAIN:
        raise UserError(
            f"model: {name} keeps its weights quantised ({method}), which an edit cannot change exactly; expected "
            f"plain weights ({', '.join(READ_PLAIN)} and GGUF files are dequantised as they are read)"
        )


def quantised_by(config: PreTrainedConfig) -> str | None:
    """How a checkpoint's weights are quantised, by its config; None: they are not."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return None
    method = getattr(quantization, "quant_method", None) or dict(quantization).get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def _map_block(name: str, index: int, block: nn.Module, hidden: int) -> Block:
    maps = {inner: one for inner, one in block.named_modules() if isinstance(one, nn.Linear | Conv1D)}
    attention: dict[str, Projection] = {
        f"{name}.{inner}": one for inner, one in maps.items() if _is_attention(inner)
    }
    lists = [inner for inner, one in block.named_modules() if isinstance(one, nn.ModuleList) and len(one) > 1]
    groups: dict[str, dict[str, Projection]] = defaultdict(dict)
    for inner, one in maps.items():
        if not _is_attention(inner) and not any(inner.startswith(f"{several}.") for several in lists):
            groups[inner.rpartition(".")[0]][f"{name}.{inner}"] = one
    experts = {inner: module for inner, module in block.named_modules() if is_standard(module)}
    found = (
        _as_mlp(group, hidden)
        for parent, group in groups.items()
        if not any(isinstance(child, nn.Conv1d) for child in block.get_submodule(parent).children())  # mixes tokens
        and not any(not parent or inner.startswith(f"{parent}.") for inner in experts)  # leads into them
    )
    mlp = max(found, key=lambda one: sizes([*one.values()][-1])[0] if one else 0, default={})
    for inner, module in experts.items():
        mlp = mlp | {f"{name}.{inner}.{part}": stacked for part, stacked in as_maps(module).items()}
    return Block(index, name, block, mlp, attention)


def _why_none(block: Block, hidden: int) -> str:
    """Why a block has no MLP that can be edited."""
    named = [*block.module.named_modules()]
    stacks = [inner for inner, one in named if isinstance(one, nn.ModuleList) and len(one) > 1]
    stacks += [inner for inner, one in block.module.named_parameters() if one.dim() == 3 and "experts" in inner]
    if stacks:
        return f"a mixture of experts that are not run as the library runs them ({stacks[0]})"
    maps = [
        f"{inner} {sizes(one)[0]}→{sizes(one)[1]}"
        for inner, one in named
        if isinstance(one, nn.Linear | Conv1D) and f"{block.name}.{inner}" not in block.attention
    ]
    found = ", ".join(maps) or "no linear map beside attention"
    return f"expected an MLP of one or two linear maps up from {hidden} and one down to it; found {found}"


def _as_mlp(group: dict[str, Projection], hidden: int) -> dict[str, Projection]:
    """Linear maps side by side as an MLP, its down-projection last; empty where they are none."""
    down = [key for key, one in group.items() if sizes(one)[1] == hidden and sizes(one)[0] != hidden]
    if all(sizes(one) == (hidden, hidden) for one in group.values()):  # only their names tell
        down = [key for key in group if key.rpartition(".")[2].startswith(DOWN)]
    ups = [key for key in group if key not in down]
    fits = (
        len(down) == 1
        and len(ups) in (1, 2)
        and all(sizes(group[key])[0] == hidden for key in ups)
        and sum(sizes(group[key])[1] for key in ups) % sizes(group[down[0]])[0] == 0
    )
    return {key: group[key] for key in [*ups, *down]} if fits else {}


def _is_attention(inner: str) -> bool:
    return any("att" in part for part in inner.lower().split("."))


def _check_own(where: str, blocks: Sequence[Block]) -> None:
    """Raise UserError for blocks that share a weight: an edit of one of them would change the other."""
    owners: dict[Tensor, Block] = {}  # by identity
    for block in blocks:
        for name, projection in (block.attention | block.mlp).items():
            owner = owners.setdefault(projection.weight, block)
            if owner is not block:
                inner = weight_name(name, projection).removeprefix(f"{block.name}.")
                both = f"blocks {owner.index} and {block.index}"
                raise UserError(f"{where}: {both} share a weight ({inner}); expected weights of each block's own")

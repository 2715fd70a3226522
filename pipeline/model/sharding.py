"""A model whose blocks' weights are spread over the devices (FSDP2), and reading and writing of such weights.

Each device keeps a slice of every weight of the blocks; a block's weights are gathered when it runs, and let go
after it. Embeddings, head and the norm behind the last block are whole on every device: a few percent of a large
model, and they are read apart from any block. One process loads the model; the others get their slices from it,
weight by weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import UserError
from pipeline.model.blocks import find_blocks
from pipeline.model.processes import from_first, world_size


def load_sharded(load: Callable[[], PreTrainedModel], device: torch.device, name: str) -> PreTrainedModel:
    """The model that `load` gives in the first process, its blocks' weights spread over all.

    Args:
        load: called in the first process only; the model is on the CPU.
        device: this process's.
        name: of the model, for messages.

    Raises:
        UserError: what `load` raised, in every process.
    """
    whole_model, failed = None, None
    if distributed.get_rank() == 0:
        try:
            whole_model = load()
        except UserError as error:
            failed = str(error)
    if failed := from_first(failed):
        raise UserError(failed)
    described = from_first(_described(whole_model) if whole_model is not None else None)
    model = _empty(*described)
    mesh = init_device_mesh(device.type, (world_size(),))
    _spread(model, mesh, name)
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        source: dict[str, Tensor] = dict(_tensors(whole_model)) if whole_model is not None else {}
        for key, tensor in _tensors(model):
            _receive(tensor, source.pop(key, None), device)
    return model.eval()


def _described(model: PreTrainedModel) -> tuple[Any, ...]:
    """All that makes an empty model like this one: its configs, and the dtype of each weight."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    return model.config, model.generation_config, model.dtype, model.config._attn_implementation, dtypes


def _empty(config: Any, generation: Any, dtype: torch.dtype, attention: str, dtypes: dict[str, torch.dtype]) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    model.generation_config = generation
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return model


def _spread(model: PreTrainedModel, mesh: DeviceMesh, name: str) -> None:
    blocks = [model.get_submodule(block.name) for block in find_blocks(model, name)]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()) - in_blocks)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight and buffer, each once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _receive(tensor: Tensor, source: Tensor | None, device: torch.device) -> None:
    """Fill this process's part of a tensor from the first process's whole one."""
    whole_one = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if source is None
        else source.detach().to(device=device, dtype=tensor.dtype).contiguous()
    )
    if isinstance(tensor, DTensor):
        tensor.copy_(distribute_tensor(whole_one, tensor.device_mesh, tensor.placements))
    else:
        distributed.broadcast(whole_one, 0)
        tensor.copy_(whole_one)


def is_sharded(model: nn.Module) -> bool:
    """Whether weights are spread over devices."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A weight, or its gradient, with all its slices; all processes must ask for it."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def sampled(tensor: Tensor, most: int) -> Tensor:
    """Up to `most` evenly spaced values of a weight, in the order of its rows; all processes must ask for it."""
    step = max(1, tensor.numel() // most)
    if not isinstance(tensor, DTensor):
        return tensor.detach().reshape(-1)[::step][:most]
    local = tensor.to_local().detach()
    row = tensor.numel() // len(tensor)  # values in a row; slices are of whole rows
    first = -(-len(tensor) // tensor.device_mesh.size()) * tensor.device_mesh.get_local_rank()  # this slice's first
    places = torch.arange(0, tensor.numel(), step, device=local.device)[:most] - first * row
    own = (places >= 0) & (places < local.numel())
    values = local.new_zeros(len(places))
    values[own] = local.reshape(-1)[places[own]]
    distributed.all_reduce(values)
    return values


def as_spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, spread as `like` is; nothing is sent."""
    tensor = tensor.detach().to(like.device)
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def on_mesh_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, fit to be multiplied with `like`."""
    return DTensor.from_local(tensor, like.device_mesh, [Replicate()]) if isinstance(like, DTensor) else tensor


@torch.no_grad()
def put(weight: Tensor, tensor: Tensor) -> None:
    """Replace a weight's values, by those that every process has whole (or as the weight itself is spread)."""
    weight.copy_(as_spread(tensor.to(weight.dtype), weight))


@torch.no_grad()
def add(weight: Tensor, change: Tensor) -> None:
    """Add to a weight what every process has whole."""
    weight += as_spread(change.to(weight.dtype), weight)


def anywhere(model: nn.Module, here: bool) -> bool:
    """Whether something holds in any of the processes that keep step for the model's sake; all must ask."""
    if not is_sharded(model):
        return here
    found = torch.tensor(here, dtype=torch.int64, device=next(model.parameters()).device)
    distributed.all_reduce(found)
    return bool(found.item())


class KeepStep(Callback):
    """Lets every process run as many passes of a spread model as it likes: those that are done help the others.

    A pass gathers each block's weights from all processes, so all must take part in each. Before a pass, a process
    says that it runs one; behind its last batch it runs idle ones while others still say so. Passes with a backward
    pass are to be dealt out evenly beforehand: an idle one has none.
    """

    def __init__(self) -> None:
        self._open = ExitStack()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_sharded(pl_module):
            handle = _decoder(pl_module).register_forward_pre_hook(lambda *_: (_running(pl_module, 1), None)[1])
            self._open.callback(handle.remove)

    @torch.no_grad()
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open.close()
        if not is_sharded(pl_module):
            return
        token = torch.zeros(1, 1, dtype=torch.int64, device=pl_module.device)
        while _running(pl_module, 0):
            _decoder(pl_module)(input_ids=token, use_cache=False)

    def on_exception(self, *_: Any) -> None:
        self._open.close()


def _decoder(module: LightningModule) -> nn.Module:
    """The model that a stage's module wraps."""
    decoder = module.model
    assert isinstance(decoder, nn.Module)
    return decoder


def _running(module: LightningModule, passes: int) -> int:
    """How many processes run a pass now."""
    total = torch.tensor(passes, device=module.device)
    distributed.all_reduce(total)
    return int(total.item())

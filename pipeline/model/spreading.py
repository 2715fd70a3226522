"""Loading a model whose blocks' weights are spread over the devices (FSDP2).

Each device keeps a slice of every weight of the blocks; a block's weights are gathered when it runs, and let go
after it. Embeddings, head and the norm behind the last block are whole on every device: a few percent of a large
model, and they are read apart from any block. One process loads the model; the others get their slices from it,
weight by weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.model.blocks import find_blocks
from pipeline.running.processes import from_first, world_size


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight and buffer, each once."""
    return chain(model.named_parameters(), model.named_buffers())


def load_sharded(load: Callable[[], PreTrainedModel], device: torch.device, name: str) -> PreTrainedModel:
    """The model that `load` gives, or its UserError, in the first process, its blocks spread over all devices."""
    whole_model, failed = None, None
    if distributed.get_rank() == 0:
        try:
            whole_model = load()
        except UserError as error:
            failed = str(error)
    if failed := from_first(failed):
        raise UserError(failed)
    model: PreTrainedModel = from_first(whole_model and without_values(whole_model))
    mesh = init_device_mesh(device.type, (world_size(),))
    _spread(model, mesh, name)
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        source = dict(_tensors(whole_model)) if whole_model else {}
        for key, tensor in _tensors(model):
            _receive(tensor, source.pop(key, None), device)
    return model.eval()


def without_values(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with tensors that hold nothing."""
    weights = {id(weight): nn.Parameter(weight.to("meta")) for weight in model.parameters()}
    buffers = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return deepcopy(model, {**weights, **buffers})


def _spread(model: PreTrainedModel, mesh: DeviceMesh, name: str) -> None:
    blocks = [model.get_submodule(block.name) for block in find_blocks(model, name)]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()) - in_blocks)


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

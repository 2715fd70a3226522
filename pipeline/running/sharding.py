"""Reading and writing of weights that are spread over the devices (FSDP2), and keeping step while they are.

How a model is spread: `pipeline.model.spreading`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


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
    return bool(_total(int(here), next(model.parameters()).device)) if is_sharded(model) else here


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
            model: Any = pl_module.model
            self._open.enter_context(
                model.register_forward_pre_hook(lambda *_: (_total(1, pl_module.device), None)[1])
            )

    @torch.no_grad()
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open.close()
        if not is_sharded(pl_module):
            return
        model: Any = pl_module.model
        token = torch.zeros(1, 1, dtype=torch.int64, device=pl_module.device)
        while _total(0, pl_module.device):
            model(input_ids=token, use_cache=False)

    def on_exception(self, *_: Any) -> None:
        self._open.close()


def _total(number: int, device: torch.device) -> int:
    """The sum of all processes' numbers; all must ask."""
    total = torch.tensor(number, device=device)
    distributed.all_reduce(total)
    return int(total.item())

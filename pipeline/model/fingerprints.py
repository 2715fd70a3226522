"""What tells a model from any other: the fingerprint of all of it, and a sample that is quickly taken."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from pipeline.errors import UserError
from pipeline.files import digest
from pipeline.running.sharding import sampled, whole

PART = 1 << 24  # values that are hashed at once
SAMPLES = 1024  # values of each weight in a sample
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a value
NO_COMPUTATION = {  # what a config may say without changing what its model computes
    *("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "initializer_range"),
    *("id2label", "label2id", "problem_type", "quantization_config", "_attn_implementation", "_model_name_or_path"),
}


def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits from all tensors, as float32, and what changes the computation in the config.

    Checkpoints are fingerprinted as they are on disk, before any cast (see `load_model`).
    """
    return joined(getattr(model, "config", None), tensors_digest(model))


def check_made_for(what: str, made: tuple[str, str], name: str, own: str) -> None:
    """Raise UserError when something was made for another model, by name and fingerprint, than this one."""
    if made[1] != own:
        raise UserError(f"{what}: made for model {made[0]!r} ({made[1]}), not for {name!r} ({own})")


def joined(config: Any, tensors: str) -> str:
    """The fingerprint of a config and all tensors, known by their digest."""
    return hashlib.sha256(f"{config_digest(config)} {tensors}".encode()).hexdigest()[:32]


def config_digest(config: Any) -> str:
    """A digest of what changes the computation in a config."""
    return digest(_computing(config.to_dict() if isinstance(config, PreTrainedConfig) else config))


def _computing(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((str(name), _computing(inner)) for name, inner in value.items() if name not in NO_COMPUTATION)
    return [_computing(inner) for inner in value] if isinstance(value, list | tuple) else repr(value)


@torch.no_grad()
def tensors_digest(model: nn.Module) -> str:
    """SHA-256 of all weights and stored buffers: names, shapes, values as float32; all processes must ask"""
    found = hashlib.sha256()
    stored = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    for name, tensor in sorted({**dict(model.named_parameters()), **buffers}.items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        for part in whole(tensor).reshape(-1).split(PART):
            found.update(part.float().cpu().numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def sample(model: nn.Module) -> str:
    """16 hexadecimal digits that tell whether weights are what they were, in the time of reading them once.

    They are of 1,024 evenly spaced values of each weight, and of the sum of all its values' bits.
    """
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(f"{name} {tuple(parameter.shape)} {_bits(parameter)}".encode())
        found.update(sampled(parameter, SAMPLES).float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def _bits(tensor: Tensor) -> int:
    """The sum of all values, taken for whole numbers."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    total = local.detach().view(BITS[local.element_size()]).sum(dtype=torch.int64)
    if isinstance(tensor, DTensor):
        distributed.all_reduce(total)
    return int(total.item())

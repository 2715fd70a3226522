"""Export: the edited model as a plain Hugging Face folder, or the change as a PEFT adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from pipeline.editing.update import WeightUpdate, write_adapter
from pipeline.errors import UserError
from pipeline.files import require_room
from pipeline.model.blocks import Projection, as_stored
from pipeline.model.llm import LLM

KEPT = 1e-5  # relative: singular values below this are rounding


def export_merged(llm: LLM, update: WeightUpdate, folder: Path) -> None:
    """Write config, safetensors and tokenizer of the edited model into `folder`.

    Raises:
        UserError: when the disk has no room, or the update was made for another model.

    Example:
        >>> options = EditOptions(method="lora", expert={"rank": 2, "epochs": 4, "whiten": 0.0})
        >>> export_merged(llm, edit(llm, requests, profile, options), folder)
        >>> edited = load_model(str(folder))
        >>> edited.fingerprint == llm.fingerprint
        False
    """
    require_room(folder, sum(parameter.nbytes for parameter in llm.model.parameters()))
    partial = folder / ".partial"
    try:
        with update.applied(llm):
            llm.model.save_pretrained(partial)
        llm.tokenizer.save_pretrained(partial)
        for file in sorted(partial.iterdir()):
            file.chmod(0o644)  # safetensors files come readable by their owner only
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export_adapter(llm: LLM, update: WeightUpdate, folder: Path) -> None:
    """Write an update as a LoRA adapter in PEFT's layout: its own where it is one, else one that comes to the same.

    Any change of a weight is a product of two factors; its singular values say how many columns they need.

    Raises:
        UserError: when nothing is changed, or the update was made for another model.
    """
    update.check_fits(llm)
    if update.adapter:
        update.save_adapter(folder)
        return
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for weight, tensor in update.tensors.items():
        name = weight.removesuffix(".weight")
        down_RI, up_OR = _factors(llm, name, tensor)
        if rank := len(down_RI):
            ranks[name] = rank
            tensors |= {f"base_model.model.{name}.lora_A.weight": down_RI}
            tensors |= {f"base_model.model.{name}.lora_B.weight": up_OR}
    if not ranks:
        raise UserError("export: the update changes nothing that an adapter could hold")
    config = {
        "task_type": "CAUSAL_LM",
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": list(ranks),
        "fan_in_fan_out": any(isinstance(llm.model.get_submodule(name), Conv1D) for name in ranks),
    }
    write_adapter(folder, tensors, config, update.model)


@torch.no_grad()
def _factors(llm: LLM, name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) whose product is the change of a weight, R being no more than it needs."""
    projection: Projection = llm.model.get_submodule(name)  # type: ignore[assignment]
    change_OI = as_stored(projection, tensor.double() - projection.weight.cpu().double())
    left_OR, values_R, right_RI = torch.linalg.svd(change_OI, full_matrices=False)
    rank = int((values_R > KEPT * values_R.max()).sum())
    root_R = values_R[:rank].sqrt()
    return (root_R[:, None] * right_RI[:rank]).float(), (left_OR[:, :rank] * root_R).float()

"""Export: the edited model as a plain Hugging Face folder, or the change as a PEFT adapter."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from pipeline.editing.statistics import KeyMoments
from pipeline.editing.update import WeightUpdate, write_adapter
from pipeline.errors import UserError, note
from pipeline.files import require_room
from pipeline.model.blocks import as_matrix
from pipeline.model.experts import Stacked
from pipeline.model.llm import LLM
from pipeline.running.stage import run
from pipeline.running.trainer import Runtime

KEPT = 1e-5  # relative: singular values below this are rounding
MOST_ASKED = 1000  # facts whose keys say what of a change matters
READ_TOGETHER = 8  # of them


def export_merged(llm: LLM, update: WeightUpdate, folder: str | Path) -> None:
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
    folder = Path(folder)
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


class AdapterInfo(NamedTuple):
    """How much of a change an adapter holds."""

    rank: int
    """Of every pair of its factors."""
    full_rank: int
    """The rank that holds all of the change."""
    lost: float
    """Share of the change's norm that is not in it, from 0 to 1."""


def export_adapter(llm: LLM, update: WeightUpdate, folder: Path, rank: int | None = None) -> AdapterInfo:
    """Write an update as a LoRA adapter in PEFT's layout: its own where it is one, else one that comes to the same.

    Any change ΔW (O, I) of a weight is a product of two factors. All pairs have one rank, filled up with zeros, and
    alpha = r: some servers know no other adapters. A lower rank keeps what matters most for the facts: it minimises
    ‖(ΔW − BA) C^(1/2)‖, C being the second moment of what the update's own requests, with their new answers, send
    into the weight. What is lost is told.

    Args:
        rank: the most columns of a factor; None: as many as the change needs.

    Raises:
        UserError: when the update holds no weights, or was made for another model.
    """
    update.check_fits(llm)
    own = update.adapter_rank
    if update.adapter and own <= (rank or own):
        update.save_adapter(folder)
        return AdapterInfo(own, own, 0.0)
    changes = dict(_change(llm, weight, new) for weight, new in update.tensors.items())
    if not changes:
        raise UserError("export: the update changes nothing that an adapter could hold")
    found, moments = {name: _split(change) for name, change in changes.items()}, dict[str, Tensor]()
    if rank and any(part.full_rank > rank for part in found.values()):
        moments = _moments(llm, update, [*changes]) if update.requests else {}
        found = {name: _split(change, rank, moments.get(name)) for name, change in changes.items()}
    parts = {name: part for name, part in found.items() if part.whole} or dict([*found.items()][:1])
    info = _info([*parts.values()])
    _write_parts(llm, parts, info.rank, folder, update.model)
    if info.rank < info.full_rank:
        norm = "by what its facts send in" if moments else "in the plain norm, as it holds no facts"
        note(f"adapter: rank {info.rank} of {info.full_rank} loses {info.lost:.2%} of the change, {norm}")
    return info


class _Part(NamedTuple):
    """One weight's change as the product of two factors, and squared norms: of all of it, and of what they lack."""

    down_RI: Tensor
    up_OR: Tensor
    full_rank: int
    whole: float
    lost: float


def _info(parts: Sequence[_Part]) -> AdapterInfo:
    lost = (sum(part.lost for part in parts) / (sum(part.whole for part in parts) or 1)) ** 0.5
    return AdapterInfo(max(len(part.down_RI) for part in parts), max(part.full_rank for part in parts), lost)


def _moments(llm: LLM, update: WeightUpdate, names: Sequence[str]) -> dict[str, Tensor]:
    """The second moment (I, I) of what enters projections where an update's facts are asked, or a part of many."""
    stage = KeyMoments(llm, names)
    every = -(-len(update.requests) // MOST_ASKED)
    with llm.frozen():
        run(stage, llm.tokens.answered(update.requests[::every]), Runtime(), batch_size=READ_TOGETHER)
    return stage.moments()


@torch.no_grad()
def _change(llm: LLM, weight: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The change (O, I) that an update makes of a projection, by its name; UserError for one of experts."""
    name, projection = llm.reading(weight)
    if isinstance(projection, Stacked):
        raise UserError(
            f"export: {weight} is of experts, whose change no adapter of one rank holds; export it merged"
        )
    return name, as_matrix(projection, tensor.double() - projection.weight.cpu().double())


def _split(change_OI: Tensor, rank: int | None = None, moment_II: Tensor | None = None) -> _Part:
    """The factors, of this rank at most, whose product is nearest to a change where its inputs have a moment C.

    With ΔW = U G, U's columns being orthonormal, they are U E and Eᵀ G for the first eigenvectors E of G C Gᵀ.
    """
    up_OR, values_R, right_RI = torch.linalg.svd(change_OI, full_matrices=False)
    full_rank = max(1, int((values_R > KEPT * values_R.max()).sum()))  # where nothing is changed, a column of zeros
    up_OR, down_RI = up_OR[:, :full_rank], values_R[:full_rank, None] * right_RI[:full_rank]
    weighted_RI = down_RI if moment_II is None else down_RI @ moment_II.cpu().double()
    energies_R, vectors_RR = torch.linalg.eigh(weighted_RI @ down_RI.T)
    left_out = max(full_rank - rank, 0) if rank else 0
    if left_out:
        up_OR, down_RI = up_OR @ vectors_RR[:, left_out:], vectors_RR[:, left_out:].T @ down_RI
    root_R = down_RI.norm(dim=1).sqrt().clamp(min=1e-30)
    energies_R.clamp_(min=0)
    whole, lost = energies_R.sum().item(), energies_R[:left_out].sum().item()
    return _Part((down_RI / root_R[:, None]).float(), (up_OR * root_R).float(), full_rank, whole, lost)


def _write_parts(llm: LLM, parts: dict[str, _Part], rank: int, folder: Path, model: str) -> None:
    """Write factors, filled up with zeros to one rank, as an adapter."""
    tensors = {}
    for name, part in parts.items():
        lacking = rank - len(part.down_RI)
        tensors[f"base_model.model.{name}.lora_A.weight"] = pad(part.down_RI, (0, 0, 0, lacking))
        tensors[f"base_model.model.{name}.lora_B.weight"] = pad(part.up_OR, (0, lacking))
    config = {
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(parts),
        "fan_in_fan_out": any(isinstance(llm.model.get_submodule(name), Conv1D) for name in parts),
    }
    write_adapter(folder, tensors, config, model)

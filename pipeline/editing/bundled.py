"""What comes with the project for the bundled model: text that it wrote itself, and key statistics of that text.

Statistics are those that an edit at its golden layer asks for by default. Of a second moment C = D L Lᵀ D the scale
D of each input is kept, and L, the Cholesky factor of what is left, in half precision: what comes back is positive,
and the file is small. `python -m benchmarks.bundled` makes it anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import note

FILE = Path(__file__).with_name("smollm2.safetensors")
RIDGE = 1e-6  # of an input's second moment, so that a factor exists


def _is_whole() -> bool:
    """Whether the file is there and can be read; else the user is told."""
    try:
        with safe_open(FILE, "pt"):
            return True
    except (OSError, SafetensorError) as error:
        note(f"{FILE}: cannot be read ({error}); what it brings is made anew")
        return False


def bundled_text(fingerprint: str, tokens: int) -> list[str] | None:
    """Texts of so many tokens at least that the model of this fingerprint wrote; None where there are none."""
    if not _is_whole():
        return None
    with safe_open(FILE, "pt") as opened:
        about = opened.metadata()
    there = about["model"] == fingerprint and tokens <= int(about["tokens"])
    return list(json.loads(about["texts"])) if there else None


def bundled_moment(key: str) -> Tensor | None:
    """The second moment (I, I), float32, that is kept under a key; None where there is none."""
    if not _is_whole():
        return None
    with safe_open(FILE, "pt") as opened:
        if key not in opened.keys():  # noqa: SIM118
            return None
        scale_I, packed = opened.get_tensor(f"{key}.scale"), opened.get_tensor(key)
    factor_II = scale_I.new_zeros(len(scale_I), len(scale_I))
    factor_II[_below(len(scale_I))] = packed.float()
    factor_II *= scale_I[:, None]
    moment_II = factor_II @ factor_II.mT
    return (moment_II + moment_II.mT) / 2


def write_bundled(
    file: Path, fingerprint: str, tokens: int, texts: Sequence[str], moments: Mapping[str, Tensor]
) -> None:
    """Keep texts of a model, which come to so many tokens, and second moments by their keys."""
    tensors = {"none": torch.zeros(0)}
    for key, moment_II in moments.items():
        scale_I = moment_II.diagonal().double().clamp(min=1e-12).sqrt()
        alike_II = moment_II / scale_I / scale_I[:, None]
        alike_II.diagonal().add_(RIDGE)
        packed = torch.linalg.cholesky(alike_II)[_below(len(scale_I))]
        tensors |= {key: packed.half(), f"{key}.scale": scale_I.float()}
    save_file(tensors, file, {"model": fingerprint, "tokens": str(tokens), "texts": json.dumps([*texts])})


def _below(size: int) -> tuple[Tensor, Tensor]:
    """The places on and below the diagonal of a matrix."""
    rows, columns = torch.tril_indices(size, size)
    return rows, columns

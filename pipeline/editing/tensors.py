"""Tensors on disk: written whole or not at all, and read with distrust."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as tensors_of_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import write_whole

ABOUT = "about"


def write_tensors(path: Path, tensors: dict[str, Tensor], about: str = "") -> str:
    """Write tensors, and maybe a text beside them, whole or not at all; the file's SHA-256."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = tensors_to_bytes(own, {ABOUT: about} if about else None)
    write_whole(path, lambda partial: partial.write_bytes(content))
    return hashlib.sha256(content).hexdigest()


def read_tensors(file: Path, sha256: str) -> tuple[dict[str, Tensor], str]:
    """A file's tensors and text, of the bytes that are checked; UserError when missing, damaged or not finite."""
    if not file.is_file():  # a pipe would be waited for
        raise UserError(f"update: {file}: missing")
    try:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"update: {file}: changed since it was written (SHA-256 differs)")
        tensors = tensors_of_bytes(content)
        head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # as safetensors lays it out
    except (SafetensorError, KeyError, MemoryError, RuntimeError) as error:
        raise UserError(f"update: {file}: damaged: {type(error).__name__}: {error}") from None
    for name, tensor in tensors.items():
        if tensor.is_complex() or not tensor.isfinite().all():
            raise UserError(f"update: {file}: {name!r} holds values that are no finite numbers")
    return tensors, head.get("__metadata__", {}).get(ABOUT, "")

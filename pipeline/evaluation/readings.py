"""What a model says to everything that it is measured on: small, whole in every process, and kept for the base."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from pipeline.files import write_shared

VERSION = 1  # of what is kept: figures of another version are found anew
MOST_KEPT = 64  # files; the ones not used for longest go

Item = tuple[str, int, Any]  # a field of Readings, a number, and what was read


@dataclass
class Readings:
    """By the number of a scored text or of a question.

    Attributes:
        choices: the model's first choices at the text's scored tokens.
        losses: mean −log p of them, in nats.
        divergences: mean KL of next-token distributions to the base's.
        hidden: for the base: what its head read where distributions are compared, (M, D).
        said: what the model says to a question.
    """

    choices: dict[int, list[int]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    divergences: dict[int, float] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    said: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, items: Iterable[Item]) -> Readings:
        """From the items of all processes."""
        readings = cls()
        for name, number, value in items:
            getattr(readings, name)[number] = value
        return readings

    @rank_zero_only
    def keep(self, file: Path) -> None:
        """Write to a file, whole or not at all; of many such files in its folder the oldest go."""
        texts = sorted(self.choices)
        arrays: dict[str, Any] = {
            "texts": np.array(texts),
            "choices": np.array([choice for text in texts for choice in self.choices[text]]),
            "counts": np.array([len(self.choices[text]) for text in texts]),
            "losses": np.array([self.losses[text] for text in texts], dtype=np.float64),
            "compared": np.array([[text, len(hidden)] for text, hidden in self.hidden.items()]).reshape(-1, 2),
            "hidden": torch.cat(list(self.hidden.values()) or [torch.empty(0)]).numpy(),
            "said": np.frombuffer(json.dumps(self.said).encode(), dtype=np.uint8),
        }

        def write(partial: Path) -> None:
            with partial.open("wb") as opened:
                np.savez(opened, **arrays)

        write_shared(file, write)
        others = sorted(file.parent.glob("base-*.npz"), key=_age)
        for old in others[:-MOST_KEPT]:
            old.unlink(missing_ok=True)

    @classmethod
    def kept(cls, file: Path) -> Readings | None:
        """What a file holds; None where there is none, or it is damaged: the archive's checksums tell."""
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            with suppress(OSError):
                file.touch()
            texts, counts = arrays["texts"].tolist(), arrays["counts"]
            choices = np.split(arrays["choices"], counts.cumsum()[:-1]) if texts else []
            compared, sizes = arrays["compared"].T
            hidden = torch.from_numpy(arrays["hidden"]).split(sizes.tolist()) if len(compared) else ()
            return cls(
                choices={text: row.tolist() for text, row in zip(texts, choices, strict=True)},
                losses=dict(zip(texts, arrays["losses"].tolist(), strict=True)),
                hidden=dict(zip(compared.tolist(), hidden, strict=True)),
                said={int(number): text for number, text in json.loads(arrays["said"].tobytes()).items()},
            )
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, TypeError, struct.error, BadZipFile):
            return None


def kept_file(folder: Path, *content: object) -> Path:
    """The file of a base model's readings; its name stands for everything that they depend on."""
    return folder / f"base-{hashlib.sha256(repr((VERSION, *content)).encode()).hexdigest()[:24]}.npz"


def _age(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # another process has removed it
        return 0.0

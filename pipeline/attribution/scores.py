"""Scores request by request, kept beside the profile that comes of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.attribution.selector import Values
from pipeline.errors import UserError
from pipeline.files import write_whole
from pipeline.shipped import program

SCORES_FILE = "scores.safetensors"


@dataclass(frozen=True)
class Scores:
    """What a selector found.

    Attributes:
        method: the selector's name.
        ids: the requests' ids.
        values: each request's score of every block, (N, L), float64.
        seconds: how long that took.
        model, fingerprint, chat: of what model, and whether prompts were put into its chat template.
    """

    method: str
    ids: list[str]
    values: Values
    seconds: float = 0.0
    model: str = ""
    fingerprint: str = ""
    chat: bool = False

    def save(self, folder: Path) -> Path:
        """Write `scores.safetensors` into a folder, whole or not at all: tensor `scores`, ids as metadata."""
        about = {"about": json.dumps({"method": self.method, "ids": self.ids})}
        tensors = {"scores": np.ascontiguousarray(self.values)}
        return write_whole(folder / SCORES_FILE, lambda partial: save_file(tensors, partial, about))

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read scores from their file, or from the folder that holds it.

        Raises:
            UserError: when there is none, or it is damaged.
        """
        path = Path(path)
        path = path / SCORES_FILE if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"scores: {path}: no such file; `{program()} attribute` makes one")
        try:
            with safe_open(path, "numpy") as opened:
                about = json.loads(opened.metadata()["about"])
                return cls(about["method"], about["ids"], opened.get_tensor("scores"))
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError):
            raise UserError(f"scores: {path}: damaged, or no scores of requests") from None

"""What attribution leaves: scores request by request, and the golden profile, which says which layer to edit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.numpy import save_file

from pipeline.attribution.selection import Stability
from pipeline.attribution.selector import Values
from pipeline.errors import UserError, one_line
from pipeline.files import read_text_file, write_text, write_whole
from pipeline.shipped import program

PROFILE_FILE, SCORES_FILE = "golden_profile.json", "scores.safetensors"


@dataclass(frozen=True)
class Scores:
    """What the selector `method` found in so many seconds: requests' scores of every block, (N, L), float64.

    They are of a model that is known by its fingerprint, with prompts in its chat template or not.
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


class GoldenProfile(BaseModel):
    """Found once for a model, used by every later edit of it.

    Attributes:
        model, fingerprint: the model it holds for.
        method, scope: how blocks were scored, and whose weights (empty for a method that looks at none).
        order: whether blocks rank by score (signed) or by absolute score (magnitude).
        scores: one a block: the mean over requests.
        fences: lower and upper fence; None: off.
        excluded: blocks outside the fences.
        ranking: the other blocks, best first.
        raw_ranking: all blocks by score.
        golden_layers: the first of the ranking: where to edit.
        request_set: where the proxy requests come from.
        requests: how many they were.
        seconds: how long it took.
        chat: whether prompts were put into the tokenizer's chat template.
        stability: what resampling the requests does to scores and choice; None: it does not depend on them, or the
            profile is of an earlier version.

    Example:
        >>> file = profile.save(folder)
        >>> GoldenProfile.load(file) == profile
        True
    """

    model_config = ConfigDict(frozen=True)

    model: str
    fingerprint: str
    method: str
    scope: str
    order: str = "signed"
    scores: list[float]
    fences: tuple[float, float] | None
    excluded: list[int]
    ranking: list[int]
    raw_ranking: list[int]
    golden_layers: list[int] = Field(min_length=1)
    request_set: str
    requests: int
    seconds: float
    chat: bool = False
    stability: Stability | None = None

    @model_validator(mode="after")
    def _of_one_model(self) -> Self:
        """See that all of it is about as many blocks as have scores."""
        blocks = len(self.scores)
        named = {*self.excluded, *self.ranking, *self.raw_ranking, *self.golden_layers}
        if outside := sorted(block for block in named if not 0 <= block < blocks):
            raise ValueError(f"block {outside[0]} has no score; those of 0 to {blocks - 1} are there")
        sides = (self.stability.low, self.stability.high, self.stability.chosen) if self.stability else ()
        if any(len(side) != blocks for side in sides):
            raise ValueError(f"stability is not of {blocks} blocks, which have scores")
        return self

    @property
    def certainty(self) -> str:
        """How sure the choice is, in a phrase; empty where that is not known."""
        if self.stability is None:
            return ""
        golden = self.golden_layers[0]
        return f"block {golden}, chosen in {self.stability.chosen[golden]:.0%} of resamples"

    @property
    def other_choice(self) -> tuple[str, int] | None:
        """The order that was not asked for and the block that it puts first; None where that is the same block."""
        if not self.scope:
            return None
        other, size = ("signed", float) if self.order == "magnitude" else ("magnitude", abs)
        first = max(sorted(self.ranking), key=lambda block: size(self.scores[block]))
        return (other, first) if first != self.ranking[0] else None

    def save(self, folder: Path) -> Path:
        """Write `golden_profile.json` into a folder, whole or not at all."""
        return write_text(folder / PROFILE_FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> GoldenProfile:
        """Read a profile from its file, or from the folder that holds it.

        Raises:
            UserError: when there is none, or it is no profile.
        """
        path = Path(path)
        path = path / PROFILE_FILE if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"profile: {path}: no such file; `{program()} attribute` makes one")
        try:
            return cls.model_validate_json(read_text_file(path))
        except ValueError as error:
            raise UserError(f"profile: {path}: no golden profile: {one_line(error)}") from None

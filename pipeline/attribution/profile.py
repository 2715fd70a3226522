"""What attribution leaves: scores request by request, and the golden profile, which says which layer to edit.

From the one to the other lead Tukey's fences and the ranking (arXiv 2602.20207, appendix A).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator
from safetensors.numpy import save_file

from pipeline.attribution.selector import Values
from pipeline.errors import UserError, one_line
from pipeline.files import read_text_file, write_text, write_whole
from pipeline.shipped import program

PROFILE_FILE, SCORES_FILE = "golden_profile.json", "scores.safetensors"
RESAMPLES = 1000
STEADY, LIKELY = 0.9, 0.5  # shares of resamples that name the golden layer
ALIKE = 0.01  # of the score: blocks that lie so near to each other edit alike
ENOUGH = 16  # requests, with fewer of which no block of a race counts as beaten


class Selection(NamedTuple):
    """What the fences and the ranking make of the scores."""

    fences: tuple[float, float] | None  # the lower and the upper one; None: off
    excluded: list[int]  # blocks whose score lies outside, in order of depth
    ranking: list[int]  # the other blocks, best first; ties go to the shallower
    raw_ranking: list[int]  # all blocks, best first


def select(
    scores: Sequence[float] | NDArray[np.float64], fences: float = 1.0, order: str = "magnitude"
) -> Selection:
    """Rank blocks, setting aside those outside [Q1 − f·IQR, Q3 + f·IQR], and those that score nought.

    The sign is the same for nearly all blocks, and says how well the model knows the old answers: well enough, and
    it turns negative, so that the paper's signed order would put the block of least reach first. Ranking by
    magnitude keeps the meaning, and agrees where scores are positive.

    Args:
        fences: Tukey's factor f; 0 turns the fences off. Quartiles are interpolated linearly.
        order: `signed` (the paper's) or `magnitude`.
    """
    score_L = np.asarray(scores, dtype=np.float64)
    first, third = np.percentile(score_L[score_L != 0] if score_L.any() else score_L, [25, 75])
    reach = fences * (third - first) if fences else math.inf
    low, high = first - reach, third + reach
    size_L = np.abs(score_L) if order == "magnitude" else score_L
    raw_ranking = np.argsort(-size_L, kind="stable").tolist()
    nothing = (score_L == 0) & bool(fences and score_L.any())
    excluded = np.flatnonzero((score_L < low) | (score_L > high) | nothing).tolist()
    ranking = [block for block in raw_ranking if block not in excluded]
    return Selection((float(low), float(high)) if fences else None, excluded, ranking, raw_ranking)


class Stability(BaseModel, frozen=True):
    """What becomes of the choice when the proxy set is another draw from the same facts."""

    resamples: int  # how many proxy sets were drawn, with replacement, from the one that was scored
    low: list[float]  # of each block's mean score: a 95% interval
    high: list[float]
    chosen: list[float]  # the share of resamples in which each block comes first, fences and order taken anew


def judge(values_NL: Values, fences: float = 1.0, order: str = "magnitude", seed: int = 0) -> Stability:
    """Bootstrap a choice by fences and order, from each request's score of every block."""
    requests, blocks = values_NL.shape
    random = np.random.default_rng([seed, requests])
    means_RL = np.stack([values_NL[random.integers(requests, size=requests)].mean(0) for _ in range(RESAMPLES)])
    low, high = np.percentile(means_RL, [2.5, 97.5], axis=0)
    first_R = [select(mean_L, fences, order).ranking[0] for mean_L in means_RL]
    chosen = np.bincount(first_R, minlength=blocks) / RESAMPLES
    return Stability(resamples=RESAMPLES, low=low.tolist(), high=high.tolist(), chosen=chosen.tolist())


class Raced(BaseModel, frozen=True):
    """How far a block went in a race."""

    block: int
    requests: int  # that were edited there
    score: float  # the mean of rewrite, rephrase and locality over them, less damage to ordinary text
    perplexity: float = 1.0  # on that, over the base's, after edits of a few of them
    behind: float  # the winner's score on the same requests, less its own
    beaten: float  # the share of resamples of them in which the winner is ahead


class Race(BaseModel, frozen=True):
    """What trial edits came to, block by block (`pipeline.study.race`)."""

    method: str  # of editing
    trials: int  # a trial is one request at one block
    seconds: float  # that it took
    blocks: list[Raced]  # the winner first

    @property
    def verdict(self) -> str:
        """How sure it is that the winner is the best of them, in a word or two and then in a phrase."""
        winner, *others = self.blocks
        left = [one for one in others if one.beaten < STEADY or one.requests < ENOUGH]
        won = f"block {winner.block} scores {winner.score:.3f} over {winner.requests} requests by {self.method}"
        won += f", perplexity × {winner.perplexity:.3f}"
        if not left:
            return f"clear: {won}, ahead of each of {len(others)} others in {STEADY:.0%} of resamples or more"
        named = ", ".join(f"{one.block} ({one.behind:.3f} behind)" for one in left)
        if max(one.behind for one in left) <= ALIKE:
            return f"several alike: {won}; within {ALIKE} of it, so that any will do: {named}"
        return f"unclear: {won}; not beaten: {named}; more requests would tell"


@dataclass(frozen=True)
class Scores:
    """What the selector `method` found in so many seconds: requests' scores of every block, (N, L), float64."""

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


class GoldenProfile(BaseModel, frozen=True):
    """Found once for a model, used by every later edit of it.

    Example:
        >>> file = profile.save(folder)
        >>> GoldenProfile.load(file) == profile
        True
    """

    model: str  # the one that it holds for
    fingerprint: str
    method: str  # how blocks were scored
    scope: str  # whose weights; empty for a method that looks at none
    order: str = "signed"  # blocks rank by score, or by absolute score (magnitude)
    scores: list[float]  # one a block: the mean over requests
    fences: tuple[float, float] | None  # the lower and the upper one; None: off
    excluded: list[int]  # blocks outside the fences
    ranking: list[int]  # the other blocks: as they raced; the one first in most resamples; then by score
    raw_ranking: list[int]  # all blocks by score
    golden_layers: list[int] = Field(min_length=1)  # the first of the ranking: where to edit
    request_set: str  # where the proxy requests come from
    requests: int  # how many they were
    seconds: float  # that it took
    chat: bool = False  # whether prompts were put into the tokenizer's chat template
    stability: Stability | None = None  # None: the scores do not depend on requests, or are of an earlier version
    race: Race | None = None  # of trial edits that chose among what was scored; None: the scores alone chose

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
        """How sure the choice is, in a word and then in a phrase; empty where that is not known."""
        if self.race:
            return self.race.verdict
        if self.stability is None:
            return ""
        golden, chosen = self.golden_layers[0], self.stability.chosen
        share, first = chosen[golden], int(np.argmax(chosen))
        aside = ", which the fences set aside," if first in self.excluded else ""
        more = f"; block {first}{aside} in {chosen[first]:.0%}" if chosen[first] > share else ""
        word = "steady" if share >= STEADY else "likely" if share >= LIKELY else "in doubt"
        return f"{word}: block {golden}, chosen in {share:.0%} of resamples{more}"

    @property
    def other_choice(self) -> tuple[str, int] | None:
        """The order that was not asked for and the block that it puts first; None where that is the same block."""
        if not self.scope or self.race:
            return None
        other, size = ("signed", float) if self.order == "magnitude" else ("magnitude", abs)
        first = max(sorted(self.ranking), key=lambda block: size(self.scores[block]))
        return (other, first) if first != self.ranking[0] else None

    def save(self, folder: str | Path) -> Path:
        """Write `golden_profile.json` into a folder, made where there is none, whole or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        return write_text(Path(folder) / PROFILE_FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> GoldenProfile:
        """Read a profile from its file or folder; UserError when there is none, or it is no profile."""
        path = Path(path)
        path = path / PROFILE_FILE if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"profile: {path}: no such file; `{program()} attribute` makes one")
        try:
            return cls.model_validate_json(read_text_file(path))
        except ValueError as error:
            raise UserError(f"profile: {path}: no golden profile: {one_line(error)}") from None

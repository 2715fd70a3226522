"""What is planned for: a model's shape, rows of one length, and the batch of requests that they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.model import TargetRow
from pipeline.planning.alive import Alive
from pipeline.planning.shape import Shape

ANSWER = 4  # tokens of a row that are scored
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Case:
    """What a stage is asked to do.

    Attributes:
        shape: the model's.
        length: tokens of a row, answer included.
        layer: the golden layer.
        precision: Lightning's name of it.
        devices: how many share a step of training.
    """

    shape: Shape
    length: int
    layer: int = 0
    precision: str = "32-true"
    devices: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """The weights'."""
        return next(self.shape.model.parameters()).dtype

    def stepping(self) -> AbstractContextManager[Any]:
        """What Lightning runs a step in, and an optimiser's not."""
        return torch.autocast("cpu", AUTOCAST[self.precision]) if self.precision in AUTOCAST else nullcontext()

    @property
    def row(self) -> TargetRow:
        """A prompt and its answer."""
        return TargetRow([0] * self.length, max(1, self.length - ANSWER), "request")


@contextmanager
def tracing(case: Case) -> Iterator[Alive]:
    """Inside the `with`, what runs makes shapes in place of tensors, and their bytes are counted."""
    with case.shape.mode, Alive(case.shape.held()) as alive:
        yield alive

"""A model by its shape alone: from its config, with no weight read and none kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.model.blocks import find_blocks
from pipeline.model.llm import LLM, put_out_tuples
from pipeline.model.loading import decoder_of
from pipeline.planning.alive import Alive
from pipeline.requests.rows import Row
from pipeline.running.stage import Stage

ANSWER = 4  # tokens of a row that are scored
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Shape(LLM):
    """A language model without values and tokenizer: what runs it under `Case.counting` makes shapes alone.

    Args:
        model: its parameters are of `mode`.
        name: what the user calls it.
        mode: the FakeTensorMode that all of it lives in.
    """

    def __init__(self, model: PreTrainedModel, name: str, mode: FakeTensorMode) -> None:
        self.model = model
        self.name = name
        self.mode = mode
        self.blocks = find_blocks(model, name)
        self.blocks_put_out_tuples = put_out_tuples(model, self.blocks[0])

    @property
    def pad_token_id(self) -> int:
        """Any token will do."""
        return 0

    def held(self) -> list[Tensor]:
        """Its weights and buffers."""
        return [*self.model.parameters(), *self.model.buffers()]


def shape_of(config: PreTrainedConfig, name: str, dtype: torch.dtype) -> Shape:
    """A model of a config's shape, in eval mode and frozen.

    Raises:
        UserError: for one that the pipeline does not support.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model: Any = decoder_of(config, name, dtype=dtype)
        model.generation_config = None  # what ends a text is of no account
        return Shape(model.eval().requires_grad_(False), name, mode)


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

    @property
    def config(self) -> Any:
        """The decoder's."""
        return self.shape.model.config.get_text_config(decoder=True)

    @property
    def row(self) -> Row:
        """A prompt and its answer, the subject in the middle."""
        start, middle = max(1, self.length - ANSWER), self.length // 2
        return Row([0] * self.length, start, (min(middle, start - 1),) * 2, "request")

    @contextmanager
    def counting(self, gradients: bool) -> Iterator[Alive]:
        """Inside the `with`, what runs makes shapes in place of tensors, and their bytes are counted."""
        step = torch.autocast("cpu", AUTOCAST[self.precision]) if self.precision in AUTOCAST else nullcontext()
        with self.shape.mode, Alive(self.shape.held()) as alive, step, torch.set_grad_enabled(gradients):
            yield alive

    def peak(self, stage: Stage, items: list[Any]) -> int:
        """Bytes beside the weights that a stage's step takes for these items."""
        batch = stage.collate(items)
        with self.counting(stage.gradients) as alive:
            stage.step(batch)
        return alive.peak

"""A model by its shape alone: from its config, with no weight read and none kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.model import LLM
from pipeline.model.blocks import find_blocks
from pipeline.model.llm import put_out_tuples
from pipeline.model.loading import decoder_of


class Shape(LLM):
    """A language model without values and tokenizer: what runs it under `tracing` makes shapes alone.

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

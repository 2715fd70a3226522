"""A model by its shape alone, from its config, and the bytes that are alive at once in a pass that is not run.

Inside torch's FakeTensorMode a tensor has a shape, a dtype and a storage of so many bytes, and no values. What the
pipeline's own code would make, keep for the backward pass and let go is made, kept and let go all the same, so that
what is counted is what that code does with any family of models, and not what somebody has worked out of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.model.blocks import find_blocks
from pipeline.model.llm import LLM, Parts, put_out_tuples
from pipeline.model.loading import decoder_of
from pipeline.requests.rows import Row
from pipeline.running.stage import Stage

ANSWER = 4  # tokens of a row that are scored
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

aten = torch.ops.aten
device_of = torch.ops.prim.device.default
COUNTING = {aten.arange.default, aten.arange.start, aten.arange.start_step}


class Alive(TorchDispatchMode):
    """Inside the `with`, in a FakeTensorMode, counts the bytes of tensors that come and go.

    Code that asks for a value is answered so that it goes on: a condition holds, a real number is 1, a whole one 0,
    and a mask takes all. What is made of real tensors alone, such as a batch's tokens or places in a text, is made
    for real, since a model looks at it to choose what to do. Tensors that are `known` do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0  # bytes alive, and the most that were
        self._seen = {id(tensor.untyped_storage()) for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is device_of:
            return func(*args)
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in given) and (given or func in COUNTING):
            with unset_fake_temporarily():
                return self._noted(func(*args, **kwargs))
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 0)
        if func is aten.index.Tensor:
            args = (args[0], [_all_of(index) for index in args[1]])
        return self._noted(func(*args, **kwargs))

    def _noted(self, made: Any) -> Any:
        for storage in [tensor.untyped_storage() for tensor in tree_leaves(made) if isinstance(tensor, Tensor)]:
            if id(storage) not in self._seen:
                self._seen.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._let_go, id(storage), storage.nbytes())
        return made

    def _let_go(self, number: int, size: int) -> None:
        self._seen.discard(number)
        self.now -= size


def _all_of(index: Tensor | None) -> Tensor | None:
    """An index that takes as much as a mask that holds everywhere."""
    if index is None or index.dtype != torch.bool:
        return index
    assert index.dim() == 1, "only masks of rows are looked for"
    return torch.arange(len(index), device=index.device)


class Shape(LLM):
    """A language model without values and tokenizer: what runs it under `Case.counting` makes shapes alone.

    Its parameters are of `mode`, the FakeTensorMode that all of it lives in.
    """

    def __init__(self, model: PreTrainedModel, name: str, mode: FakeTensorMode) -> None:
        self.model = model
        self.name = name
        self.mode = mode
        self.pad_token_id = 0  # any token will do
        self.blocks = find_blocks(model, name)
        self.blocks_put_out_tuples = put_out_tuples(model, self.blocks[0])
        self.parts = Parts(heard=tuple(self.editable[:-1]))

    def held(self) -> list[Tensor]:
        """Its weights and buffers."""
        return [*self.model.parameters(), *self.model.buffers()]


def shape_of(config: PreTrainedConfig, name: str, dtype: torch.dtype) -> Shape:
    """A model of a config's shape, in eval mode and frozen.
    UserError for one that the pipeline does not support.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model: Any = decoder_of(config, name, dtype=dtype)
        model.generation_config = None  # what ends a text is of no account
        return Shape(model.eval().requires_grad_(False), name, mode)


@dataclass(frozen=True)
class Case:
    """What a stage is asked to do."""

    shape: Shape
    length: int  # tokens of a row, answer included
    layer: int = 0  # the golden one
    precision: str = "32-true"  # Lightning's name of it
    devices: int = 1  # how many share a step of training
    sharded: bool = False  # whether they share the weights, too
    on_host: bool = False  # whether the device is the host, whose memory key statistics wait in

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

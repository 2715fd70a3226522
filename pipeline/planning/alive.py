"""Bytes of the tensors that are alive at once in a pass that is not run: its shapes go through, its values do not.

Inside torch's FakeTensorMode a tensor has a shape, a dtype and a storage of so many bytes, and no values. What the
pipeline's own code would make, keep for the backward pass and let go is made, kept and let go all the same, so that
what is counted is what that code does with any family of models, and not what somebody has worked out of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
device_of = torch.ops.prim.device.default
COUNTING = {aten.arange.default, aten.arange.start, aten.arange.start_step}


class Alive(TorchDispatchMode):
    """Inside the `with`, in a FakeTensorMode, counts the bytes of tensors that come and go.

    Code that asks for a value is answered so that it goes on: a condition holds, a real number is 1, a whole one 0,
    and a mask takes all. What is made of real tensors alone, such as a batch's tokens or places in a text, is made
    for real, since a model looks at it to choose what to do.

    Args:
        known: tensors that were there before, and do not count.

    Attributes:
        now: bytes alive.
        peak: the most that were.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
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
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._seen:
            return
        self._seen.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, id(storage), storage.nbytes())

    def _let_go(self, number: int, size: int) -> None:
        self._seen.discard(number)
        self.now -= size


def _all_of(index: Tensor | None) -> Tensor | None:
    """An index that takes as much as a mask that holds everywhere."""
    if index is None or index.dtype != torch.bool:
        return index
    assert index.dim() == 1, "only masks of rows are looked for"
    return torch.arange(len(index), device=index.device)

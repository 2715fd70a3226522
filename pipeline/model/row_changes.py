"""Rows of one batch, each under a low-rank change of its own of the same weights.

Many requests can so be edited and measured each alone, in one pass: ΔW_b = left_b right_b adds left_b (right_b x)
to what a projection makes of x, and no weight is touched. Shapes: B rows, T tokens, I inputs and O outputs of the
projection, k the change's rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from pipeline.model.blocks import by_row
from pipeline.model.llm import LLM


class LowRank(NamedTuple):
    """A change of one projection's weight a row: left (B, O, k) times right (B, k, I)."""

    left_BOk: Tensor
    right_BkI: Tensor

    def rows(self, chosen: Tensor) -> LowRank:
        """The changes of some rows, by number; a row may be named more than once."""
        return LowRank(self.left_BOk[chosen], self.right_BkI[chosen])

    def added(self, input_BTI: Tensor) -> Tensor:
        """What the change adds to the projection's output, shape (B, T, O)."""
        return (input_BTI.to(self.right_BkI) @ self.right_BkI.mT) @ self.left_BOk.mT


RowChanges = Mapping[str, LowRank]  # by the projection's full name


@contextmanager
def changed_rows(llm: LLM, changes: RowChanges) -> Iterator[None]:
    """Inside the `with`, every row of a pass runs under its own changes."""
    with ExitStack() as stack:
        for name, change in changes.items():
            handle = llm.model.get_submodule(name).register_forward_hook(_adding(change))
            stack.callback(handle.remove)
        yield


def _adding(change: LowRank) -> Callable[..., Tensor]:
    def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        added_BTO = change.added(by_row(args[0], len(change.left_BOk)))
        return output + added_BTO.to(output.dtype).view_as(output)

    return add

"""Running the upper blocks only: what the frozen blocks below put out is kept, and handed on instead of them.

While weights of block l and above alone change, what enters block l does not. It is read once; every further
pass runs blocks l…L. The model's own forward does it, block by block, so that masks, rotary tables and whatever
else a family chooses by a block's index stay each block's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.llm import LLM


@contextmanager
def handing_on(llm: LLM, layer: int, enter_BTD: Tensor) -> Iterator[None]:
    """Inside the `with`, blocks below `layer` do not run: they hand on what enters that block."""
    put_out = _as_blocks_do(llm, enter_BTD)
    blocks = [llm.model.get_submodule(block.name) for block in llm.blocks[:layer]]
    with running_instead(blocks, [lambda *_args, **_kwargs: put_out] * len(blocks)):
        yield


@contextmanager
def passing_through(llm: LLM, layer: int) -> Iterator[None]:
    """Inside the `with`, block `layer` and those above do not run: they put out what they get."""

    def put_out(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor | tuple[Tensor, None]:
        return _as_blocks_do(llm, hidden_states)

    blocks = [llm.model.get_submodule(block.name) for block in llm.blocks[layer:]]
    with running_instead(blocks, [put_out] * len(blocks)):
        yield


@contextmanager
def reading_enter(llm: LLM, layer: int) -> Iterator[list[Tensor]]:
    """Inside the `with`, every pass appends what enters block `layer`, shape (B, T, D)."""
    seen: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    block = llm.model.get_submodule(llm.blocks[layer].name)
    handle = block.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def climb(llm: LLM, input_ids_BT: Tensor, enter_BTD: Tensor | None, start: int, layer: int) -> Tensor:
    """What enters block `layer`, running only the blocks from `start` on.

    Args:
        llm: the model.
        input_ids_BT: the rows' tokens.
        enter_BTD: what enters block `start`; of no account where that is 0.
        start: a block below `layer`, or that one.
        layer: the block.
    """
    with ExitStack() as stack:
        if start and enter_BTD is not None:
            stack.enter_context(handing_on(llm, start, enter_BTD))
        stack.enter_context(passing_through(llm, layer))
        entering = stack.enter_context(reading_enter(llm, layer))
        llm.model(input_ids=input_ids_BT, use_cache=False, logits_to_keep=1)
    return entering[0]


def _as_blocks_do(llm: LLM, hidden_BTD: Tensor) -> Tensor | tuple[Tensor, None]:
    """A hidden state as the model's blocks put it out: by itself, or with their attention's weights (none here)."""
    return (hidden_BTD, None) if llm.blocks_put_out_tuples else hidden_BTD


@contextmanager
def running_instead(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Inside the `with`, modules run these in place of their own forwards; hooks of theirs still run."""
    own = [vars(module).get("forward") for module in modules]  # libraries wrap a module's forward like this, too
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            vars(module).pop("forward", None)
            if before is not None:
                module.forward = before

"""Activation checkpointing: a block keeps only what enters it, and runs again when its gradients are due."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial

from torch.utils.checkpoint import checkpoint

from pipeline.model.activations import running_instead
from pipeline.model.llm import LLM

_AGAIN = ContextVar("a block runs again", default=False)


def runs_again() -> bool:
    """Whether a block runs for its gradients now: hooks have seen the same pass before."""
    return _AGAIN.get()


@contextmanager
def checkpointing(llm: LLM, wanted: bool = True) -> Iterator[None]:
    """Inside the `with`, where wanted, every block is checkpointed; passes must not use a cache."""
    if not wanted:
        yield
        return
    modules = [llm.model.get_submodule(block.name) for block in llm.blocks]
    kept = [partial(checkpoint, module.forward, use_reentrant=False, context_fn=_contexts) for module in modules]
    with running_instead(modules, kept):
        yield


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds a block's first run, and its second."""
    return nullcontext(), _again()


@contextmanager
def _again() -> Iterator[None]:
    token = _AGAIN.set(True)
    try:
        yield
    finally:
        _AGAIN.reset(token)

"""Running parts of a decoder, keeping what passes through them, and changing it.

While weights of block l and above alone change, what enters block l does not: it is read once, and every further
pass runs blocks l…L. The model's own forward does it, block by block, so that masks, rotary tables and whatever
else a family chooses by a block's index stay each block's own.

Shapes: B rows, T tokens, D hidden size, N positions that are read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.model.blocks import by_row
from pipeline.model.llm import LLM
from pipeline.requests.rows import Batch, Row, collate
from pipeline.running.stage import Stage

Seen = dict[str, Tensor]  # by a module's full name
_AGAIN = ContextVar("a block runs again", default=False)
Change = Callable[[Tensor, Tensor], Tensor]  # from what enters and leaves a projection to what is to leave it


class RowStage(Stage):
    """A stage whose items are rows of a model's, or texts that share one (see `pack`)."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(llm.model)
        self.llm, self.activations = llm, Activations(llm)

    def collate(self, items: list[Row] | list[list[Row]]) -> Batch:
        return collate(items, self.llm.pad_token_id)


class Activations:
    """A decoder's parts; whatever is set up in a `with` is gone after it, also when a pass fails."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.model = llm.model
        self.blocks = [block.module for block in llm.blocks]

    def from_block(self, layer: int, enter_BTD: Tensor | None) -> AbstractContextManager[None]:
        """Blocks below `layer` do not run: they hand on what enters that block (None: all run)."""
        if enter_BTD is None:
            return nullcontext()
        put_out = self._as_blocks_do(enter_BTD)
        return running_instead(dict.fromkeys(self.blocks[:layer], lambda *_args, **_kwargs: put_out))

    def up_to_block(self, layer: int) -> AbstractContextManager[None]:
        """Block `layer` and those above do not run: they put out what they get."""

        def put_out(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor | tuple[Tensor, None]:
            return self._as_blocks_do(hidden_states)

        return running_instead(dict.fromkeys(self.blocks[layer:], put_out))

    def from_gradients(self) -> AbstractContextManager[Any]:
        """Passes have a graph although all weights are frozen: it begins at what the embeddings put out."""

        def begin(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return output.requires_grad_(True).clone()  # a copy, for some families change theirs in place

        embeddings: Any = self.model.get_input_embeddings()
        return embeddings.register_forward_hook(begin)

    def entering(self, *names: str) -> AbstractContextManager[Seen]:
        """What enters modules (blocks, projections), as the last pass had it."""
        return self._seeing(names, lambda args, kwargs, _: args[0] if args else kwargs["hidden_states"])

    def leaving(self, *names: str) -> AbstractContextManager[Seen]:
        """What leaves modules, as the last pass had it; of a block, the hidden state."""
        return self._seeing(
            names, lambda _args, _kwargs, output: output[0] if isinstance(output, tuple | list) else output
        )

    @contextmanager
    def _seeing(self, names: Sequence[str], of: Callable[[Any, Any, Any], Tensor]) -> Iterator[Seen]:
        seen: Seen = {}

        def keep(name: str, _: nn.Module, *passed: Any) -> None:
            seen[name] = of(*passed)

        with ExitStack() as hooks:
            for name in names:
                module = self.model.get_submodule(name)
                hooks.enter_context(module.register_forward_hook(partial(keep, name), with_kwargs=True))
            yield seen

    def changing(self, name: str, rows: int, change: Change) -> AbstractContextManager[Any]:
        """A projection puts out what `change` makes of what enters and leaves it, (rows, T, I) and (rows, T, O)."""

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            changed = change(by_row(args[0], rows), by_row(output, rows))
            return changed.to(output.dtype).view_as(output)

        return self.model.get_submodule(name).register_forward_hook(hook)

    def enter(self, input_ids_BT: Tensor, layer: int) -> Tensor:
        """What enters block `layer`, (B, T, D)."""
        name = self.llm.blocks[layer].name
        with torch.no_grad(), self.up_to_block(layer), self.entering(name) as seen:
            self.run(input_ids_BT)
        return seen[name]

    def run(self, input_ids_BT: Tensor, **settings: Any) -> None:
        """A pass whose logits nobody reads."""
        self.model(input_ids=input_ids_BT, **{"use_cache": False, "logits_to_keep": 1, **settings})

    def _as_blocks_do(self, hidden_BTD: Tensor) -> Tensor | tuple[Tensor, None]:
        """A hidden state as the blocks put it out: by itself, or with their attention's weights (none here)."""
        return (hidden_BTD, None) if self.llm.blocks_put_out_tuples else hidden_BTD


@contextmanager
def running_instead(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules run these in place of their own forwards; hooks of theirs still run."""
    own = {module: vars(module).get("forward") for module in forwards}  # libraries wrap a forward like this, too
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            vars(module).pop("forward", None)
            if before is not None:
                module.forward = before


def checkpointing(llm: LLM, wanted: bool = True) -> AbstractContextManager[None]:
    """Inside the `with`, where wanted, blocks run again for their gradients; passes must not use a cache."""
    modules = [block.module for block in llm.blocks] if wanted else []
    settings: Any = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _running_again())}
    return running_instead({module: partial(checkpoint, module.forward, **settings) for module in modules})


@contextmanager
def _running_again() -> Iterator[None]:
    token = _AGAIN.set(True)
    try:
        yield
    finally:
        _AGAIN.reset(token)


def runs_again() -> bool:
    """Whether a checkpointed block runs for its gradients now: hooks have seen the same pass before."""
    return _AGAIN.get()


@contextmanager
def head_reads(
    model: nn.Module, row_N: Tensor, position_N: Tensor, also_MD: Tensor | None = None
) -> Iterator[list[Tensor]]:
    """The language-model head sees the named positions alone, as one row: logits come as (1, N, V).

    What a family does with its logits after the head (scaling, soft caps) still happens. With `also_MD`, these M
    hidden states stand behind them. Yields a list that takes the hidden states (N, D) of every pass.
    """
    seen: list[Tensor] = []

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD, *rest = args
        hidden_ND = hidden_BTD[row_N, position_N]
        seen.append(hidden_ND)
        read = hidden_ND if also_MD is None else torch.cat([hidden_ND, also_MD.to(hidden_ND)])
        return (read.unsqueeze(0), *rest)

    with model.get_output_embeddings().register_forward_pre_hook(gather):  # type: ignore[operator]
        yield seen


def wide_logits(output: Any) -> Tensor:
    """A pass's logits behind `head_reads`, (N, V), in float32 at least."""
    return wide(output.logits.squeeze(0))


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def target_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (N, V) that predict the target tokens, in float32 at least; no other position meets the vocabulary.

    Of a batch with texts that are to go on as before, those of the unedited model stand behind them: (N + M, V).
    """
    with head_reads(model, batch.row_N, batch.position_N, batch.base_MD):
        return wide_logits(model(input_ids=batch.input_ids_BT, use_cache=False))


def target_losses(model: nn.Module, batch: Batch) -> Tensor:
    """ℓ(x, y) of every text under the model, in nats: see `Batch.losses`."""
    return batch.losses(target_logits(model, batch))

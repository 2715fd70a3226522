"""Running only what changes at one token of some blocks can reach: blocks from the first up, tokens from it on.

A change of the down-projection's output in blocks from l up at token s alters no block below l and no token before
s. So the tokens before s run once (their keys and values are kept), the blocks below l run once for the rest (what
enters block l is kept), and every further pass runs blocks l…L over tokens s…T only. Exact. Where a decoder keeps
more of a text than keys and values, or a block reads more than leaves the one below, whole texts or all blocks run.

Shapes: B rows, P prefix tokens (padded on the left), S suffix tokens (padded on the right), D hidden, N positions
that are read, V vocabulary, L changed blocks, O outputs of their down-projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.errors import UserError, one_line
from pipeline.model.activations import Activations, head_reads, target_logits, wide_logits
from pipeline.model.blocks import by_row
from pipeline.model.llm import LLM, Parts
from pipeline.requests.rows import Row, collate

TRIED = 8  # tokens
FAILS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)  # what a part that cannot run raises
NEAR = 0.1  # of the logits' spread: what half precision may make of the same sums


class Suffixes:
    """Rows that have run once, and can run again from some blocks and their subjects' last tokens on.

    Block l is the first of `layers` of a frozen model; token s is the last of a row's subject, before its target.
    """

    @torch.no_grad()
    def __init__(self, llm: LLM, layers: Sequence[int], rows: Sequence[Row]) -> None:
        self.llm, self.layer, self.activations = llm, layers[0], Activations(llm)
        self.downs = [name for layer in layers for name in llm.blocks[layer].down]
        device = next(llm.model.parameters()).device
        places = [row.span.stop - 1 for row in rows]
        starts = places if parts_of(llm).ends else [0] * len(rows)
        suffixes = [Row(row.token_ids[at:], row.target_start - at) for row, at in zip(rows, starts, strict=True)]
        self.batch = collate(suffixes, llm.pad_token_id).to(device)  # the rows from token s on, or from their first
        self.start_B = torch.tensor(starts, device=device)
        self.place_B = torch.tensor(places, device=device) - self.start_B  # of token s in the batch's rows
        self.mask_BP, self.prefix = self._prefix([row.token_ids[:at] for row, at in zip(rows, starts, strict=True)])
        block = llm.blocks[self.layer].name
        with self.activations.entering(block) as entering, self.activations.leaving(*self.downs) as leaving:
            self.base_NV = self._forward()  # the logits that predict the target tokens
        self.enter_BSD = entering[block] if parts_of(llm).blocks else None
        rows_B = torch.arange(len(rows), device=device)
        # what leaves the blocks' down-projections at token s
        outputs = [by_row(leaving[down], len(rows))[rows_B, self.place_B] for down in self.downs]
        self.output_BLO = torch.stack(outputs, dim=1)

    def _prefix(self, texts: Sequence[list[int]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run what stands before the suffixes, padded on the left; mask (B, P), each block's keys and values."""
        width = max(1, *map(len, texts))
        ids = [[self.llm.pad_token_id] * (width - len(text)) + text for text in texts]
        mask_BP = (torch.arange(width, device=self.start_B.device) >= (width - self.start_B)[:, None]).long()
        if not parts_of(self.llm).ends:
            return mask_BP, []
        cache = DynamicCache()  # one that keeps every token: a family's own may drop what lies outside its window
        self.activations.run(
            torch.tensor(ids, device=mask_BP.device),
            attention_mask=mask_BP,
            position_ids=(mask_BP.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        return mask_BP, [(keys, values) for keys, values, _ in cache]

    def subset(self, rows: Tensor) -> Suffixes:
        """Some of the rows, by number."""
        part = copy(self)
        texts = [self.batch.texts[row] for row in rows.tolist()]
        part.batch = collate(texts, self.llm.pad_token_id).to(rows.device)
        part.start_B, part.place_B = self.start_B[rows], self.place_B[rows]
        part.mask_BP, part.output_BLO = self.mask_BP[rows], self.output_BLO[rows]
        part.prefix = [(keys[rows], values[rows]) for keys, values in self.prefix]
        if self.enter_BSD is not None:
            part.enter_BSD = self.enter_BSD[rows, : part.batch.input_ids_BT.shape[1]]
        return part

    def run(self, change_BLO: Tensor) -> Tensor:
        """Logits (N, V) when changes are added to the down-projections' outputs at each row's token s."""

        def add(change_BO: Tensor, _: Tensor, output_BSO: Tensor) -> Tensor:
            at_BS = torch.arange(output_BSO.shape[1], device=change_BO.device) == self.place_B[:, None]
            return output_BSO + at_BS[..., None] * change_BO[:, None].to(output_BSO.dtype)

        with ExitStack() as changed:
            changed.enter_context(self.activations.from_block(self.layer, self.enter_BSD))
            for down, change_BO in zip(self.downs, change_BLO.unbind(1), strict=True):
                changed.enter_context(self.activations.changing(down, len(change_BO), partial(add, change_BO)))
            return self._forward()

    def _forward(self) -> Tensor:
        ids_BS = self.batch.input_ids_BT
        after: dict[str, Any] = {"use_cache": False}
        if self.prefix:
            after = {
                "attention_mask": torch.cat([self.mask_BP, torch.ones_like(ids_BS)], dim=1),
                "position_ids": self.start_B[:, None] + torch.arange(ids_BS.shape[1], device=ids_BS.device),
                "past_key_values": DynamicCache(self.prefix),
                "use_cache": True,
            }
        with head_reads(self.llm.model, self.batch.row_N, self.batch.position_N):
            return wide_logits(self.llm.model(input_ids=ids_BS, **after))


def parts_of(llm: LLM) -> Parts:
    """Which parts of the model come to the same by themselves, tried once; UserError when it does not run."""
    if llm.parts is None:
        with torch.no_grad(), llm.frozen():
            llm.parts = _found(llm)
    return llm.parts


def _found(llm: LLM) -> Parts:
    ids = [place % len(llm.embedding) for place in range(1, 1 + min(TRIED, llm.context_length or TRIED))]
    row, layer = Row(ids, len(ids) - 1, (len(ids) // 2,) * 2), llm.editable[-1]
    batch, activations = collate([row]).to(llm.embedding.device), Activations(llm)

    def upper() -> Tensor:
        if enter_BTD.dim() != 3:
            raise ValueError("several streams of hidden states, which rows cannot be told apart in")
        with activations.from_block(layer, enter_BTD):
            return target_logits(llm.model, batch)

    try:
        whole_NV, heard = target_logits(llm.model, batch), _heard(activations, batch.input_ids_BT)
        enter_BTD = activations.enter(batch.input_ids_BT, layer)
    except FAILS as error:
        what = f"model: {type(llm.model).__name__}: its blocks cannot be run by themselves"
        raise UserError(f"{what} ({type(error).__name__}: {one_line(error)})") from error
    blocks = _agree(upper, whole_NV)
    llm.parts = Parts(blocks)  # with ends, which are tried
    return Parts(blocks, _agree(lambda: Suffixes(llm, [layer], [row]).base_NV, whole_NV), heard)


@torch.enable_grad()
def _heard(activations: Activations, ids_1T: Tensor) -> tuple[int, ...]:
    """The blocks whose MLPs' outputs at a token have a gradient of what is said at the last one."""
    llm = activations.llm
    downs = {name: block.index for block in llm.blocks for name in block.down}
    row_1, place_1 = torch.zeros(1, dtype=torch.int64), torch.tensor([ids_1T.shape[1] - 1])
    reading = head_reads(llm.model, row_1, place_1)
    with activations.leaving(*downs) as seen, activations.from_gradients(), reading:
        logits_1V = wide_logits(llm.model(input_ids=ids_1T, use_cache=False))
    what = logits_1V @ torch.linspace(-1, 1, logits_1V.shape[1]).to(logits_1V)  # of any logits but even ones
    gradients = torch.autograd.grad(what.sum(), list(seen.values()), allow_unused=True)
    reached = {
        downs[name]
        for name, gradient in zip(seen, gradients, strict=True)
        if gradient is not None and by_row(gradient, 1)[0, :-1].any()
    }
    return tuple(sorted(reached))


def _agree(part: Callable[[], Tensor], whole_NV: Tensor) -> bool:
    try:
        return torch.allclose(part(), whole_NV, rtol=0, atol=NEAR * whole_NV.std().item())
    except FAILS:
        return False

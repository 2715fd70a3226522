"""Running only what a change at one token of one block can reach: the blocks from it up, the tokens from it on.

A change of the down-projection's output in block l at token s alters no block below l and no token before s.
So the tokens before s run once (their keys and values are kept), the blocks below l run once for the rest (what
enters block l is kept), and every further pass runs blocks l…L over tokens s…T only. Exact, for any decoder.

Shapes: B rows, P prefix tokens (padded on the left), S suffix tokens (padded on the right), D hidden, N positions
that are read, V vocabulary, I inputs and O outputs of the down-projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from pipeline.model.blocks import by_row
from pipeline.model.llm import LLM
from pipeline.model.targets import head_reads_only
from pipeline.model.upper import handing_on, passing_through, reading_enter


class SuffixRow(NamedTuple):
    """A text, the token at which a change will happen, and the first token that is predicted from it.

    With `target_start` at the text's end, what comes after its last token is read, without a target.
    """

    token_ids: list[int]
    start: int
    target_start: int

    @property
    def end(self) -> int:
        """Up to where the row is run: nothing is read behind a target's last token."""
        return max(self.target_start, len(self.token_ids) - 1)


@dataclass(frozen=True)
class Suffixes:
    """Rows that have run once, kept so that they can run again from block l and token s on.

    Attributes:
        ids_BS, position_BS: suffix tokens and their places in the text.
        mask_BT: which tokens of prefix and suffix are text.
        layer: block l.
        enter_BSD: what enters it.
        prefix: keys and values (B, …, P, …) of the tokens before, block by block.
        key_BI, output_BO: what enters and leaves block l's down-projection at each row's start token.
        row_N, place_N: the positions that are read, row by row.
        target_N: the token that each predicts; -1: none.
    """

    ids_BS: Tensor
    position_BS: Tensor
    mask_BT: Tensor
    layer: int
    enter_BSD: Tensor
    prefix: list[tuple[Tensor, Tensor]]
    key_BI: Tensor
    output_BO: Tensor
    row_N: Tensor
    place_N: Tensor
    target_N: Tensor

    def subset(self, rows: Tensor) -> Suffixes:
        """Some of the rows, by number and in that order (which must be ascending)."""
        number = torch.full((len(self.ids_BS),), -1, device=rows.device)
        number[rows] = torch.arange(len(rows), device=rows.device)
        read = number[self.row_N] >= 0
        return replace(
            self,
            ids_BS=self.ids_BS[rows],
            position_BS=self.position_BS[rows],
            mask_BT=self.mask_BT[rows],
            enter_BSD=self.enter_BSD[rows],
            prefix=[(keys[rows], values[rows]) for keys, values in self.prefix],
            key_BI=self.key_BI[rows],
            output_BO=self.output_BO[rows],
            row_N=number[self.row_N[read]],
            place_N=self.place_N[read],
            target_N=self.target_N[read],
        )


class SuffixRunner:
    """Runs rows once, and again and again under changes of one block's down-projection's output.

    Args:
        llm: the model, frozen by the caller.
        layer: the block.
    """

    def __init__(self, llm: LLM, layer: int) -> None:
        self.llm = llm
        self.layer = layer
        (self.down,) = llm.blocks[layer].down.values()

    @torch.no_grad()
    def capture(self, rows: Sequence[SuffixRow]) -> tuple[Suffixes, Tensor]:
        """Run rows unchanged; what later runs need, and the logits (N, V) of the positions that are read."""
        device = next(self.llm.model.parameters()).device
        suffix = [row.token_ids[row.start : row.end] for row in rows]
        length = max(map(len, suffix))
        start_B = torch.tensor([row.start for row in rows], device=device)
        pad = self.llm.pad_token_id
        ids_BS = torch.tensor([ids + [pad] * (length - len(ids)) for ids in suffix], device=device)
        row_N, place_N, target_N = torch.tensor(_read_places(rows), device=device).T
        mask_BP, prefix = self._prefix(rows, start_B)
        empty = torch.empty(0, device=device)
        kept = Suffixes(
            ids_BS=ids_BS,
            position_BS=start_B[:, None] + torch.arange(length, device=device),
            mask_BT=torch.cat([mask_BP, torch.ones_like(ids_BS)], dim=1),
            layer=0,
            enter_BSD=empty,
            prefix=prefix,
            key_BI=empty,
            output_BO=empty,
            row_N=row_N,
            place_N=place_N - start_B[row_N],
            target_N=target_N,
        )
        return self._noted(kept)

    def _prefix(self, rows: Sequence[SuffixRow], start_B: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run what stands before the suffixes, padded on the left; mask (B, P), each block's keys and values."""
        width = max(1, *(row.start for row in rows))
        pad = [self.llm.pad_token_id]
        ids = [pad * (width - row.start) + row.token_ids[: row.start] for row in rows]
        mask_BP = (torch.arange(width, device=start_B.device) >= (width - start_B)[:, None]).long()
        cache = DynamicCache()  # one that keeps every token: a family's own may drop what lies outside its window
        self.llm.model(
            input_ids=torch.tensor(ids, device=start_B.device),
            attention_mask=mask_BP,
            position_ids=(mask_BP.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return mask_BP, [(keys, values) for keys, values, _ in cache]

    @torch.no_grad()
    def climbed(self, rows: Suffixes) -> Suffixes:
        """Rows that were captured at a lower block, captured at this one; blocks below the lower one do not run."""
        with handing_on(self.llm, rows.layer, rows.enter_BSD), passing_through(self.llm, self.layer + 1):
            return self._noted(rows)[0]

    def _noted(self, rows: Suffixes) -> tuple[Suffixes, Tensor]:
        """Run rows, noting what enters this block, and what enters and leaves its down-projection."""
        seen: dict[str, Tensor] = {}

        def leave(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen["key"], seen["output"] = (by_row(x, len(rows.ids_BS))[:, 0].clone() for x in (args[0], output))

        handle = self.down.register_forward_hook(leave)
        try:
            with reading_enter(self.llm, self.layer) as entering:
                logits_NV = self._forward(rows)
        finally:
            handle.remove()
        enter, key, output = entering[0], seen["key"], seen["output"]
        return replace(rows, layer=self.layer, enter_BSD=enter, key_BI=key, output_BO=output), logits_NV

    def run(self, rows: Suffixes, change_BO: Tensor) -> Tensor:
        """Logits (N, V) when a change is added to the down-projection's output at each row's start token."""

        def add(_: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output_BSO = by_row(output, len(change_BO))
            changed = output_BSO[:, :1] + change_BO[:, None].to(output_BSO.dtype)
            return torch.cat([changed, output_BSO[:, 1:]], dim=1).view_as(output)

        handle = self.down.register_forward_hook(add)
        try:
            with handing_on(self.llm, self.layer, rows.enter_BSD):
                return self._forward(rows)
        finally:
            handle.remove()

    def _forward(self, rows: Suffixes) -> Tensor:
        with head_reads_only(self.llm.model, rows.row_N, rows.place_N):
            logits = self.llm.model(
                input_ids=rows.ids_BS,
                attention_mask=rows.mask_BT,
                position_ids=rows.position_BS,
                past_key_values=DynamicCache(rows.prefix),
                use_cache=True,
            ).logits
        return logits.squeeze(0).to(torch.promote_types(logits.dtype, torch.float32))


def _read_places(rows: Sequence[SuffixRow]) -> list[tuple[int, int, int]]:
    """Of every logit that is read, the row, the place in its text, and the token that follows there (−1: none)."""
    return [
        (number, place - 1, row.token_ids[place] if place < len(row.token_ids) else -1)
        for number, row in enumerate(rows)
        for place in range(row.target_start, max(len(row.token_ids), row.target_start + 1))
    ]

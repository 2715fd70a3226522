"""Running only what a change at one token of one block can reach: the blocks from it up, the tokens from it on.

A change of the down-projection's output in block l at token s alters no block below l and no token before s.
So the tokens before s run once (their keys and values are kept), the blocks below l run once for the rest (what
enters block l is kept), and every further pass runs blocks l…L over tokens s…T only. Exact, for any decoder.

Shapes: B rows, P prefix tokens (padded on the left), S suffix tokens (padded on the right), D hidden, N positions
that are read, V vocabulary, O outputs of the down-projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.model.activations import Activations, head_reads, wide_logits
from pipeline.model.blocks import by_row
from pipeline.model.llm import LLM
from pipeline.requests.rows import Row


@dataclass(frozen=True)
class Suffixes:
    """Rows that have run once, kept so that they can run again from block l and token s on.

    Attributes:
        ids_BS, position_BS: suffix tokens and their places in the text.
        mask_BT: which tokens of prefix and suffix are text.
        prefix: keys and values (B, …, P, …) of the tokens before, block by block.
        row_N, place_N: the positions that are read, row by row.
        target_N: the token that each predicts; -1: none.
        layer: block l.
        enter_BSD: what enters it.
        output_BO: what leaves its down-projection at each row's token s.
    """

    ids_BS: Tensor
    position_BS: Tensor
    mask_BT: Tensor
    prefix: list[tuple[Tensor, Tensor]]
    row_N: Tensor
    place_N: Tensor
    target_N: Tensor
    layer: int = 0
    enter_BSD: Tensor | None = None
    output_BO: Tensor | None = None

    def subset(self, rows: Tensor) -> Suffixes:
        """Some of the rows, by number and in that order (which must be ascending)."""
        assert self.enter_BSD is not None and self.output_BO is not None
        number = torch.full((len(self.ids_BS),), -1, device=rows.device)
        number[rows] = torch.arange(len(rows), device=rows.device)
        read = number[self.row_N] >= 0
        return Suffixes(
            ids_BS=self.ids_BS[rows],
            position_BS=self.position_BS[rows],
            mask_BT=self.mask_BT[rows],
            prefix=[(keys[rows], values[rows]) for keys, values in self.prefix],
            row_N=number[self.row_N[read]],
            place_N=self.place_N[read],
            target_N=self.target_N[read],
            layer=self.layer,
            enter_BSD=self.enter_BSD[rows],
            output_BO=self.output_BO[rows],
        )


class SuffixRunner:
    """Runs rows from one block and one token of each on.

    Args:
        llm: the model, frozen by the caller.
        layer: block l.
    """

    def __init__(self, llm: LLM, layer: int) -> None:
        self.llm, self.layer = llm, layer
        self.activations = Activations(llm)
        self.block = llm.blocks[layer].name
        (self.down,) = llm.blocks[layer].down

    @torch.no_grad()
    def capture(self, rows: Sequence[Row]) -> tuple[Suffixes, Tensor]:
        """Run rows once; what a change at their subjects' last tokens can reach, and the logits (N, V) read.

        Read are the positions that predict a target token; of a row without one, its last.
        """
        device = next(self.llm.model.parameters()).device
        starts = [_start(row) for row in rows]
        suffixes = [row.token_ids[at : _end(row)] for row, at in zip(rows, starts, strict=True)]
        length, start_B = max(map(len, suffixes)), torch.tensor(starts, device=device)
        ids = [ids + [self.llm.pad_token_id] * (length - len(ids)) for ids in suffixes]
        row_N, place_N, target_N = torch.tensor(_read_places(rows), device=device).T
        mask_BP, prefix = self._prefix(rows, start_B)
        kept = Suffixes(
            ids_BS=torch.tensor(ids, device=device),
            position_BS=start_B[:, None] + torch.arange(length, device=device),
            mask_BT=torch.cat([mask_BP, mask_BP.new_ones(len(rows), length)], dim=1),
            prefix=prefix,
            row_N=row_N,
            place_N=place_N - start_B[row_N],
            target_N=target_N,
        )
        return self._noted(kept)

    def _prefix(self, rows: Sequence[Row], start_B: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run what stands before the suffixes, padded on the left; mask (B, P), each block's keys and values."""
        starts = start_B.tolist()
        width = max(1, *starts)
        pad = [self.llm.pad_token_id]
        ids = [pad * (width - at) + row.token_ids[:at] for row, at in zip(rows, starts, strict=True)]
        mask_BP = (torch.arange(width, device=start_B.device) >= (width - start_B)[:, None]).long()
        cache = DynamicCache()  # one that keeps every token: a family's own may drop what lies outside its window
        self.activations.run(
            torch.tensor(ids, device=start_B.device),
            attention_mask=mask_BP,
            position_ids=(mask_BP.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        return mask_BP, [(keys, values) for keys, values, _ in cache]

    @torch.no_grad()
    def climbed(self, rows: Suffixes) -> Suffixes:
        """Rows that were captured at a lower block, captured at this one; blocks below the lower one do not run."""
        with self.activations.from_block(rows.layer, rows.enter_BSD), self.activations.up_to_block(self.layer + 1):
            return self._noted(rows)[0]

    def _noted(self, rows: Suffixes) -> tuple[Suffixes, Tensor]:
        """Run rows, noting what enters this block and what leaves its down-projection."""
        with self.activations.entering(self.block) as entering, self.activations.leaving(self.down) as leaving:
            logits_NV = self._forward(rows)
        output_BO = by_row(leaving[self.down], len(rows.ids_BS))[:, 0].clone()
        return replace(rows, layer=self.layer, enter_BSD=entering[self.block], output_BO=output_BO), logits_NV

    def run(self, rows: Suffixes, change_BO: Tensor) -> Tensor:
        """Logits (N, V) when a change is added to the down-projection's output at each row's start token."""

        def add(_: Tensor, output_BSO: Tensor) -> Tensor:
            changed = output_BSO[:, :1] + change_BO[:, None].to(output_BSO.dtype)
            return torch.cat([changed, output_BSO[:, 1:]], dim=1)

        from_here = self.activations.from_block(self.layer, rows.enter_BSD)
        with from_here, self.activations.changing(self.down, len(change_BO), add):
            return self._forward(rows)

    def _forward(self, rows: Suffixes) -> Tensor:
        with head_reads(self.llm.model, rows.row_N, rows.place_N):
            return wide_logits(
                self.llm.model(
                    input_ids=rows.ids_BS,
                    attention_mask=rows.mask_BT,
                    position_ids=rows.position_BS,
                    past_key_values=DynamicCache(rows.prefix),
                    use_cache=True,
                )
            )


def _start(row: Row) -> int:
    """The token at which a change will happen: the subject's last."""
    assert row.subject
    return row.subject[1]


def _end(row: Row) -> int:
    """Up to where a row is run: nothing is read behind a target's last token."""
    return max(row.target_start, len(row.token_ids) - 1)


def suffix_length(row: Row) -> int:
    """How many tokens of a row run again, at most one more than that."""
    return len(row.token_ids) - _start(row)


def _read_places(rows: Sequence[Row]) -> list[tuple[int, int, int]]:
    """Of every logit that is read, the row, the place in its text, and the token that follows there (−1: none)."""
    return [
        (number, place - 1, row.token_ids[place] if place < len(row.token_ids) else -1)
        for number, row in enumerate(rows)
        for place in range(row.target_start, max(len(row.token_ids), row.target_start + 1))
    ]

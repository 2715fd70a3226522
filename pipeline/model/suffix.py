"""Running only what a change at one token of one block can reach: the blocks from it up, the tokens from it on.

A change of the down-projection's output in block l at token s alters no block below l and no token before s.
So the tokens before s run once (their keys and values are kept), the blocks below l run once for the rest (what
enters block l is kept), and every further pass runs blocks l…L over tokens s…T only. Exact, for any decoder.

Shapes: B rows, P prefix tokens (padded on the left), S suffix tokens (padded on the right), D hidden, N positions
that are read, V vocabulary, O outputs of the down-projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.errors import UserError, one_line
from pipeline.model.activations import Activations, head_reads, target_logits, wide_logits
from pipeline.model.blocks import by_row
from pipeline.model.llm import LLM
from pipeline.requests.rows import Row, collate

TRIED = 8  # tokens
NEAR = 0.1  # of the logits' spread: what half precision may make of the same sums


class Suffixes:
    """Rows that have run once, and can run again from a block and their subjects' last tokens on.

    Block l is `layer` of a frozen model; token s is the last of each row's subject, and comes before its target.

    Attributes:
        batch: the rows from token s on.
        output_BO: what leaves the block's down-projection at token s.
        base_NV: the logits that predict the target tokens.
    """

    @torch.no_grad()
    def __init__(self, llm: LLM, layer: int, rows: Sequence[Row]) -> None:
        self.llm, self.layer, self.activations = llm, layer, Activations(llm)
        (self.down,) = llm.blocks[layer].down
        device = next(llm.model.parameters()).device
        starts = [row.span.stop - 1 for row in rows]
        suffixes = [Row(row.token_ids[at:], row.target_start - at) for row, at in zip(rows, starts, strict=True)]
        self.batch = collate(suffixes, llm.pad_token_id).to(device)
        self.start_B = torch.tensor(starts, device=device)
        self.mask_BP, self.prefix = self._prefix([row.token_ids[:at] for row, at in zip(rows, starts, strict=True)])
        block = llm.blocks[layer].name
        with self.activations.entering(block) as entering, self.activations.leaving(self.down) as leaving:
            self.base_NV = self._forward()
        self.enter_BSD = entering[block]
        self.output_BO = by_row(leaving[self.down], len(rows))[:, 0].clone()

    def _prefix(self, texts: Sequence[list[int]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run what stands before the suffixes, padded on the left; mask (B, P), each block's keys and values."""
        width = max(1, *map(len, texts))
        ids = [[self.llm.pad_token_id] * (width - len(text)) + text for text in texts]
        mask_BP = (torch.arange(width, device=self.start_B.device) >= (width - self.start_B)[:, None]).long()
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
        part.start_B, part.mask_BP, part.output_BO = self.start_B[rows], self.mask_BP[rows], self.output_BO[rows]
        part.prefix = [(keys[rows], values[rows]) for keys, values in self.prefix]
        part.enter_BSD = self.enter_BSD[rows, : part.batch.input_ids_BT.shape[1]]
        return part

    def run(self, change_BO: Tensor) -> Tensor:
        """Logits (N, V) when a change is added to the down-projection's output at each row's token s."""

        def add(_: Tensor, output_BSO: Tensor) -> Tensor:
            changed = output_BSO[:, :1] + change_BO[:, None].to(output_BSO.dtype)
            return torch.cat([changed, output_BSO[:, 1:]], dim=1)

        from_here = self.activations.from_block(self.layer, self.enter_BSD)
        with from_here, self.activations.changing(self.down, len(change_BO), add):
            return self._forward()

    def _forward(self) -> Tensor:
        ids_BS = self.batch.input_ids_BT
        position_BS = self.start_B[:, None] + torch.arange(ids_BS.shape[1], device=ids_BS.device)
        with head_reads(self.llm.model, self.batch.row_N, self.batch.position_N):
            return wide_logits(
                self.llm.model(
                    input_ids=ids_BS,
                    attention_mask=torch.cat([self.mask_BP, torch.ones_like(ids_BS)], dim=1),
                    position_ids=position_BS,
                    past_key_values=DynamicCache(self.prefix),
                    use_cache=True,
                )
            )


@torch.no_grad()
def check_parts(llm: LLM) -> None:
    """Try parts of the model on a few tokens: UserError unless they come to what the whole model does."""
    ids = [place % len(llm.embedding) for place in range(1, 1 + min(TRIED, llm.context_length or TRIED))]
    row, layer = Row(ids, len(ids) - 1, (1, 1)), len(llm.blocks) // 2
    batch, activations = collate([row]).to(llm.embedding.device), Activations(llm)
    what = f"model: {type(llm.model).__name__}: its blocks cannot be run by themselves"
    try:
        with llm.frozen():
            whole_NV = target_logits(llm.model, batch)
            with activations.from_block(layer, activations.enter(batch.input_ids_BT, layer)):
                upper_NV = target_logits(llm.model, batch)
            found = {"upper blocks": upper_NV, "a text's end": Suffixes(llm, layer, [row]).base_NV}
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(f"{what} ({type(error).__name__}: {one_line(error)})") from error
    for part, part_NV in found.items():
        if not torch.allclose(part_NV, whole_NV, rtol=0, atol=NEAR * whole_NV.std().item()):
            raise UserError(f"{what}: {part} come to other logits than the whole model")

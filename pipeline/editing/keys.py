"""Keys: what enters a block's down-projection at chosen tokens, read by running blocks up to that one only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from pipeline.editing.contexts import neighbours
from pipeline.model import LLM, build_trainer
from pipeline.model.blocks import by_row
from pipeline.model.targets import last_token, prompt_tokens
from pipeline.model.trainer import predict
from pipeline.model.upper import passing_through
from pipeline.options import TrainerOptions
from pipeline.requests import EditRequest, ListDataModule

READ_TOGETHER = 32  # rows
MOST_NEIGHBOURS = 1000  # prompts


class KeyRow(NamedTuple):
    """A text by its number, and the tokens whose keys are wanted: from `first` up to `end`."""

    number: int
    token_ids: list[int]
    first: int
    end: int


def read_keys(llm: LLM, layer: int, rows: Sequence[KeyRow], trainer: TrainerOptions) -> list[Tensor]:
    """Keys (end − first, I) of every row at block `layer`, in the rows' order, float32, on the CPU."""
    in_order = sorted(rows, key=lambda row: len(row.token_ids))
    data = ListDataModule((in_order, list, READ_TOGETHER))
    found = dict(predict(build_trainer(trainer, "Reading keys"), KeyReading(llm, layer), data))
    return [found[row.number] for row in rows]


def neighbour_moments(
    llm: LLM,
    layer: int,
    batches: Sequence[Sequence[EditRequest]],
    each: int,
    trainer: TrainerOptions,
    seed: int,
) -> Iterator[Tensor]:
    """E[k kᵀ] (I, I) of what is to stay near each batch: other names in its prompts, and all tokens after them."""
    texts = [neighbours(batch, each, MOST_NEIGHBOURS, seed) for batch in batches]
    flat = [placed for some in texts for placed in some]
    all_ids = prompt_tokens(llm, [text for text, _ in flat])
    rows = [
        KeyRow(number, ids, last_token(llm, text, end), len(ids))
        for number, ((text, end), ids) in enumerate(zip(flat, all_ids, strict=True))
    ]
    keys = iter(read_keys(llm, layer, rows, trainer))
    for some in texts:
        key_NI = torch.cat(list(islice(keys, len(some))))
        yield key_NI.T @ key_NI / len(key_NI)


class KeyReading(LightningModule):
    """Runs rows through the blocks up to one, and keeps what enters its down-projection."""

    def __init__(self, llm: LLM, layer: int) -> None:
        super().__init__()
        self.llm = llm
        self.model = llm.model
        self.layer = layer

    @torch.no_grad()
    def predict_step(self, rows: list[KeyRow], batch_idx: int = 0) -> list[tuple[int, Tensor]]:
        (down,) = self.llm.blocks[self.layer].down.values()
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])

        width = max(len(row.token_ids) for row in rows)
        padded = [row.token_ids + [self.llm.pad_token_id] * (width - len(row.token_ids)) for row in rows]
        handle = down.register_forward_pre_hook(keep)
        try:
            with passing_through(self.llm, self.layer + 1):
                self.model(input_ids=torch.tensor(padded, device=self.device), use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        return [
            (row.number, key_TI[row.first : row.end].float().cpu().clone())
            for row, key_TI in zip(rows, by_row(seen[0], len(rows)), strict=True)
        ]

"""Greedy generation from prompts alone, in length-sorted, left-padded batches under a Trainer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import GenerationConfig

from pipeline.errors import UserError
from pipeline.model.joining import Joining
from pipeline.model.llm import LLM
from pipeline.model.targets import check_length, prompt_tokens
from pipeline.model.trainer import build_trainer, predict
from pipeline.options import TrainerOptions
from pipeline.requests import ListDataModule

STATEMENT_END = re.compile(r"\n|[.!?](?=\s|$)")


@dataclass(frozen=True)
class PromptRow:
    """A prompt's tokens and its number among the prompts given."""

    token_ids: list[int]
    index: int


@dataclass
class PromptBatch:
    """Prompts padded on the left: token ids and mask (B, T), and the prompts' numbers."""

    input_ids_BT: Tensor
    mask_BT: Tensor
    indices: list[int]


def encode_prompts(
    llm: LLM, prompts: Sequence[str], max_new_tokens: int, joining: Joining | None = None
) -> list[PromptRow]:
    """Token ids of prompts, shortest first; UserError when one leaves no room in the context."""
    rows = [PromptRow(ids, number) for number, ids in enumerate(prompt_tokens(llm, prompts, joining))]
    for row in rows:
        if not row.token_ids or not prompts[row.index].strip():
            raise UserError(f"prompt {prompts[row.index]!r} becomes no token")
        check_length(llm, len(row.token_ids) + max_new_tokens, f"prompt {prompts[row.index][:60]!r}")
    return sorted(rows, key=lambda row: len(row.token_ids))


def collate_prompts(rows: Sequence[PromptRow], pad_token_id: int) -> PromptBatch:
    """Pad prompts on the left into one batch."""
    width = max(len(row.token_ids) for row in rows)
    ids = [[pad_token_id] * (width - len(row.token_ids)) + row.token_ids for row in rows]
    mask = [[0] * (width - len(row.token_ids)) + [1] * len(row.token_ids) for row in rows]
    return PromptBatch(torch.tensor(ids), torch.tensor(mask), [row.index for row in rows])


def greedy(llm: LLM, batch: PromptBatch, max_new_tokens: int) -> list[str]:
    """The model's greedy continuation of each prompt, up to its own end or `max_new_tokens`."""
    own = llm.model.generation_config
    end = own.eos_token_id if own else None
    # generate() fills what it is not told from the model's own settings (repetition penalties, ...): set them aside
    llm.model.generation_config = GenerationConfig(eos_token_id=llm.tokenizer.eos_token_id if end is None else end)
    try:
        tokens_BT = llm.model.generate(  # type: ignore[operator]
            batch.input_ids_BT,
            attention_mask=batch.mask_BT,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=llm.pad_token_id,
        )
    finally:
        llm.model.generation_config = own
    return llm.tokenizer.batch_decode(tokens_BT[:, batch.input_ids_BT.shape[1] :], skip_special_tokens=True)


class GreedyModule(LightningModule):
    """Wraps an LLM; each predict step returns (prompt number, generated text) pairs."""

    def __init__(self, llm: LLM, max_new_tokens: int) -> None:
        super().__init__()
        self.llm = llm
        self.model = llm.model
        self.max_new_tokens = max_new_tokens

    def predict_step(self, batch: PromptBatch) -> list[tuple[int, str]]:
        return list(zip(batch.indices, greedy(self.llm, batch, self.max_new_tokens), strict=True))


def generate(
    llm: LLM,
    prompts: Sequence[str],
    max_new_tokens: int = 16,
    batch_size: int = 16,
    trainer: TrainerOptions | None = None,
    title: str = "Generating",
    joining: Joining | None = None,
    kept: Path | None = None,
) -> list[str]:
    """Greedy continuations of prompts, in the prompts' order.

    Args:
        llm: the model; its weights stay as they are.
        prompts: texts, each continued from its end.
        max_new_tokens: the longest continuation; the model may end it earlier.
        batch_size: prompts that run together; it changes the speed alone.
        trainer: what it runs on.
        title: the stage's name on the progress bar.
        joining: puts prompts otherwise than the LLM does.
        kept: a file's name that stands for all of this; what an interrupted call has generated is kept under it,
            and not generated again.

    Raises:
        UserError: when a prompt and its answer do not fit the model's context.

    Example:
        >>> answers = generate(llm, ["The capital of Peru is"], 4, trainer=TrainerOptions(accelerator="cpu"))
        >>> len(answers)
        1
    """
    if not prompts:
        return []
    rows = encode_prompts(llm, prompts, max_new_tokens, joining)
    runner = build_trainer(trainer or TrainerOptions(), title)
    data = ListDataModule((rows, lambda part: collate_prompts(part, llm.pad_token_id), batch_size))
    with llm.frozen():
        texts = dict(predict(runner, GreedyModule(llm, max_new_tokens), data, kept))
    return [texts[index] for index in range(len(prompts))]


def first_statement(generated: str) -> str:
    """What a generation says before its first line or sentence ends: the model's own short answer."""
    return STATEMENT_END.split(generated.strip(), maxsplit=1)[0].strip()

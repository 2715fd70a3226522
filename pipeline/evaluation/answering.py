"""The model's own answers: greedy, from the prompt alone, until the statement ends, with the keys and values kept.

A row that has said its statement leaves the batch, so that the others go on faster. Shapes: B rows, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.requests.answers import statement
from pipeline.model import LLM
from pipeline.model.generation import PromptRow, collate_prompts
from pipeline.model.targets import head_reads_only


@dataclass(frozen=True)
class Question:
    """A prompt to go on from.

    Attributes:
        token_ids: its tokens.
        number: its number among the questions.
        limit: how many tokens may follow.
        inner_ends: ends of a statement that its answers hold; None: go on up to the limit.
    """

    token_ids: list[int]
    number: int
    limit: int
    inner_ends: int | None = 0


@dataclass  # Lightning moves batches to the device by setting their fields
class QuestionBatch:
    """Questions padded on the left: token ids and mask (B, T), and what else each is."""

    input_ids_BT: Tensor
    mask_BT: Tensor
    numbers: list[int]
    limits: list[int]
    inner_ends: list[int | None]


def collate_questions(questions: Sequence[Question], pad_token_id: int) -> QuestionBatch:
    """Pad questions on the left into one batch."""
    padded = collate_prompts([PromptRow(q.token_ids, q.number) for q in questions], pad_token_id)
    return QuestionBatch(
        padded.input_ids_BT,
        padded.mask_BT,
        [question.number for question in questions],
        [question.limit for question in questions],
        [question.inner_ends for question in questions],
    )


def answer(llm: LLM, batch: QuestionBatch) -> list[str]:
    """What the model says to each question: a statement, or a text of the limit's length."""
    ends = batch.inner_ends

    def is_over(row: int, tokens: list[int]) -> bool:
        inner = ends[row]
        if len(tokens) >= batch.limits[row]:
            return True
        return inner is not None and statement(decode(tokens), inner)[1]

    def decode(tokens: list[int]) -> str:
        return str(llm.tokenizer.decode(tokens, skip_special_tokens=True))

    said = continuations(llm, batch.input_ids_BT, batch.mask_BT, max(batch.limits), is_over)
    texts = [decode(tokens) for tokens in said]
    return [text if inner is None else statement(text, inner)[0] for text, inner in zip(texts, ends, strict=True)]


@torch.no_grad()
def continuations(
    llm: LLM, input_ids_BT: Tensor, mask_BT: Tensor, limit: int, is_over: Callable[[int, list[int]], bool]
) -> list[list[int]]:
    """Greedy continuations, each up to the model's own end, `limit` tokens, or where `is_over` says so.

    Args:
        llm: the model.
        input_ids_BT: prompts, padded on the left.
        mask_BT: 1 at their tokens.
        limit: the most new tokens.
        is_over: of a row and its new tokens, whether it needs no more.
    """
    model, closing = llm.model, closing_tokens(llm)
    counted = "position_ids" in inspect.signature(model.forward).parameters
    said: list[list[int]] = [[] for _ in input_ids_BT]
    live, cache, reading_BT = list(range(len(said))), None, input_ids_BT
    for _ in range(limit):
        width = reading_BT.shape[1]
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        rows_B = torch.arange(len(live), device=input_ids_BT.device)
        with head_reads_only(model, rows_B, torch.full_like(rows_B, width - 1)):
            output = model(
                input_ids=reading_BT,
                attention_mask=mask_BT,
                past_key_values=cache,
                use_cache=True,
                **({"position_ids": positions_BT} if counted else {}),
            )
        cache, next_B = output.past_key_values, output.logits.squeeze(0).argmax(-1)
        staying = []
        for place, (row, token) in enumerate(zip(live, next_B.tolist(), strict=True)):
            if token not in closing:
                said[row].append(token)
                if not is_over(row, said[row]):
                    staying.append(place)
        if not staying:
            break
        if len(staying) < len(live):
            kept = torch.tensor(staying, device=input_ids_BT.device)
            cache.batch_select_indices(kept)
            live, mask_BT, next_B = [live[place] for place in staying], mask_BT[kept], next_B[kept]
        reading_BT = next_B[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(live), 1)], dim=1)
    return said


def closing_tokens(llm: LLM) -> set[int]:
    """Tokens by which the model ends a text."""
    own = llm.model.generation_config
    tokens = own.eos_token_id if own else None
    return {tokens} if isinstance(tokens, int) else set(tokens or ())

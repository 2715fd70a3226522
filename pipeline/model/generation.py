"""Greedy generation from prompts alone, in batches of like length, padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pipeline.errors import UserError
from pipeline.model.llm import LLM
from pipeline.options.shared import TrainerOptions
from pipeline.requests.answers import first_statement, statement
from pipeline.requests.schema import EditRequest
from pipeline.requests.tokens import Joining
from pipeline.running.stage import Stage, run
from pipeline.running.trainer import Runtime


class Question(NamedTuple):
    """A prompt to go on from, until a statement's end, or by so many tokens at most."""

    token_ids: list[int]
    limit: int
    inner_ends: int | None = None  # ends that the answer looked for holds itself; None: the limit alone ends it


class QuestionBatch(NamedTuple):
    """Questions padded on the left: token ids and mask (B, T), and what else each is."""

    input_ids_BT: Tensor
    mask_BT: Tensor
    questions: list[Question]


class Saying(Stage):
    """Lets the model go on from each question, greedily: an output is a text."""

    def __init__(self, llm: LLM, title: str = "Generating") -> None:
        super().__init__(llm.model)
        self.llm, self.title = llm, title

    def collate(self, items: list[Question]) -> QuestionBatch:
        return QuestionBatch(*padded(self.llm, [one.token_ids for one in items]), list(items))

    def step(self, batch: QuestionBatch) -> list[str]:
        limit = max(question.limit for question in batch.questions)
        said_BS = go_on(self.llm, batch.input_ids_BT, batch.mask_BT, limit, SaidEnough(self.llm, batch, self.tell))
        limited = [row[: one.limit] for one, row in zip(batch.questions, said_BS, strict=True)]
        texts = self.llm.tokenizer.batch_decode(limited, skip_special_tokens=True)
        return [statement(said, one.inner_ends)[0] for one, said in zip(batch.questions, texts, strict=True)]


def padded(llm: LLM, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of token ids, padded on the left, and their mask (B, T)."""
    width = max(map(len, rows))
    ids = [[llm.pad_token_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def go_on(
    llm: LLM, ids_BT: Tensor, mask_BT: Tensor, limit: int, over: StoppingCriteria, *drawing: LogitsProcessor
) -> list[list[int]]:
    """What the model says after each row, greedily, up to `limit` tokens, or until `over` says so of every row.

    `drawing` may change the scores (B, V) of which the largest one is taken.
    """
    model, own = llm.model, llm.model.generation_config
    # generate() fills what it is not told from the model's own settings (repetition penalties, ...): not here
    model.generation_config = GenerationConfig(eos_token_id=llm.ends)
    try:
        tokens_BT = model.generate(  # type: ignore[operator]
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            pad_token_id=llm.pad_token_id,
            synced_gpus=False,  # devices that share weights keep step by KeepStep
            logits_processor=LogitsProcessorList(drawing),
            stopping_criteria=StoppingCriteriaList([over]),
        )
    finally:
        model.generation_config = own
    said_BS: list[list[int]] = tokens_BT[:, ids_BT.shape[1] :].tolist()
    return said_BS


class SaidEnough(StoppingCriteria):
    """Tells which rows of a batch need no more tokens; `tell` hears how many there are, of how many at most."""

    def __init__(self, llm: LLM, batch: QuestionBatch, tell: Callable[[int, int], None]) -> None:
        self.llm, self.questions, self.width = llm, batch.questions, batch.input_ids_BT.shape[1]
        self.tell, self.limit = tell, max(one.limit for one in batch.questions)
        self.over = [False] * len(batch.questions)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        said_BS = input_ids[:, self.width :]
        self.tell(said_BS.shape[1], self.limit)
        texts = self.llm.tokenizer.batch_decode(said_BS.tolist(), skip_special_tokens=True)
        for row, (one, said) in enumerate(zip(self.questions, texts, strict=True)):
            self.over[row] = self.over[row] or said_BS.shape[1] >= one.limit or statement(said, one.inner_ends)[1]
        return torch.tensor(self.over, device=input_ids.device)


def questions(
    llm: LLM, prompts: Sequence[str], max_new_tokens: int, joining: Joining | None = None
) -> list[Question]:
    """Prompts as questions without an end of their own; UserError when one leaves no room in the context."""
    found = []
    for prompt, ids in zip(prompts, llm.tokens.prompts(prompts, joining), strict=True):
        if not ids or not prompt.strip():
            raise UserError(f"prompt {prompt!r} becomes no token")
        llm.tokens.check_length(len(ids) + max_new_tokens, f"prompt {prompt[:60]!r}")
        found.append(Question(ids, max_new_tokens))
    return found


def generate(
    llm: LLM,
    prompts: Sequence[str],
    max_new_tokens: int = 16,
    batch_size: int = 16,
    trainer: TrainerOptions | Trainer | None = None,
    title: str = "Generating",
    joining: Joining | None = None,
    kept: Path | None = None,
) -> list[str]:
    """Greedy continuations of prompts, in the prompts' order.

    Args:
        max_new_tokens: the longest continuation; the model may end it earlier.
        batch_size: prompts that run together; it changes the speed alone.
        trainer, title: what it runs on (a Trainer, or options to make one of), and the progress bar's title.
        joining: puts prompts otherwise than the LLM does.
        kept: a folder whose name stands for all of this; what an interrupted call has generated is kept there, and
            not generated again.

    UserError when a prompt and its answer do not fit the model's context.

    Example:
        >>> answers = generate(llm, ["The capital of Peru is"], 4, trainer=TrainerOptions(accelerator="cpu"))
        >>> len(answers)
        1
    """
    asked = questions(llm, prompts, max_new_tokens, joining)
    runtime = Runtime(trainer or TrainerOptions())
    with llm.frozen():
        return run(Saying(llm, title), asked, runtime, lambda one: len(one.token_ids), batch_size, kept=kept)


def with_old_answers(
    llm: LLM, requests: Sequence[EditRequest], runtime: Runtime, always: bool = False
) -> list[EditRequest]:
    """The requests with old answers, their own or (`always`: all) the model's; UserError when that is none."""
    asked = [request for request in requests if always or request.old_answer is None]
    kept = runtime.work / "old-answers" if runtime.work else None
    prompts = [request.prompt for request in asked]
    texts = generate(llm, prompts, trainer=runtime.trainer, title="Old answers", kept=kept)
    old = {request.id: first_statement(text) for request, text in zip(asked, texts, strict=True)}
    silent = [request.id for request in asked if not old[request.id]]
    if silent:
        raise UserError(
            f"requests: {llm.name} gives no answer of its own to {', '.join(silent[:5])}; give old_answer"
        )
    return [r.model_copy(update={"old_answer": old[r.id]}) if r.id in old else r for r in requests]

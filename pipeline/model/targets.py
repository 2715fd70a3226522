"""Prompt and answer as tokens, and the model's logits at the answer's positions only.

Every stage that scores an answer (attribution, editing, evaluation) goes through this one path. Shapes:
B rows, T tokens, N target tokens of the whole batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.model.joining import Joining
from pipeline.model.llm import LLM

TOGETHER = 1024  # texts that are tokenized at once: what a tokenizer says of each takes kilobytes


@dataclass(frozen=True)
class TargetRow:
    """One text of which some tokens are scored.

    Attributes:
        token_ids: prompt and target.
        target_start: place of the first target token; at least 1.
        tag: whatever the caller wants back with the row's score.
    """

    token_ids: list[int]
    target_start: int
    tag: Any = None


@dataclass  # Lightning moves batches to the device by setting their fields
class TargetBatch:
    """Rows padded on the right: a causal model never looks there, so no mask is needed.

    Attributes:
        input_ids_BT: token ids.
        row_N: which row each target token belongs to.
        position_N: the position that predicts it, one before its own.
        target_N: the target tokens.
        tags: the rows' tags.
    """

    input_ids_BT: Tensor
    row_N: Tensor
    position_N: Tensor
    target_N: Tensor
    tags: list[Any]

    def row_means(self, values_N: Tensor) -> Tensor:
        """Mean of a value over each row's target tokens, shape (B,)."""
        return row_means(values_N, self.row_N, len(self.input_ids_BT))

    def losses(self, logits_NV: Tensor) -> Tensor:
        """ℓ(x, y) of every row under these logits: mean over its target tokens of −log p, in nats, shape (B,)."""
        return self.row_means(F.cross_entropy(logits_NV, self.target_N, reduction="none"))


def row_means(values_N: Tensor, row_N: Tensor, rows: int) -> Tensor:
    """Mean of the values of each of `rows` rows, shape (rows,), where `row_N` says which row a value belongs to."""
    sums = values_N.new_zeros(rows).index_add(0, row_N, values_N)
    return sums / torch.bincount(row_N, minlength=rows)


def encode(
    llm: LLM, pairs: Sequence[tuple[str, str]], tags: Sequence[Any] | None = None, what: str = "requests"
) -> list[TargetRow]:
    """Join prompts and answers (see `pipeline.model.joining`) and find the answers' tokens.

    The target begins where the joined text's tokens leave the prompt's own, so it is right with and without
    a BOS token, and for tokenizers that keep the space with the word or apart from it.

    Args:
        pairs: (prompt, answer) texts.
        tags: one a pair, kept in the rows.
        what: for messages: what the pairs are.

    Raises:
        UserError: when an answer becomes no token or unknown ones alone, or a text is longer than the context.
    """
    if not pairs:
        return []
    prompt_ids = prompt_tokens(llm, [prompt for prompt, _ in pairs])
    joined_ids = _token_ids(llm, [llm.joining.whole(*pair) for pair in pairs], llm.joining.special)
    rows = []
    for index, (before, ids) in enumerate(zip(prompt_ids, joined_ids, strict=True)):
        prompt, answer = pairs[index]
        if not before or not prompt.strip():
            raise UserError(f"{what}: prompt {prompt!r} becomes no token")
        start = max(1, _shared(before, ids))
        if not answer.strip() or start >= len(ids):
            raise UserError(f"{what}: answer {answer!r} to {prompt!r} becomes no token")
        if _is_unknown(llm, ids[start:]):
            raise UserError(f"{what}: answer {answer!r} to {prompt!r} is unknown to the tokenizer of {llm.name}")
        check_length(llm, len(ids), f"{what}: {prompt[:60]!r}")
        rows.append(TargetRow(ids, start, tags[index] if tags is not None else None))
    return rows


def _is_unknown(llm: LLM, ids: Sequence[int]) -> bool:
    """Whether nothing but blanks is left of tokens without the unknown one."""
    known = [token for token in ids if token != llm.tokenizer.unk_token_id]
    return len(known) < len(ids) and not str(llm.tokenizer.decode(known)).strip()


def tokenize(llm: LLM, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts that go on: with the tokenizer's opening tokens, without closing ones."""
    return _token_ids(llm, texts, special=True)


def prompt_tokens(llm: LLM, prompts: Sequence[str], joining: Joining | None = None) -> list[list[int]]:
    """Token ids of prompts as the model is given them: with `joining`'s text around, by default the LLM's."""
    joining = joining or llm.joining
    return _token_ids(llm, [joining.prompt(prompt) for prompt in prompts], joining.special)


def _token_ids(llm: LLM, texts: Sequence[str], special: bool) -> list[list[int]]:
    if not texts:
        return []
    found: list[list[int]] = []
    for start in range(0, len(texts), TOGETHER):
        found += llm.tokenizer(list(texts[start : start + TOGETHER]), add_special_tokens=special).input_ids
    closing = llm.closing_tokens if special else 0
    for text, ids in zip(texts, found, strict=True):
        if max(ids, default=0) >= llm.vocabulary:
            raise UserError(
                f"model: {llm.name} embeds {llm.vocabulary} tokens; its tokenizer gives {text[:60]!r} the token "
                f"{max(ids)}: they do not belong together"
            )
    return [ids[: len(ids) - closing] for ids in found]


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def check_length(llm: LLM, length: int, what: str) -> None:
    """Raise UserError when `length` tokens do not fit the model's context."""
    if llm.context_length is not None and length > llm.context_length:
        raise UserError(f"{what}: {length} tokens; the context of {llm.name} holds {llm.context_length}")


def collate_targets(rows: Sequence[TargetRow], pad_token_id: int = 0) -> TargetBatch:
    """Pad rows into one batch."""
    input_ids = nn.utils.rnn.pad_sequence(
        [torch.tensor(row.token_ids) for row in rows], batch_first=True, padding_value=pad_token_id
    )
    places = [(i, t) for i, row in enumerate(rows) for t in range(row.target_start, len(row.token_ids))]
    row_N, target_position_N = torch.tensor(places).T
    return TargetBatch(
        input_ids_BT=input_ids,
        row_N=row_N.contiguous(),
        position_N=target_position_N - 1,
        target_N=input_ids[row_N, target_position_N],
        tags=[row.tag for row in rows],
    )


@contextmanager
def head_reads_only(model: PreTrainedModel, row_N: Tensor, position_N: Tensor) -> Iterator[None]:
    """The language-model head sees only the named positions, as one row: logits come as (1, N, V).

    What a family does with its logits after the head (scaling, soft caps) still happens.
    """

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD, *rest = args
        return (hidden_BTD[row_N, position_N].unsqueeze(0), *rest)

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def target_logits(model: PreTrainedModel, batch: TargetBatch) -> Tensor:
    """Logits (N, V) that predict the target tokens, in float32 at least; no other position meets the vocabulary."""
    with head_reads_only(model, batch.row_N, batch.position_N):
        logits_NV = model(input_ids=batch.input_ids_BT, use_cache=False).logits.squeeze(0)
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def target_losses(model: PreTrainedModel, batch: TargetBatch) -> Tensor:
    """ℓ(x, y) of every row under the model, in nats, shape (B,): see `TargetBatch.losses`."""
    return batch.losses(target_logits(model, batch))


def last_token(llm: LLM, prompt: str, end: int, answer: str = "") -> int:
    """Place, among a prompt's tokens (with an answer's behind them), of the one that holds the prompt's `end`.

    Args:
        prompt: as the user gives it; its place in a chat template is known here.
        end: a place between two characters of the prompt, such as where its subject ends.
        answer: what follows, where the tokens of both are meant.
    """
    joining = llm.joining
    text = joining.whole(prompt, answer) if answer else joining.prompt(prompt)
    end = min(len(joining.head) + end, len(text))
    if llm.tokenizer.is_fast:
        spans = llm.tokenizer(text, add_special_tokens=joining.special, return_offsets_mapping=True).offset_mapping
        return max((place for place, (first, last) in enumerate(spans) if first < min(end, last)), default=0)
    upto, ids = _token_ids(llm, [text[:end], text], joining.special)
    shared = _shared(upto, ids)
    return max(0, shared - 1 if shared == len(upto) else shared)

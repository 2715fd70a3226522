"""How far next-token distributions moved: KL(base ‖ now), exact, from what the base's head read.

A distribution over the vocabulary is large, what the head makes it from is small: the hidden state. No edit changes
the head, so the base's hidden states, kept, give its distributions again beside those of the model as it is now.
Shapes: N scored positions, M of them compared, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.evaluation.rows import RowBatch

MOST_PROBES = 2000  # locality prompts whose next token is compared
EVERY = 8  # of ordinary text, one position in so many is compared


def compared_offsets(kind: str, targets: int) -> range:
    """Which of the scored tokens of a text of a kind stand for its next-token distributions."""
    return range(0, targets, EVERY) if kind == "text" else range(1)


@dataclass
class HeadSight:
    """What the head was given at the scored positions, (N, D)."""

    hidden_ND: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def head_reads_also(model: PreTrainedModel, hidden_MD: Tensor | None) -> Iterator[HeadSight]:
    """Notes the hidden states that reach the head as (1, N, D), and lets it read these M behind them."""
    sight = HeadSight()

    def join(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        sight.hidden_ND = args[0].squeeze(0)
        if hidden_MD is None:
            return None
        return (torch.cat([args[0], hidden_MD.to(args[0]).unsqueeze(0)], dim=1), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(join)
    try:
        yield sight
    finally:
        handle.remove()


def compared_places(batch: RowBatch, offsets: dict[int, range]) -> dict[int, list[int]]:
    """Places among the batch's scored positions of each text that is compared, by its number."""
    starts = torch.bincount(batch.span_N, minlength=len(batch.numbers)).cumsum(0).tolist()
    return {
        number: [start + offset for offset in offsets[number]]
        for number, start in zip(batch.numbers, [0, *starts], strict=False)
        if number in offsets
    }


def divergences(base_MV: Tensor, now_MV: Tensor) -> Tensor:
    """KL(base ‖ now) in nats from logits, shape (M,); never below nought, which only rounding could bring."""
    base_MV, now_MV = base_MV.log_softmax(-1), now_MV.log_softmax(-1)
    return (base_MV.exp() * (base_MV - now_MV)).sum(-1).clamp(min=0)

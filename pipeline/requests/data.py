"""Edit requests as an ordinary LightningDataModule: for any module, in any Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.requests.readers import load_requests
from pipeline.requests.rows import Batch, Row, collate
from pipeline.requests.schema import EditRequest
from pipeline.requests.tokens import Tokens


class EditRequests(LightningDataModule):
    """Requests in batches of tokens.

    For `fit`, a batch holds prompts with their new answers and what ends these, in an order drawn anew every epoch.
    For `predict` and `validate` it holds P requests' rows with their old answers, then the same with the new ones:
    what `GradientAttribution` watches.

    Args:
        source: a file (JSONL, JSON or CSV), `hf:NAME`, `demo`, or requests that are loaded already.
        chat: put prompts into the tokenizer's chat template.

    UserError in `setup`, for a source that cannot be read, or an answer that becomes no token; for `predict` also
    when a request has no old answer.

    Example:
        >>> data = EditRequests(requests, llm.tokenizer, batch_size=4)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader())).input_ids_BT.shape[0]
        4
    """

    def __init__(
        self,
        source: str | Path | Sequence[EditRequest],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 16,
        chat: bool = False,
    ) -> None:
        super().__init__()
        self.source, self.batch_size = source, batch_size
        self.tokens = Tokens(tokenizer, chat)
        self.requests: list[EditRequest] = []

    def setup(self, stage: str | None = None) -> None:
        """Read the requests, once."""
        if not self.requests:
            given = self.source
            self.requests = load_requests(given) if isinstance(given, str | Path) else list(given)

    def train_dataloader(self) -> DataLoader:
        pairs, ids = [(one.prompt, one.new_answer) for one in self.requests], [one.id for one in self.requests]
        return self._batches(self.tokens.rows(pairs, tags=ids, ended=True), collate, shuffle=True)

    def predict_dataloader(self) -> DataLoader:
        return self._batches(both_answers(self.tokens, self.requests), collate_sides)

    val_dataloader = predict_dataloader

    def _batches(self, items: list[Any], collate: Callable[..., Batch], shuffle: bool = False) -> DataLoader:
        pad = partial(collate, pad_token_id=self.tokens.pad_token_id)
        return DataLoader(items, batch_size=self.batch_size, shuffle=shuffle, collate_fn=pad)  # type: ignore[arg-type]


def both_answers(tokens: Tokens, requests: Sequence[EditRequest]) -> list[tuple[Row, Row]]:
    """Every request's prompt with its old and with its new answer; UserError when one has no old answer."""
    lacking = [request.id for request in requests if request.old_answer is None]
    if lacking:
        raise UserError(f"requests: {len(lacking)} have no old answer, such as {lacking[0]}; give old_answer")
    old = tokens.answered(requests, [request.old_answer or "" for request in requests])
    return list(zip(old, tokens.answered(requests), strict=True))


def collate_sides(items: Sequence[tuple[Row, ...]], pad_token_id: int = 0) -> Batch:
    """P requests' rows as one batch, side by side: the first answers' rows, then the second ones'."""
    return collate([row for side in zip(*items, strict=True) for row in side], pad_token_id)

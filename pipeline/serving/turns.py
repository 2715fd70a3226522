"""One model, many requests: those of one version are answered together, and versions take turns.

A single thread runs the model. What it runs is one `model.generate` for a batch of requests of one version, whose
tokens are told as they come. When others wait, it ends after a few tokens: rows that are not over then wait behind
them and go on later, by the same version. Weights are swapped between two such turns, so no answer is of two
versions. (transformers' continuous batching has one way to draw tokens, and one seed, for all requests.)
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from pipeline.errors import UserError
from pipeline.model.generation import go_on, padded
from pipeline.model.llm import LLM
from pipeline.running.stage import attempt
from pipeline.serving.asked import COLDEST, Asked
from pipeline.serving.live import LiveModel

TURN, SHARE = 16, 8  # tokens, when others wait: so many, or so large a share of the text that is read again
TOGETHER, MOST_TOKENS = 16, 1 << 15  # requests in a turn, and tokens with their padding
MOST_WAITING = 2000  # requests


class Heard(StoppingCriteria):
    """Gives each request of a batch its tokens, and tells which need no more, or that the turn is over."""

    def __init__(self, batch: Sequence[Asked], llm: LLM, over: Callable[[int], bool]) -> None:
        self.batch, self.tokenizer, self.turn_over, self.steps = batch, llm.tokenizer, over, 0
        self.ends = {*llm.ends} if isinstance(llm.ends, list) else {llm.ends}

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.steps += 1
        for one, token in zip(self.batch, input_ids[:, -1].tolist(), strict=True):
            if not one.over:
                one.take(token, self.tokenizer, self.ends)
        turn_over = self.turn_over(self.steps)
        return torch.tensor([turn_over or one.over for one in self.batch], device=input_ids.device)


class Drawing(LogitsProcessor):
    """Lets each request of a batch draw its next token by itself; the others take the likeliest one."""

    def __init__(self, batch: Sequence[Asked]) -> None:
        self.batch = batch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for one, scores_V in zip(self.batch, scores, strict=True):
            if one.temperature >= COLDEST and not one.over:
                scores_V[one.draw(scores_V)] = torch.inf
        return scores


def answer(llm: LLM, batch: Sequence[Asked], others_wait: Callable[[], bool] = lambda: False) -> None:
    """Answer requests together, each to its end, or for a turn when others wait."""
    ids_BT, mask_BT = padded(llm, [one.token_ids + one.said for one in batch])
    limit = max(one.limit - len(one.said) for one in batch)
    turn = max(TURN, ids_BT.shape[1] // SHARE)
    device, heard = llm.embedding.device, Heard(batch, llm, lambda steps: steps >= turn and others_wait())
    go_on(llm, ids_BT.to(device), mask_BT.to(device), limit, heard, Drawing(batch))


class Turns:
    """Answers requests with a live model, in a thread of its own; `close` ends it when all are answered."""

    def __init__(self, live: LiveModel) -> None:
        self.live, self.at_once = live, TOGETHER
        self._waiting: dict[int, deque[Asked]] = {}  # by version; the one whose turn it is comes first
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="turns", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait for a turn."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def add(self, asked: Asked) -> None:
        """Let a request wait for its turn; UserError when too many do."""
        if self.waiting >= MOST_WAITING:
            raise UserError(f"{MOST_WAITING} requests wait already; try again later")
        self._queue([asked])

    def _queue(self, asked: Sequence[Asked]) -> None:
        with self._changed:
            for one in asked:
                self._waiting.setdefault(one.version.number, deque()).append(one)
            self._changed.notify()

    def close(self) -> None:
        """Answer what waits, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _next(self) -> list[Asked] | None:
        """The requests whose turn it is, once there are any; None when all are answered and it is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return None
            version = next(iter(self._waiting))
            queue = self._waiting.pop(version)
            batch = self._fitting(queue)
            if queue:
                self._waiting[version] = queue  # behind the other versions
            return [one for one in batch if not one.over]

    def _fitting(self, queue: deque[Asked]) -> list[Asked]:
        """As many of a queue's first requests as are run together; one at least."""
        batch: list[Asked] = []
        widest = 0
        while queue and len(batch) < self.at_once:
            widest = max(widest, len(queue[0].token_ids) + queue[0].limit)
            if batch and widest * (len(batch) + 1) > MOST_TOKENS:
                break
            batch.append(queue.popleft())
        return batch

    @torch.no_grad()
    def _run(self) -> None:
        with self.live.running():
            while (batch := self._next()) is not None:
                if batch:
                    self._turn(batch)

    def _turn(self, batch: list[Asked]) -> None:
        """Answer a batch, or begin to; where the memory does not suffice, fewer are run together for a while."""
        try:
            with self.live.at(batch[0].version):
                suffices, why = attempt(partial(answer, self.live.llm, batch, lambda: bool(self._waiting)))
        except Exception:  # a fault must not end the server, nor be hidden
            traceback.print_exc()
            suffices, why = False, "the model failed; the server's log says more"
        if suffices:
            self.at_once = min(TOGETHER, self.at_once + 1)
        elif len(batch) > 1:
            self.at_once = len(batch) // 2
        else:
            batch[0].fail(str(why))
        self._queue([one for one in batch if not one.over])

"""Scoring a proxy set of any size: batch by batch under `Trainer.predict`, kept as it comes.

Batches are made once, and are what is dealt out to devices: a request shares its batch with the same others on one
device, on many, and after an interruption, so its scores are the same to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from numpy.typing import NDArray
from torch import Tensor

from pipeline.attribution.selector import Runtime, Values
from pipeline.errors import UserError
from pipeline.model import LLM, build_trainer
from pipeline.running.processes import from_first
from pipeline.model.trainer import check_shares, predict
from pipeline.requests import ListDataModule, in_batches

LITTLE = 1 << 24  # numbers: 64 MB of them in float32

Item = tuple[int, Any]  # a request's number, and what is run for it
Found = NDArray[np.void]  # records of number, seconds and scores


class ScoringModule(LightningModule):
    """Wraps an LLM; a predict step scores one batch of requests and keeps what it found.

    Args:
        llm: the model.

    Attributes:
        score_log: where found scores are appended.
    """

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm
        self.model = llm.model
        self.score_log = ScoreLog(None, len(llm.blocks))

    def collate(self, items: list[Any]) -> Any:
        """A batch of P requests' items, on the CPU."""
        raise NotImplementedError

    def scores(self, batch: Any) -> Tensor:
        """The P requests' scores of L blocks, (P, L)."""
        raise NotImplementedError

    @torch.enable_grad()
    def predict_step(self, numbered: tuple[list[int], Any]) -> list[Found]:
        """One item: the batch's records."""
        numbers, batch = numbered
        started = time.perf_counter()
        values_PL = self.scores(batch).double().cpu().numpy()
        found = self.score_log.records(numbers, values_PL, time.perf_counter() - started)
        self.score_log.append(found, self.global_rank)
        return [found]


class ScoreLog:
    """Scores as they come, appended to one file a process: a kill loses the batch at work, and nothing else.

    Args:
        folder: where the files lie; None: nothing is kept.
        blocks: how many scores a request has.
    """

    def __init__(self, folder: Path | None, blocks: int) -> None:
        self.folder = folder
        self.dtype = np.dtype([("number", "<i8"), ("seconds", "<f8"), ("scores", "<f8", (blocks,))])

    def records(self, numbers: Sequence[int], values_PL: Values, seconds: float) -> Found:
        """A batch's records, its time in equal shares."""
        found = np.empty(len(numbers), self.dtype)
        found["number"], found["seconds"], found["scores"] = numbers, seconds / len(numbers), values_PL
        return found

    def append(self, found: Found, rank: int) -> None:
        """Keep a batch's records; what a kill has cut off of an earlier one goes."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"scores-{rank}.records").open("ab") as file:
            file.truncate(file.tell() // self.dtype.itemsize * self.dtype.itemsize)
            file.write(found.tobytes())

    def read(self) -> Found:
        """What is kept, of all processes."""
        files = sorted(self.folder.glob("scores-*.records")) if self.folder else []
        whole = [file.stat().st_size // self.dtype.itemsize for file in files]
        parts = [np.fromfile(file, self.dtype, count) for file, count in zip(files, whole, strict=True)]
        return np.concatenate([np.empty(0, self.dtype), *parts])


def score_batches(
    module: ScoringModule,
    items: Sequence[Any],
    tokens: Callable[[Any], int],
    most: int,
    batch_size: int,
    runtime: Runtime,
    title: str,
    callbacks: Sequence[Callback] = (),
) -> Values:
    """Every request's scores, in the requests' order, (N, L); what the work folder holds is not scored again.

    Args:
        module: scores a batch.
        items: what is run for each request, one a request.
        tokens: how many an item takes, over all its rows.
        most: the most tokens in a batch, padding included.
        batch_size: the most requests in a batch.
        runtime: what it runs on, and where work is kept.
        title: the stage's name on the progress bar.
        callbacks: what watches the stage.

    Raises:
        UserError: when a device would get no request, or a score is not a number.
    """
    runner = build_trainer(runtime.trainer, title, callbacks=callbacks)
    check_shares(runner, len(items))
    together = min(batch_size, len(items) // runner.world_size)
    batches = in_batches(list(enumerate(items)), lambda item: tokens(item[1]), together, most)
    module.score_log = ScoreLog(runtime.work, len(module.llm.blocks))
    kept = from_first(module.score_log.read())
    done = set(kept["number"].tolist())
    left = [batch for batch in batches if not done.issuperset(number for number, _ in batch)]
    if left:

        def collate(part: list[list[Item]]) -> tuple[list[int], Any]:
            (batch,) = part
            return [number for number, _ in batch], module.collate([item for _, item in batch])

        with module.llm.frozen():
            kept = np.concatenate(
                [kept, *predict(runner, module, ListDataModule((left, collate, 1), in_step=True))]
            )
    values_NL = np.empty((len(items), len(module.llm.blocks)))
    values_NL[kept["number"]] = kept["scores"]
    return values_NL


def tokens_at_once(llm: LLM, kept: int) -> int:
    """How many tokens may run together so that what is kept of them takes at most half of the weights' memory.

    Of small models more than that is allowed: what is kept of a pass may always be `LITTLE` numbers.

    Args:
        llm: the model.
        kept: numbers that are kept of a token in each block.
    """
    weights = sum(parameter.numel() for parameter in llm.model.parameters())
    return max(weights // 2, LITTLE) // (kept * len(llm.blocks))


def check_finite(values_NL: Values, ids: Sequence[str]) -> None:
    """Raise UserError, naming the requests, when a score is not a number."""
    broken = [ids[number] for number in np.flatnonzero(~np.isfinite(values_NL).all(1)).tolist()]
    if broken:
        raise UserError(
            f"attribution: scores of {len(broken)} of {len(ids)} requests are not numbers: {', '.join(broken[:5])}"
        )

"""`python -m pipeline.benchmarks.watched FOLDER COMMAND …`: runs a command, and writes down what its processes do.

Every process, those that Lightning starts included, leaves `FOLDER/rank-N.json`: by the name of what ran, when its
first step began and its last one ended, how many steps there were, and the bytes of gradients and of other tensors
that were handed to other processes. Gradients are counted where DistributedDataParallel sends them, in a hook that
it calls with each buffer, and other tensors as they go through torch.distributed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline import cli
from pipeline.model import trainer as trainers

SENDING = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")


@dataclass
class Watched:
    """What one process did in one stage: seconds since 1970, steps, bytes."""

    began: float = 0.0
    ended: float = 0.0
    steps: int = 0
    gradients: int = 0
    others: int = 0


class Watch(Callback):
    """Writes down what each stage's steps do, by the class of the stage's module."""

    def __init__(self) -> None:
        self.stages: dict[str, Watched] = {}
        self.now: Watched | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.now = self.stages.setdefault(type(pl_module).__name__, Watched())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = trainer.strategy.model
        if isinstance(model, DistributedDataParallel):  # which takes no method whose annotations are texts
            model.register_comm_hook(None, lambda state, bucket: self._send_gradients(state, bucket))

    def on_train_batch_start(self, *_: Any) -> None:
        self._begin()

    def on_predict_batch_start(self, *_: Any) -> None:
        self._begin()

    def on_train_batch_end(self, *_: Any) -> None:
        self._end()

    def on_predict_batch_end(self, *_: Any) -> None:
        self._end()

    def teardown(self, *_: Any, **__: Any) -> None:
        self.now = None

    def _begin(self) -> None:
        if self.now and not self.now.began:
            self.now.began = time.time()

    def _end(self) -> None:
        if self.now:
            self.now.steps += 1
            self.now.ended = time.time()

    def _send_gradients(self, state: Any, bucket: Any) -> Any:
        now, self.now = self.now, None  # the hook sends by all_reduce, which is not to count once more
        if now:
            now.gradients += bucket.buffer().nbytes
        sent = allreduce_hook(state, bucket)
        self.now = now
        return sent

    def counting(self, send: Callable[..., Any], place: int) -> Callable[..., Any]:
        """A collective of torch.distributed that also counts the bytes which this process puts in."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            given = args[place] if len(args) > place else None
            if self.now and self.now.began and isinstance(given, torch.Tensor):
                self.now.others += given.nbytes
            return send(*args, **kwargs)

        return counted


def main(folder: Path, words: list[str]) -> int:
    """Run a command, watched."""
    watch = Watch()
    for name in SENDING:
        place = 0 if name in ("all_reduce", "broadcast") else 1  # others are given what comes out first
        setattr(torch.distributed, name, watch.counting(getattr(torch.distributed, name), place))

    def watched(*args: Any, callbacks: list[Callback], **settings: Any) -> Trainer:
        return Trainer(*args, callbacks=[*callbacks, watch], **settings)

    trainers.Trainer = watched  # type: ignore[misc, assignment]
    code = cli.main(words)
    file = folder / f"rank-{os.environ.get('LOCAL_RANK', '0')}.json"
    file.write_text(json.dumps({name: asdict(one) for name, one in watch.stages.items()}), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))

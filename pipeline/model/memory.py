"""Out of memory: a batch that was too large is run in halves, and so are the batches after it."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from pipeline.errors import UserError
from pipeline.model.batch_log import BatchLog
from pipeline.requests import ListDataModule

WORDS = ("out of memory", "not enough memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
INSTEAD = (
    "with one at a time already; give --trainer.precision bf16-true, spread the model over devices "
    "(--trainer.strategy fsdp), or take shorter texts or a smaller model"
)
BATCHES = "devices that share a model's weights cannot repeat a step alone; lower the stage's batch_size"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory, a GPU's or the host's, did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def free_memory() -> None:
    """Let go what an attempt that failed has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether the memory sufficed for some work, and what it gives; what it held is free again if not."""
    try:
        return True, work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = " ".join(str(error).split())
    free_memory()  # outside of the `except`: the error holds on to the frames that it went through
    return False, failed


class Halving:
    """Runs a module's predict steps, in halves where the memory does not suffice for a batch.

    Args:
        trainer: runs the module.
        module: its steps return lists.
        data: where its batches come from.
        alone: whether a device may repeat a step by itself.
        log: where each batch's outputs are kept.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, data: ListDataModule, alone: bool, log: BatchLog | None
    ) -> None:
        self.trainer, self.module, self.data, self.alone, self.log = trainer, module, data, alone, log
        self.run = module.predict_step
        self.named = set(inspect.signature(self.run).parameters)

    @property
    def parts(self) -> int:
        """In how many parts the module runs a batch: batches are alike, so what was too much once will be again."""
        return vars(self.module).get("parts", 1)

    def step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[Any]:
        """A batch's outputs, as the module's own step gives them; none of a copy, run for other devices' sake."""
        number, items, is_copy = self.data.dealt[dataloader_idx][batch_idx]
        if is_copy and not self.data.in_step:
            return []
        places = {"batch_idx": batch_idx, "dataloader_idx": dataloader_idx}
        places = {name: place for name, place in places.items() if name in self.named}
        left = [(part, self.parts) for part in parted(items, self.parts)]
        outputs = []
        while left:
            part, parts = left[0]
            formed = batch if parts == 1 else self._formed(part, dataloader_idx)
            suffices, found = attempt(partial(self.run, formed, **places))
            if suffices:
                outputs += found
                left.pop(0)
                continue
            halves = parted(part, 2)
            if len(halves) == 1 or not self.alone:
                raise UserError(f"trainer: {found}; {INSTEAD if self.alone else BATCHES}")
            left[:1] = [(half, 2 * parts) for half in halves]
            self.module.parts = max(self.parts, 2 * parts)  # type: ignore[assignment]
        if is_copy:
            return []
        if self.log:
            self.log.append((dataloader_idx, number), outputs)
        return outputs

    def _formed(self, items: list[Any], stream: int) -> Any:
        """A batch as Lightning would hand it to a step."""
        batch = self.trainer.precision_plugin.convert_input(self.data.streams[stream][1](items))
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=stream)


def parted(items: list[Any], parts: int) -> list[list[Any]]:
    """Items in so many parts of like size, or as many as there are items; of a batch formed before, its items."""
    if len(items) == 1 and isinstance(items[0], list):
        return [[part] for part in parted(items[0], parts)]
    size = -(-len(items) // parts)
    return [items[at : at + size] for at in range(0, len(items), size)]


@contextmanager
def in_halves(
    trainer: Trainer, module: LightningModule, data: ListDataModule, alone: bool, log: BatchLog | None
) -> Iterator[None]:
    """Inside the `with`, the module's predict steps are those of `Halving`."""
    module.predict_step = Halving(trainer, module, data, alone, log).step  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.predict_step  # the class's own is there again

"""A stage of the pipeline: items in, an output for each, under `Trainer.predict`."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from pipeline.errors import DeviceError, one_line
from pipeline.running.kept import Kept
from pipeline.running.processes import from_first, of_all
from pipeline.running.progress import StageProgressBar
from pipeline.running.sharding import is_sharded
from pipeline.running.trainer import Loggers, Runtime, trainer_of

MEMORY_WORDS = ("out of memory", "not enough memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
INSTEAD = (
    "with one at a time already; give trainer.precision bf16-true, spread the model over devices "
    "(trainer.strategy fsdp2), or take shorter texts or a smaller model"
)
SHARED = "devices that share a model's weights cannot repeat a step alone; give a smaller expert.batch_size"


class Items:
    """Some of a stage's items with their numbers: what one predict step is given; `again` where another device
    runs them as well, and they count there. No collection, so that Lightning leaves it on the CPU."""

    def __init__(self, numbers: Sequence[int], items: Sequence[Any], again: bool = False) -> None:
        self.numbers, self.items, self.again = list(numbers), list(items), again

    def __len__(self) -> int:
        return len(self.numbers)

    def parts(self, size: int) -> list[Items]:
        """The same in parts of at most `size` items."""
        starts = range(0, len(self), size)
        return [Items(self.numbers[at : at + size], self.items[at : at + size], self.again) for at in starts]


class Staying(LightningModule):
    """A module whose model stays on its device when a stage is over, for the next one to find it there."""

    def cpu(self) -> Self:
        """Nothing: Lightning ends each run with it, which would take gigabytes off the device and back."""
        return self


class Stage(Staying):
    """Base class of all stages that run items through a model, which stays as it is, and give an output for each.

    A subclass says how items become a batch and what is done with it; nothing else. Where the memory does not
    suffice for a batch it is run in halves, and so are the batches after it.
    """

    title = "Reading"  # on the progress bar
    gradients = False  # whether a step differentiates

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.again = False  # whether the batch at work counts elsewhere: a step that sums leaves it out
        self.at_once: int | None = None  # the most items that the memory suffices for, once that is known

    def collate(self, items: list[Any]) -> Any:
        """Items as one batch, on the CPU."""
        raise NotImplementedError

    def step(self, batch: Any) -> Sequence[Any]:
        """An output for each item of a batch, in their order, on the CPU."""
        raise NotImplementedError

    def tell(self, step: int, steps: int) -> None:
        """Show to which step of at most so many the batch at work has come."""
        if self._trainer and isinstance(bar := self.trainer.progress_bar_callback, StageProgressBar):
            bar.within(step, steps)

    def predict_step(self, batch: Items) -> dict[int, Any]:
        """Outputs by the items' numbers."""
        outputs: dict[int, Any] = {}
        self.again = batch.again
        left = batch.parts(self.at_once or len(batch))
        while left:
            suffices, found = attempt(partial(self._run, left[0]))
            if suffices:
                outputs |= found
                left.pop(0)
                continue
            if len(left[0]) == 1 or is_sharded(self.model):
                raise DeviceError(f"trainer: {found}; {INSTEAD if len(left[0]) == 1 else SHARED}")
            self.at_once = -(-len(left[0]) // 2)
            left = [half for part in left for half in part.parts(self.at_once)]
        return outputs

    def _run(self, part: Items) -> dict[int, Any]:
        with torch.set_grad_enabled(self.gradients):
            found = self.step(move_data_to_device(self.collate(part.items), self.device))
        return dict(zip(part.numbers, found, strict=True))


class Batches(LightningDataModule):
    """Batches that were formed beforehand, each dealt to one device whole, so that they are the same on any number.

    With `in_step` all devices run as many batches: some run one a second time, to no effect.
    """

    def __init__(self, batches: Sequence[Items], in_step: bool = False) -> None:
        super().__init__()
        self.batches, self.in_step = batches, in_step

    def predict_dataloader(self) -> DataLoader:
        """Batches one by one."""
        rank, devices = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        dealt = Dealt(self.batches, rank, devices, self.in_step)
        last = self.batches[-1]
        batches = [*self.batches, Items(last.numbers, last.items, again=True)]
        return DataLoader(batches, sampler=dealt, collate_fn=lambda one: one[0])  # type: ignore[arg-type]


class Dealt(DistributedSampler):
    """Every batch once, the devices taking turns, then one more: each has one at least, as Lightning asks."""

    def __init__(self, batches: Sequence[Items], rank: int, devices: int, in_step: bool) -> None:
        super().__init__(batches, num_replicas=devices, rank=rank, shuffle=False)  # type: ignore[arg-type]
        short = -len(batches) % devices if in_step else max(0, devices - len(batches))
        self.own = [*range(len(batches)), *[len(batches)] * short][rank::devices]

    def __iter__(self) -> Iterator[int]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


def run(
    stage: Stage,
    items: Sequence[Any],
    runtime: Runtime | None = None,
    tokens: Callable[[Any], int] = lambda _: 1,
    batch_size: int = 16,
    most_tokens: int | None = None,
    kept: str | Path | None = None,
    in_step: bool = False,
    callbacks: Sequence[Callback] = (),
    logger: Loggers = False,
) -> list[Any]:
    """The outputs of every item, in the items' order, whole in every process.

    Args:
        runtime: where its work folder holds outputs under `kept`, those are not run again.
        tokens: an item's size: items of like size share a batch.
        batch_size, most_tokens: the most items, and tokens, in a batch, padding counted; None: any number.
        kept: the name in the work folder, or the folder itself, under which outputs are kept as they come.
        in_step: let all devices run as many batches, as a backward pass through spread weights needs.

    UserError when the memory does not suffice for one item.
    """
    runtime = runtime or Runtime()
    folder = kept if isinstance(kept, Path) else runtime.work / kept if runtime.work and kept else None
    keeping = Kept(folder) if folder else None
    done: dict[int, Any] = from_first(keeping.read() if keeping else {})
    numbers = [number for number in range(len(items)) if number not in done]
    if numbers:
        left = Items(numbers, [items[number] for number in numbers])
        watching = [*callbacks, *([keeping] if keeping else [])]
        with trainer_of(runtime, stage.title, watching, logger=logger) as trainer:
            most = min(batch_size, max(1, len(left) // trainer.world_size))  # an item for each device, if possible
            batches = in_batches(left, tokens, most, most_tokens)
            outputs = trainer.predict(stage, datamodule=Batches(batches, in_step)) or []
        for part in of_all(ChainMap(*outputs)):
            done |= part
    return [done[number] for number in range(len(items))]


def run_here(
    stage: Stage, items: Sequence[Any], tokens: Callable[[Any], int] = lambda _: 1, batch_size: int = 16
) -> list[Any]:
    """The same by this thread alone, where the model is, without a Trainer: for who runs few items, and often."""
    stage.to(next(stage.model.parameters()).device)
    batches = in_batches(Items(range(len(items)), items), tokens, batch_size)
    done = ChainMap(*map(stage.predict_step, batches))
    return [done[number] for number in range(len(items))]


def in_batches(left: Items, tokens: Callable[[Any], int], most: int, most_tokens: int | None = None) -> list[Items]:
    """Items by falling size, in batches of at most `most` items and `most_tokens` tokens with padding.

    The largest batch comes first, so that one too large for the memory is known at once.
    """
    sized = sorted(zip(left.numbers, left.items, map(tokens, left.items), strict=True), key=lambda one: -one[2])
    batches: list[Items] = []
    widest = 0
    for number, item, size in sized:
        full = not batches or len(batches[-1]) >= most
        if full or (most_tokens is not None and (len(batches[-1]) + 1) * widest > most_tokens):
            batches.append(Items([], []))
            widest = size
        batches[-1].numbers.append(number)
        batches[-1].items.append(item)
    return batches


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory, a GPU's or the host's, did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in MEMORY_WORDS)


def attempt(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether the memory sufficed for some work, and what it gives, or why not; then what it held is free again."""
    try:
        return True, work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = one_line(error)
    garbage_collection_cuda()  # outside of the `except`: the error holds on to the frames that it went through
    return False, failed

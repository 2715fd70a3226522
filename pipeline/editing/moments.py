"""The second moment of what ordinary text sends into projections, summed up over windows, batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn
from torchmetrics import Metric

from pipeline.files import write_shared
from pipeline.model import LLM, TargetRow, build_trainer, sizes
from pipeline.model.trainer import predict
from pipeline.model.upper import passing_through
from pipeline.options import TrainerOptions
from pipeline.pace import Pace
from pipeline.requests import ListDataModule

READ_TOGETHER = 8  # windows


class SecondMoment(Metric):
    """Sums k kᵀ and counts k, over any number of processes."""

    full_state_update = False

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.total: Tensor
        self.count: Tensor
        self.add_state("total", torch.zeros(inputs, inputs, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, key_BTI: Tensor) -> None:
        """Count every position's key."""
        key_NI = key_BTI.flatten(0, -2).to(torch.promote_types(key_BTI.dtype, torch.float32))
        self.total += (key_NI.T @ key_NI).double()
        self.count += len(key_NI)

    def compute(self) -> Tensor:
        """The mean, shape (I, I), float32."""
        return (self.total / self.count).float()


class KeyMoments(LightningModule):
    """Runs the model up to the last of some projections and sums the second moments of what enters each.

    Args:
        llm: the model.
        names: full names of projections.
        progress: a file that takes the sums now and then; one process goes on from what it finds there.
    """

    def __init__(self, llm: LLM, names: Sequence[str], progress: Path) -> None:
        super().__init__()
        self.llm = llm
        self.model = llm.model
        self.names = list(names)
        self.progress = progress
        self.pace = Pace()
        self.above = 1 + max(b.index for b in llm.blocks if any(name.startswith(f"{b.name}.") for name in names))
        found = {
            name: projection for block in llm.blocks for name, projection in block.projections("block").items()
        }
        self.inputs = [sizes(found[name])[0] for name in names]
        self.sums = nn.ModuleList(SecondMoment(inputs) for inputs in self.inputs)
        self.done = 0  # batches, before this run and in it
        self.moments: dict[str, Tensor] = {}

    def read(self, windows: Sequence[TargetRow], trainer: TrainerOptions) -> dict[str, Tensor]:
        """The moments over windows of text, by name."""
        runner = build_trainer(trainer, "Key statistics")
        data = ListDataModule((windows, _collate, READ_TOGETHER))
        if runner.world_size == 1:
            self._go_on()
            data.done = {(0, number) for number in range(self.done)}
        with self.llm.frozen():
            predict(runner, self, data)
        return self.moments or self._computed()

    def predict_step(self, input_ids_BT: Tensor) -> list[Tensor]:
        seen: dict[str, Tensor] = {}  # summed when the pass is over: one that fails counts nothing

        def keep(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        with ExitStack() as hooks:
            for name in self.names:
                projection = self.model.get_submodule(name)
                hooks.callback(projection.register_forward_pre_hook(partial(keep, name)).remove)
            hooks.enter_context(passing_through(self.llm, self.above))
            self.model(input_ids=input_ids_BT, use_cache=False, logits_to_keep=1)
        for name, sums in zip(self.names, self._sums(), strict=True):
            sums.update(seen[name])
        return []

    def on_predict_batch_end(self, *_: Any) -> None:
        self.done += 1
        if self.trainer.world_size == 1 and self.pace.is_due():
            with self.pace.keeping():
                self._keep()

    def on_predict_end(self) -> None:
        self.moments = self._computed()

    def _keep(self) -> None:
        """Write the sums, and of how many batches they are."""
        tensors = {f"{name}.{part}": getattr(sums, part).cpu() for name, sums, part in self._parts()}
        content = tensors_to_bytes(tensors, {"done": str(self.done)})
        with suppress(OSError):  # a full disk costs an interrupted command time, and this one nothing
            write_shared(self.progress, lambda partial: partial.write_bytes(content))

    def _go_on(self) -> None:
        """From sums that are kept, where there are any and they are whole."""
        try:
            with safe_open(self.progress, "pt") as opened:
                self.done = int(opened.metadata()["done"])
                for name, sums, part in self._parts():
                    setattr(sums, part, opened.get_tensor(f"{name}.{part}"))
        except (OSError, SafetensorError, KeyError, TypeError):
            self.done = 0
            for sums in self._sums():
                sums.reset()

    def _parts(self) -> list[tuple[str, SecondMoment, str]]:
        own = zip(self.names, self._sums(), strict=True)
        return [(name, sums, part) for name, sums in own for part in ("total", "count")]

    def _computed(self) -> dict[str, Tensor]:
        return {name: sums.compute().cpu() for name, sums in zip(self.names, self._sums(), strict=True)}

    def _sums(self) -> list[SecondMoment]:
        return [sums for sums in self.sums if isinstance(sums, SecondMoment)]


def _collate(rows: Sequence[TargetRow]) -> Tensor:
    return torch.tensor([row.token_ids for row in rows])

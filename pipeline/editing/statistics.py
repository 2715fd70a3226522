"""Key statistics: the second moment of what ordinary text sends into a projection, found once and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, distributed

from pipeline.editing.ordinary_text import lines, own_text, windows
from pipeline.errors import UserError
from pipeline.files import cache_folder, digest, write_shared
from pipeline.model.activations import Activations
from pipeline.model.blocks import sizes
from pipeline.model.llm import LLM
from pipeline.options.editing import StatisticsOptions
from pipeline.running.processes import of_all, world_size
from pipeline.running.stage import Stage, run
from pipeline.running.trainer import Runtime, own_precision

READ_TOGETHER = 8  # windows


def key_moments(
    llm: LLM, names: Sequence[str], options: StatisticsOptions, runtime: Runtime | None = None
) -> dict[str, Tensor]:
    """C = E[k kᵀ] of the keys that enter projections over ordinary text, each (I, I), float32, by name.

    What is found is kept in the user's cache folder. A file is named by the model's fingerprint, the projection and
    the text, so that nothing of another model can be taken for it; one that is damaged is written anew.

    Args:
        llm: the model.
        names: full names of projections.
        options: which text, and how much of it.
        runtime: what it runs with.

    Raises:
        UserError: when the text cannot be read or is too short for the keys' dimension.
    """
    runtime, text = runtime or Runtime(), lines(Path(options.text)) if options.text else None
    about = llm.fingerprint, options.tokens, text or "the model's own text"
    files = {name: cache_folder(None) / f"moment-{digest(name, *about)}.safetensors" for name in names}
    found = {name: moment for name, file in files.items() if (moment := _read(file)) is not None}
    missing = sorted({name for lacking in of_all(files.keys() - found.keys()) for name in lacking})
    if missing:
        read = windows(llm, own_text(llm, options.tokens, runtime) if text is None else text, options.tokens)
        _check_size(llm, missing, sum(map(len, read)), options)
        stage = KeyMoments(llm, missing)
        with llm.frozen():
            run(stage, read, runtime, batch_size=READ_TOGETHER)
        for name, moment in stage.moments().items():
            found[name] = moment
            _write(files[name], moment)
    return found


def _check_size(llm: LLM, names: Sequence[str], tokens: int, options: StatisticsOptions) -> None:
    """Raise UserError for fewer tokens than twice a key's dimension."""
    inputs = max(sizes(llm.model.get_submodule(name))[0] for name in names)  # type: ignore[arg-type]
    if tokens < 2 * inputs:
        raise UserError(
            f"statistics.tokens: {options.tokens} of {options.text or 'the text that the model writes'} come to "
            f"{tokens} tokens; statistics of {inputs} inputs need at least {2 * inputs}"
        )


def _read(file: Path) -> Tensor | None:
    try:
        return load_file(file)["moment"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


@rank_zero_only
def _write(file: Path, moment: Tensor) -> None:
    write_shared(file, lambda partial: partial.write_bytes(save({"moment": moment})))


class KeyMoments(Stage):
    """Sums k kᵀ of what enters each of some projections, over all positions of windows of text; nothing is put out.

    Args:
        llm: the model, of which the blocks up to the last of these projections run.
        names: full names of projections.
    """

    title = "Key statistics"

    def __init__(self, llm: LLM, names: Sequence[str]) -> None:
        super().__init__(llm.model)
        self.activations, self.names = Activations(llm), list(names)
        self.above = 1 + max(b.index for b in llm.blocks if any(name.startswith(f"{b.name}.") for name in names))
        self.sums: dict[str, Tensor] = {}  # float64: no buffers, which Lightning would cast with the weights
        self.count = 0

    def collate(self, items: list[list[int]]) -> Tensor:
        return torch.tensor(items)

    def step(self, batch: Tensor) -> list[None]:
        with self.activations.up_to_block(self.above), self.activations.entering(*self.names) as seen:
            self.activations.run(batch)
        counts = 0 if self.again else 1
        for name, key_BTI in seen.items():  # summed when the pass is over: one that fails counts nothing
            key_NI = key_BTI.flatten(0, -2).to(torch.promote_types(key_BTI.dtype, torch.float32))
            with own_precision(key_NI.device):
                total_II = counts * (key_NI.T @ key_NI).double()
            self.sums[name] = self.sums[name] + total_II if name in self.sums else total_II
        self.count += counts * batch.numel()
        return [None] * len(batch)

    def moments(self) -> dict[str, Tensor]:
        """The means over all processes' positions, by name, on the CPU; the sums are let go."""
        found, count = {}, sum(of_all(self.count))
        for name in self.names:
            total_II = self.sums.pop(name)
            if world_size() > 1:
                distributed.all_reduce(total_II)
            found[name] = (total_II / count).float().cpu()
        return found

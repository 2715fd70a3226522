"""Key statistics: the second moment of what ordinary text sends into a projection, found once and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, distributed

from pipeline.editing.ordinary_text import digest, windows
from pipeline.errors import UserError
from pipeline.files import cache_folder, write_shared
from pipeline.model.activations import Activations
from pipeline.model.blocks import sizes
from pipeline.model.llm import LLM
from pipeline.options.editing import StatisticsOptions
from pipeline.running.processes import of_all, world_size
from pipeline.running.stage import Stage, run
from pipeline.running.trainer import Runtime

READ_TOGETHER = 8  # windows


def key_moments(
    llm: LLM, names: Sequence[str], options: StatisticsOptions, runtime: Runtime | None = None
) -> dict[str, Tensor]:
    """C = E[k kᵀ] of the keys that enter projections over ordinary text, each (I, I), float32, by name.

    What is found is kept in the user's cache folder. A file is named by the model's fingerprint, the projection and
    the text, so that nothing of another model can be taken for it.

    Args:
        llm: the model.
        names: full names of projections.
        options: which text, and how much of it.
        runtime: what it runs with.

    Raises:
        UserError: when the text cannot be read or is too short for the keys' dimension.
    """
    text, runtime = options.text, runtime or Runtime()
    if text and not Path(text).is_file():  # before what is kept is looked up by its content
        raise UserError(f"statistics.text: {text}: no such file; expected plain UTF-8 text")
    source = Path(text).read_bytes() if text else b"the model's own text"
    folder = cache_folder(None)
    files = {name: folder / f"moment-{digest(llm, name, options.tokens, source)}.safetensors" for name in names}
    lacking = of_all([name for name in names if not files[name].is_file()])
    missing = [name for name in names if any(name in each for each in lacking)]
    found = {name: _read(file, llm, name) for name, file in files.items() if name not in missing}
    if not missing:
        return found
    moments = _find(llm, missing, options, runtime)
    for name, moment in moments.items():
        _write(files[name], {"moment": moment}, {"fingerprint": llm.fingerprint, "projection": name})
    return found | moments


def _find(llm: LLM, names: Sequence[str], options: StatisticsOptions, runtime: Runtime) -> dict[str, Tensor]:
    """The moments, read now."""
    stage = KeyMoments(llm, names)
    needed = 2 * max(sizes(llm.model.get_submodule(name))[0] for name in names)  # type: ignore[arg-type]
    if options.tokens < needed:
        raise UserError(
            f"statistics.tokens: {options.tokens} is too few; statistics of {needed // 2} inputs need at least "
            f"{needed}"
        )
    text = windows(llm, options, runtime)
    tokens = sum(len(window) for window in text)
    if tokens < needed:
        raise UserError(
            f"statistics.text: {options.text or 'the model itself'} gives {tokens} tokens; statistics of "
            f"{needed // 2} inputs need at least {needed}"
        )
    with llm.frozen():
        run(stage, text, runtime, batch_size=READ_TOGETHER)
    return stage.moments()


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
        for name, key_BTI in seen.items():  # summed when the pass is over: one that fails counts nothing
            key_NI = key_BTI.flatten(0, -2).to(torch.promote_types(key_BTI.dtype, torch.float32))
            total_II = (key_NI.T @ key_NI).double()
            self.sums[name] = self.sums[name] + total_II if name in self.sums else total_II
        self.count += batch.numel()
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


@rank_zero_only
def _write(file: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    write_shared(file, lambda partial: partial.write_bytes(tensors_to_bytes(tensors, about)))


def _read(file: Path, llm: LLM, name: str) -> Tensor:
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
            if (about["fingerprint"], about["projection"]) == (llm.fingerprint, name):
                return opened.get_tensor("moment")
    except (SafetensorError, KeyError, TypeError):
        pass
    raise UserError(f"statistics: {file}: damaged, or of another model or layer; delete it")

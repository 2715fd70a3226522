"""Key statistics: the second moment of what ordinary text sends into a projection, found once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn
from torchmetrics import Metric

from pipeline.errors import UserError
from pipeline.files import cache_folder, write_shared
from pipeline.model import LLM, TargetRow, build_trainer, generate, sizes
from pipeline.model.batch_log import BatchLog
from pipeline.model.joining import PLAIN
from pipeline.model.memory import free_memory
from pipeline.model.processes import from_first, of_all
from pipeline.model.targets import tokenize
from pipeline.model.trainer import predict
from pipeline.model.upper import passing_through
from pipeline.options import StatisticsOptions, TrainerOptions
from pipeline.pace import Pace
from pipeline.requests import ListDataModule

WINDOW = 128  # tokens of text that are read together
READ_TOGETHER = 8  # windows
OPENINGS = (
    "The",
    "In",
    "It",
    "A",
    "This",
    "When",
    "After",
    "For",
    "He",
    "She",
    "They",
    "We",
    "There",
    "One",
    "Many",
    "As",
)


def key_moments(
    llm: LLM, names: Sequence[str], options: StatisticsOptions, trainer: TrainerOptions
) -> dict[str, Tensor]:
    """C = E[k kᵀ] of the keys that enter projections over ordinary text, each (I, I), float32, by name.

    Args:
        llm: the model.
        names: full names of projections.
        options: which text, how much of it, and where statistics are kept. A file is named by the model's
            fingerprint, the projection and the text, so that nothing of another model can be taken for it.
        trainer: what it runs on.

    Raises:
        UserError: when the text cannot be read or is too short for the keys' dimension.
    """
    text = options.text
    if text and not Path(text).is_file():  # before what is kept is looked up by its content
        raise UserError(f"statistics.text: {text}: no such file; expected plain UTF-8 text")
    folder = cache_folder(options.cache)
    source = Path(text).read_bytes() if text else b"the model's own text"
    files = {name: folder / f"moment-{_digest(llm, name, options.tokens, source)}.safetensors" for name in names}
    lacking = of_all([name for name in names if not files[name].is_file()])
    missing = [name for name in names if any(name in each for each in lacking)]
    found = {name: _read(file, llm, name) for name, file in files.items() if name not in missing}
    if not missing:
        return found
    windows = _windows(llm, options, trainer)
    read = sum(len(window.token_ids) for window in windows)
    progress = folder / f"sums-{_digest(llm, f'{missing} {trainer.precision}', options.tokens, source)}.safetensors"
    module = KeyMoments(llm, missing, progress)
    most = max(module.inputs)
    if read < 2 * most:
        raise UserError(
            f"statistics.text: {text or 'the model itself'} gives {read} tokens; statistics of {most} inputs "
            f"need at least {2 * most}"
        )
    moments = module.read(windows, trainer)
    for name, moment in moments.items():
        _write(files[name], {"moment": moment}, {"fingerprint": llm.fingerprint, "projection": name})
    progress.unlink(missing_ok=True)
    del module
    free_memory()  # a metric refers to itself, and its sums, larger than a weight, would stay for a while
    return found | moments


def _digest(llm: LLM, name: str, tokens: int, source: bytes) -> str:
    return hashlib.sha256(f"{llm.fingerprint} {name} {tokens} ".encode() + source).hexdigest()[:24]


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


def _windows(llm: LLM, options: StatisticsOptions, trainer: TrainerOptions) -> list[TargetRow]:
    """Equal windows of text, as rows of which nothing is scored."""
    if options.text:
        path = Path(options.text)
        if not path.is_file():
            raise UserError(f"statistics.text: {path}: no such file; expected plain UTF-8 text")
        try:
            ids = [i for line in tokenize(llm, path.read_text(encoding="utf-8").splitlines()) for i in line]
        except UnicodeDecodeError as error:
            raise UserError(f"statistics.text: {path}: byte {error.start}: not UTF-8 text") from None
    else:
        texts = own_text(llm, options.tokens, trainer, cache_folder(options.cache))
        ids = [i for told in texts for i in tokenize(llm, [told])[0]]
    ids = ids[: options.tokens]
    window = min(WINDOW, llm.context_length or WINDOW)
    return [TargetRow(ids[at : at + window], window) for at in range(0, len(ids) - window + 1, window)]


def own_text(llm: LLM, tokens: int, trainer: TrainerOptions, folder: Path) -> list[str]:
    """Text that the model itself writes, from common openings and what it thinks likeliest after each.

    It is kept in a folder: other layers' statistics are of the same text, and an interrupted command goes on.
    """
    name = f"text-{_digest(llm, '', tokens, repr((WINDOW, OPENINGS)).encode())}"
    file = folder / f"{name}.json"
    kept: list[str] | None = None
    with suppress(FileNotFoundError, ValueError):  # a damaged one is written anew
        kept = [str(text) for text in json.loads(file.read_text(encoding="utf-8"))]
    if (kept := from_first(kept)) is not None:
        return kept
    length = min(WINDOW, (llm.context_length or 2 * WINDOW) // 2)
    seeds = _continuations(llm, -(-tokens // (length * len(OPENINGS))))
    told = generate(llm, seeds, length, 32, trainer, "Own text", PLAIN, kept=folder / name)
    texts = [seed + text for seed, text in zip(seeds, told, strict=True)]
    _write_text(file, texts)
    return texts


@rank_zero_only
def _write_text(file: Path, texts: list[str]) -> None:
    write_shared(file, lambda partial: partial.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8"))
    BatchLog(file.with_suffix("")).remove()


@torch.no_grad()
def _continuations(llm: LLM, each: int) -> list[str]:
    """Each opening with each of the model's likeliest next tokens."""
    seeds = []
    with llm.frozen():
        for opening, ids in zip(OPENINGS, tokenize(llm, OPENINGS), strict=True):
            device = next(llm.model.parameters()).device
            logits = llm.model(input_ids=torch.tensor([ids], device=device)).logits[0, -1]
            likeliest = [[token] for token in logits.topk(each).indices.tolist()]
            seeds += [opening + token for token in llm.tokenizer.batch_decode(likeliest)]
    return seeds


def _collate(rows: Sequence[TargetRow]) -> Tensor:
    return torch.tensor([row.token_ids for row in rows])


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

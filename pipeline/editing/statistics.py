"""Key statistics: the second moment of what ordinary text sends into a projection, found once and kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics import Metric

from pipeline.errors import UserError
from pipeline.files import write_whole
from pipeline.model import LLM, TargetRow, build_trainer, generate, sizes
from pipeline.model.targets import tokenize
from pipeline.options import TrainerOptions
from pipeline.requests import ListDataModule

WINDOW = 128  # tokens of text that are read together
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


def key_moment(
    llm: LLM,
    layer: int,
    text: str | None,
    tokens: int,
    trainer: TrainerOptions,
    cache: Path | None = None,
) -> Tensor:
    """C = E[k kᵀ] of the keys that enter a block's down-projection over ordinary text, shape (I, I), float32.

    Args:
        llm: the model.
        layer: the block.
        text: a plain text file; None: text that the model itself writes.
        tokens: how much text to read.
        trainer: what it runs on.
        cache: folder for statistics; None: the user's cache folder. A file is named by the model's fingerprint,
            the block and the text, so that nothing of another model can be taken for it.

    Raises:
        UserError: when the text cannot be read or is too short for the keys' dimension.
    """
    (down,) = llm.blocks[layer].down.values()
    inputs, _ = sizes(down)
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "golden-layers"
    source = Path(text).read_bytes() if text and Path(text).is_file() else b"the model's own text"
    name = hashlib.sha256(b"%s %d %d " % (llm.fingerprint.encode(), layer, tokens) + source).hexdigest()[:24]
    file = folder / f"moment-{name}.safetensors"
    if file.is_file():
        return _read(file, llm, layer)
    windows = _windows(llm, text, tokens, trainer)
    read = sum(len(window.token_ids) for window in windows)
    if read < 2 * inputs:
        raise UserError(
            f"locate.text: {text or 'the model itself'} gives {read} tokens; statistics of {inputs} inputs "
            f"need at least {2 * inputs}"
        )
    module = KeyMoments(llm, layer)
    data = ListDataModule((windows, _collate, 8))
    with llm.frozen():
        build_trainer(trainer, "Key statistics").predict(module, datamodule=data, return_predictions=False)
    moment = module.moment
    folder.mkdir(parents=True, exist_ok=True)
    about = {"fingerprint": llm.fingerprint, "layer": str(layer)}
    write_whole(file, lambda partial: save_file({"moment": moment}, partial, about))
    return moment


def _read(file: Path, llm: LLM, layer: int) -> Tensor:
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
        if (about["fingerprint"], about["layer"]) != (llm.fingerprint, str(layer)):
            raise UserError(f"statistics: {file}: of another model or layer; delete it")
        return opened.get_tensor("moment")


def _windows(llm: LLM, text: str | None, tokens: int, trainer: TrainerOptions) -> list[TargetRow]:
    """Equal windows of text, as rows of which nothing is scored."""
    if text:
        path = Path(text)
        if not path.is_file():
            raise UserError(f"locate.text: {path}: no such file; expected plain UTF-8 text")
        try:
            ids = [i for line in tokenize(llm, path.read_text(encoding="utf-8").splitlines()) for i in line]
        except UnicodeDecodeError as error:
            raise UserError(f"locate.text: {path}: byte {error.start}: not UTF-8 text") from None
    else:
        ids = [i for told in own_text(llm, tokens, trainer) for i in tokenize(llm, [told])[0]]
    ids = ids[:tokens]
    window = min(WINDOW, llm.context_length or WINDOW)
    return [TargetRow(ids[at : at + window], window) for at in range(0, len(ids) - window + 1, window)]


def own_text(llm: LLM, tokens: int, trainer: TrainerOptions) -> list[str]:
    """Text that the model itself writes, from common openings and what it thinks likeliest after each."""
    length = min(WINDOW, (llm.context_length or 2 * WINDOW) // 2)
    seeds = _continuations(llm, -(-tokens // (length * len(OPENINGS))))
    return [
        seed + told
        for seed, told in zip(
            seeds, generate(llm, seeds, length, batch_size=32, trainer=trainer, title="Own text"), strict=True
        )
    ]


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
        key_NI = key_BTI.flatten(0, -2).float()
        self.total += (key_NI.T @ key_NI).double()
        self.count += len(key_NI)

    def compute(self) -> Tensor:
        """The mean, shape (I, I), float32."""
        return (self.total / self.count).float()


class _Reached(Exception):  # noqa: N818 - not an error: the pass has gone far enough
    pass


class KeyMoments(LightningModule):
    """Runs the model up to one block's down-projection and sums the second moment of what enters it."""

    def __init__(self, llm: LLM, layer: int) -> None:
        super().__init__()
        self.model = llm.model
        (self.down,) = llm.blocks[layer].down.values()
        self.sums = SecondMoment(sizes(self.down)[0])
        self.moment = torch.empty(0)

    def predict_step(self, input_ids_BT: Tensor) -> None:
        def count(_: nn.Module, args: tuple[Tensor, ...]) -> Any:
            self.sums.update(args[0])
            raise _Reached

        handle = self.down.register_forward_pre_hook(count)
        try:
            self.model(input_ids=input_ids_BT, use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()

    def on_predict_end(self) -> None:
        self.moment = self.sums.compute().cpu()

"""Key statistics: the second moment of what ordinary text sends into a projection, found once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

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
from pipeline.model.joining import PLAIN
from pipeline.model.targets import tokenize
from pipeline.model.upper import passing_through
from pipeline.options import StatisticsOptions, TrainerOptions
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
    folder = cache_folder(options.cache)
    source = Path(text).read_bytes() if text and Path(text).is_file() else b"the model's own text"
    files = {name: folder / f"moment-{_digest(llm, name, options.tokens, source)}.safetensors" for name in names}
    missing = [name for name in names if not files[name].is_file()]
    found = {name: _read(file, llm, name) for name, file in files.items() if name not in missing}
    if not missing:
        return found
    windows = _windows(llm, text, options.tokens, trainer)
    read = sum(len(window.token_ids) for window in windows)
    module = KeyMoments(llm, missing)
    most = max(module.inputs)
    if read < 2 * most:
        raise UserError(
            f"statistics.text: {text or 'the model itself'} gives {read} tokens; statistics of {most} inputs "
            f"need at least {2 * most}"
        )
    with llm.frozen():
        data = ListDataModule((windows, _collate, READ_TOGETHER))
        build_trainer(trainer, "Key statistics").predict(module, datamodule=data, return_predictions=False)
    for name, moment in module.moments.items():
        _write(files[name], {"moment": moment}, {"fingerprint": llm.fingerprint, "projection": name})
    return found | module.moments


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


def _windows(llm: LLM, text: str | None, tokens: int, trainer: TrainerOptions) -> list[TargetRow]:
    """Equal windows of text, as rows of which nothing is scored."""
    if text:
        path = Path(text)
        if not path.is_file():
            raise UserError(f"statistics.text: {path}: no such file; expected plain UTF-8 text")
        try:
            ids = [i for line in tokenize(llm, path.read_text(encoding="utf-8").splitlines()) for i in line]
        except UnicodeDecodeError as error:
            raise UserError(f"statistics.text: {path}: byte {error.start}: not UTF-8 text") from None
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
            seeds, generate(llm, seeds, length, 32, trainer, title="Own text", joining=PLAIN), strict=True
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


class KeyMoments(LightningModule):
    """Runs the model up to the last of some projections and sums the second moments of what enters each."""

    def __init__(self, llm: LLM, names: Sequence[str]) -> None:
        super().__init__()
        self.llm = llm
        self.model = llm.model
        self.names = list(names)
        self.above = 1 + max(b.index for b in llm.blocks if any(name.startswith(f"{b.name}.") for name in names))
        found = {
            name: projection for block in llm.blocks for name, projection in block.projections("block").items()
        }
        self.inputs = [sizes(found[name])[0] for name in names]
        self.sums = nn.ModuleList(SecondMoment(inputs) for inputs in self.inputs)
        self.moments: dict[str, Tensor] = {}

    def predict_step(self, input_ids_BT: Tensor) -> None:
        with ExitStack() as hooks:
            for name, sums in zip(self.names, self.sums, strict=True):
                projection = self.model.get_submodule(name)
                handle = projection.register_forward_pre_hook(lambda _, args, sums=sums: sums.update(args[0]))
                hooks.callback(handle.remove)
            hooks.enter_context(passing_through(self.llm, self.above))
            self.model(input_ids=input_ids_BT, use_cache=False, logits_to_keep=1)

    def on_predict_end(self) -> None:
        for name, sums in zip(self.names, self.sums, strict=True):
            assert isinstance(sums, SecondMoment)
            self.moments[name] = sums.compute().cpu()

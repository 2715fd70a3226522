"""Ordinary text for key statistics: a file's, or what the model writes itself."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only

from pipeline.errors import UserError
from pipeline.files import cache_folder, write_shared
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.options.editing import StatisticsOptions
from pipeline.requests.joining import PLAIN
from pipeline.running.kept import Kept
from pipeline.running.processes import from_first
from pipeline.running.trainer import Runtime

WINDOW = 128  # tokens of text that are read together
OPENINGS = (
    *("The", "In", "It", "A", "This", "When", "After", "For"),
    *("He", "She", "They", "We", "There", "One", "Many", "As"),
)


def windows(llm: LLM, options: StatisticsOptions, runtime: Runtime) -> list[list[int]]:
    """The tokens of a text in equal windows.

    Args:
        llm: the model.
        options: which text, and how much of it.
        runtime: what the model writes on, where there is no text.

    Raises:
        UserError: when there is no such text, or it is not UTF-8.
    """
    texts = _lines(Path(options.text)) if options.text else own_text(llm, options.tokens, runtime)
    ids = [i for text_ids in llm.tokens.texts(texts) for i in text_ids][: options.tokens]
    window = min(WINDOW, llm.context_length or WINDOW)
    return [ids[at : at + window] for at in range(0, len(ids) - window + 1, window)]


def _lines(path: Path) -> list[str]:
    """The lines of a text file."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"statistics.text: {path}: byte {error.start}: not UTF-8 text") from None


def own_text(llm: LLM, tokens: int, runtime: Runtime) -> list[str]:
    """Text that the model itself writes, from common openings and what it thinks likeliest after each.

    It is kept in the cache folder: other layers' statistics are of the same text, and an interrupted command goes
    on.

    Args:
        llm: the model.
        tokens: how many the texts come to at least, together.
        runtime: what it runs with.
    """
    folder, name = cache_folder(None), f"text-{digest(llm, '', tokens, repr((WINDOW, OPENINGS)).encode())}"
    file = folder / f"{name}.json"
    kept: list[str] | None = None
    with suppress(FileNotFoundError, ValueError):  # a damaged one is written anew
        kept = [str(text) for text in json.loads(file.read_text(encoding="utf-8"))]
    if (kept := from_first(kept)) is not None:
        return kept
    length = min(WINDOW, (llm.context_length or 2 * WINDOW) // 2)
    seeds = _continuations(llm, -(-tokens // (length * len(OPENINGS))))
    told = generate(llm, seeds, length, 32, runtime.trainer, "Own text", PLAIN, kept=folder / name)
    texts = [seed + text for seed, text in zip(seeds, told, strict=True)]
    _write_text(file, texts)
    return texts


@rank_zero_only
def _write_text(file: Path, texts: list[str]) -> None:
    write_shared(file, lambda partial: partial.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8"))
    Kept(file.with_suffix("")).remove()


@torch.no_grad()
def _continuations(llm: LLM, each: int) -> list[str]:
    """Each opening with each of the model's likeliest next tokens."""
    seeds = []
    with llm.frozen():
        for opening, ids in zip(OPENINGS, llm.tokens.texts(OPENINGS), strict=True):
            device = next(llm.model.parameters()).device
            logits = llm.model(input_ids=torch.tensor([ids], device=device)).logits[0, -1]
            likeliest = [[token] for token in logits.topk(each).indices.tolist()]
            seeds += [opening + token for token in llm.tokenizer.batch_decode(likeliest)]
    return seeds


def digest(llm: LLM, name: str, tokens: int, source: bytes) -> str:
    """Names what is found of a model (and of `name` in it) from so many tokens of a text."""
    return hashlib.sha256(f"{llm.fingerprint} {name} {tokens} ".encode() + source).hexdigest()[:24]

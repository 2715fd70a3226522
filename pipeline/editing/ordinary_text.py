"""Ordinary text, for key statistics and to go on as before: a file's, or what the model writes itself."""

from __future__ import annotations

import torch

from pipeline.editing.bundled import bundled_text
from pipeline.files import cached, digest, read_plain_text
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.options.editing import StatisticsOptions
from pipeline.requests.tokens import PLAIN
from pipeline.running.trainer import Runtime

WINDOW = 128  # tokens of text that are read together
OPENINGS = (
    *("The", "In", "It", "A", "This", "When", "After", "For"),
    *("He", "She", "They", "We", "There", "One", "Many", "As"),
)


def ordinary_text(llm: LLM, options: StatisticsOptions, runtime: Runtime) -> list[list[int]]:
    """The tokens of what the options name, in equal windows; UserError when the file cannot be read."""
    texts = file_text(options)
    if texts is None:
        texts = bundled_text(llm.fingerprint, options.tokens)
    return windows(llm, own_text(llm, options.tokens, runtime) if texts is None else texts, options.tokens)


def file_text(options: StatisticsOptions) -> list[str] | None:
    """The lines of the options' file; None where they name none. UserError when it cannot be read."""
    return read_plain_text("statistics.text", options.text).splitlines() if options.text else None


def windows(llm: LLM, texts: list[str], tokens: int) -> list[list[int]]:
    """The first tokens of texts, one text behind the other, in equal windows."""
    ids = [i for text_ids in llm.tokens.texts(texts) for i in text_ids][:tokens]
    window = min(WINDOW, llm.context_length or WINDOW)
    return [ids[at : at + window] for at in range(0, len(ids) - window + 1, window)]


def own_text(llm: LLM, tokens: int, runtime: Runtime) -> list[str]:
    """Text of at least so many tokens that the model itself writes, from openings and what is likeliest after each.

    It is kept in the cache folder, for other layers' statistics, and for an interrupted command to go on.
    """
    length = min(WINDOW, (llm.context_length or 2 * WINDOW) // 2)
    seeds = _continuations(llm, -(-tokens // (length * len(OPENINGS))))
    folder = cached(f"text-{digest(llm.fingerprint, llm.model.dtype, runtime.precision, seeds, length)}")
    told = generate(llm, seeds, length, 32, runtime.trainer, "Own text (once a model, kept)", PLAIN, kept=folder)
    return [seed + text for seed, text in zip(seeds, told, strict=True)]


@torch.no_grad()
def _continuations(llm: LLM, each: int) -> list[str]:
    """Each opening with each of the model's likeliest next tokens."""
    seeds = []
    with llm.frozen():
        for opening, ids in zip(OPENINGS, llm.tokens.texts(OPENINGS), strict=True):
            logits = llm.model(input_ids=torch.tensor([ids], device=llm.embedding.device)).logits[0, -1]
            likeliest = [[token] for token in logits.topk(each).indices.tolist()]
            seeds += [opening + token for token in llm.tokenizer.batch_decode(likeliest)]
    return seeds

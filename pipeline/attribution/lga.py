"""Stage one: layer gradient analysis over a proxy set (arXiv 2602.20207), under `Trainer.predict`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from pipeline.attribution.callback import GradientAttribution
from pipeline.attribution.profile import GoldenProfile
from pipeline.attribution.selection import select
from pipeline.errors import UserError, check_choice
from pipeline.model import (
    LLM,
    TargetBatch,
    TargetRow,
    build_trainer,
    collate_targets,
    encode,
    first_statement,
    generate,
    target_losses,
)
from pipeline.model.trainer import check_shares
from pipeline.options import AttributionOptions, TrainerOptions
from pipeline.requests import EditRequest, ListDataModule

Pair = tuple[TargetRow, TargetRow]  # the same prompt with the old and with the new answer

METHODS = ("lga",)


def find_golden_layer(
    llm: LLM,
    requests: Sequence[EditRequest],
    options: AttributionOptions | None = None,
    trainer: TrainerOptions | None = None,
    request_set: str = "",
) -> GoldenProfile:
    """Score every block by LGA and choose the golden ones.

    Args:
        llm: the model; its weights stay as they are.
        requests: the proxy set.
        options: how blocks are scored and chosen.
        trainer: what it runs on.
        request_set: what the profile calls the proxy set.

    Raises:
        UserError: for an unknown method, more golden layers than blocks, a prompt longer than the context.
    """
    options, trainer = options or AttributionOptions(), trainer or TrainerOptions()
    check_choice("method", options.method, METHODS)
    started = time.perf_counter()
    pairs = encode_pairs(llm, with_old_answers(llm, requests, options, trainer))
    data = ListDataModule((pairs, partial(collate_pairs, pad_token_id=llm.pad_token_id), options.batch_size))
    attribution = GradientAttribution(llm.blocks, options.scope)
    with llm.frozen():
        runner = build_trainer(trainer, "Attribution", callbacks=[attribution])
        check_shares(runner, len(pairs))
        runner.predict(AttributionModule(llm), datamodule=data, return_predictions=False)
    chosen = select(attribution.mean_scores, options.fences, options.order)
    if options.top_k > len(chosen.ranking):
        raise UserError(
            f"top_k: {options.top_k} golden layers asked for; {len(chosen.ranking)} lie inside the fences"
        )
    return GoldenProfile(
        model=llm.name,
        fingerprint=llm.fingerprint,
        method=options.method,
        scope=options.scope,
        order=options.order,
        scores=attribution.mean_scores,
        fences=(chosen.low, chosen.high) if options.fences > 0 else None,
        excluded=chosen.excluded,
        ranking=chosen.ranking,
        raw_ranking=chosen.raw_ranking,
        golden_layers=chosen.ranking[: options.top_k],
        request_set=request_set,
        requests=attribution.requests,
        seconds=round(time.perf_counter() - started, 3),
        chat=llm.chat,
    )


def with_old_answers(
    llm: LLM, requests: Sequence[EditRequest], options: AttributionOptions, trainer: TrainerOptions
) -> list[EditRequest]:
    """The requests, each with an old answer: the data set's, or the model's own greedy one."""
    asked = [r for r in requests if options.old_answers == "model" or r.old_answer is None]
    if not asked:
        return list(requests)
    texts = generate(
        llm, [r.prompt for r in asked], batch_size=options.batch_size, trainer=trainer, title="Old answers"
    )
    old = {r.id: first_statement(text) for r, text in zip(asked, texts, strict=True)}
    silent = [r.id for r in asked if not old[r.id]]
    if silent:
        raise UserError(
            f"requests: {llm.name} gives no answer of its own to {', '.join(silent[:5])}; give old_answer"
        )
    return [r.model_copy(update={"old_answer": old[r.id]}) if r.id in old else r for r in requests]


def encode_pairs(llm: LLM, requests: Sequence[EditRequest]) -> list[Pair]:
    """Old and new answer of every request as token rows, the shortest first."""
    old = encode(llm, [(r.prompt, r.old_answer or "") for r in requests])
    new = encode(llm, [(r.prompt, r.new_answer) for r in requests])
    return sorted(zip(old, new, strict=True), key=lambda pair: max(len(row.token_ids) for row in pair))


def collate_pairs(pairs: Sequence[Pair], pad_token_id: int = 0) -> TargetBatch:
    """P pairs as 2P rows, the old answers' first."""
    return collate_targets([old for old, _ in pairs] + [new for _, new in pairs], pad_token_id)


class AttributionModule(LightningModule):
    """Wraps an LLM; a predict step differentiates the sum of the rows' losses, for callbacks to read.

    The weights are frozen: the gradient flows from the embeddings' output, and through activations only.
    """

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.model = llm.model

    @torch.enable_grad()
    def predict_step(self, batch: TargetBatch) -> Tensor:
        """The rows' losses, shape (2P,), after the backward pass of their sum."""
        with embeddings_require_grad(self.model.get_input_embeddings()):
            losses = target_losses(self.model, batch)
        losses.sum().backward()
        return losses.detach()


@contextmanager
def embeddings_require_grad(embeddings: nn.Module) -> Iterator[None]:
    """Start the graph at the embeddings' output, although every weight is frozen."""
    handle = embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()

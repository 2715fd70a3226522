"""Layer gradient analysis over a proxy set (arXiv 2602.20207) and its kin, under `Trainer.predict`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pipeline.attribution.callback import GradientAttribution
from pipeline.attribution.inner_products import GRADIENT_NORM_SUBJECT, LGA, Estimator
from pipeline.attribution.selector import Selector, Values, register, tokens_at_once
from pipeline.model.activations import Activations, checkpointing, target_losses
from pipeline.model.blocks import sizes
from pipeline.model.generation import with_old_answers
from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.requests.data import both_answers, collate_sides
from pipeline.requests.rows import Batch, Row
from pipeline.requests.schema import EditRequest
from pipeline.running.stage import Stage, run
from pipeline.running.trainer import Runtime

Sides = tuple[Row, ...]  # the same prompt with the old and with the new answer, or with the new one alone


def score_gradients(
    estimator: Estimator, llm: LLM, requests: Sequence[EditRequest], options: AttributionOptions, runtime: Runtime
) -> Values:
    """Each request's score of every block by an estimator, (N, L)."""
    if estimator.sides == 2:
        requests = with_old_answers(llm, requests, runtime, always=options.old_answers == "model")
        sides: list[Sides] = list(both_answers(llm.tokens, requests))
    else:
        sides = [(row,) for row in llm.tokens.answered(requests)]
    watch = GradientAttribution(llm.blocks, options.scope, estimator)
    shared = max(1, llm.tokens.place(requests[0].prompt, 1)) if estimator.positions else 1
    with llm.frozen(), checkpointing(llm, runtime.options.activation_checkpointing):
        found = run(
            Attribution(llm, watch, shared),
            sides,
            runtime,
            tokens=tokens_of,
            batch_size=options.batch_size,
            most_tokens=tokens_at_once(llm, kept_of_a_token(llm)),
            kept="scores",
            in_step=True,
            callbacks=[watch],
        )
    return torch.stack(found).numpy()


class Attribution(Stage):
    """Differentiates the sum of requests' losses, for the callback to read: an output is a request's scores.

    The weights are frozen: the gradient flows from the embeddings' output, and through activations only. All
    prompts begin with the same `shared` tokens.
    """

    title, gradients = "Attribution", True

    def __init__(self, llm: LLM, watch: GradientAttribution, shared: int = 1) -> None:
        super().__init__(llm.model)
        self.llm, self.watch, self.shared = llm, watch, shared

    def collate(self, items: list[Sides]) -> Batch:
        return collate_sides(items, self.llm.pad_token_id)

    def step(self, batch: Batch) -> list[Tensor]:
        positions = self.watch.estimator.positions
        self.watch.positions_RK = positions(batch, self.shared) if positions else None
        with Activations(self.llm).from_gradients():
            losses = target_losses(self.llm.model, batch)
        losses.sum().backward()
        return list(self.watch.last_scores.double().clone())


def tokens_of(item: Sides) -> int:
    """How many tokens an item takes: its rows are padded to one length."""
    return len(item) * (max(len(row.token_ids) for row in item) - 1)


def kept_of_a_token(llm: LLM) -> int:
    """About how many numbers a backward pass keeps of a token in a block: what its linear maps take and put out."""
    return max(sum(sum(sizes(one)) for one in block.scopes["block"].values()) for block in llm.blocks)


def of_gradients(estimator: Estimator, fenced: bool = True) -> Selector:
    """The selector that an estimator makes."""
    return Selector(
        partial(score_gradients, estimator), needs_subject=estimator.needs_subject, of_gradients=True, fenced=fenced
    )


register("lga", of_gradients(LGA))
register("gradient_norm_subject", of_gradients(GRADIENT_NORM_SUBJECT))

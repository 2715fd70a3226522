"""Layer gradient analysis over a proxy set (arXiv 2602.20207) and its kin, under `Trainer.predict`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from pipeline.attribution.callback import GradientAttribution
from pipeline.attribution.estimators import Estimator
from pipeline.attribution.old_answers import with_old_answers
from pipeline.attribution.scoring import ScoringModule, score_batches, tokens_at_once
from pipeline.attribution.selector import Runtime, Values
from pipeline.model import LLM, TargetBatch, TargetRow, collate_targets, encode, sizes, target_losses
from pipeline.model.checkpointing import checkpointing
from pipeline.model.targets import last_token
from pipeline.options import AttributionOptions
from pipeline.requests import EditRequest

Sides = tuple[TargetRow, ...]  # the same prompt with the old and with the new answer, or with the new one alone


def score_gradients(
    estimator: Estimator,
    llm: LLM,
    requests: Sequence[EditRequest],
    options: AttributionOptions,
    runtime: Runtime,
) -> Values:
    """Each request's score of every block by an estimator, (N, L).

    Raises:
        UserError: for a prompt longer than the context, or an old answer that is missing and cannot be found.
    """
    if estimator.sides == 2:
        requests = with_old_answers(llm, requests, options, runtime.trainer, runtime.work)
    shared = max(1, last_token(llm, requests[0].prompt, 1)) if estimator.positions else 1
    attribution = GradientAttribution(llm.blocks, options.scope, estimator, shared)
    with checkpointing(llm, runtime.trainer.activation_checkpointing):
        return score_batches(
            AttributionModule(llm, attribution),
            encode_sides(llm, requests, estimator.sides, estimator.needs_subject),
            tokens=tokens_of,
            most=tokens_at_once(llm, kept_of_a_token(llm)),
            batch_size=options.batch_size,
            runtime=runtime,
            title="Attribution",
            callbacks=[attribution],
        )


def encode_sides(
    llm: LLM, requests: Sequence[EditRequest], sides: int = 2, with_subject: bool = False
) -> list[Sides]:
    """Old and new answer of every request as token rows; with one side, the new one alone.

    With `with_subject` the rows' tags are the places of their subjects' last tokens.
    """
    answers = [[r.old_answer or "" for r in requests]] if sides == 2 else []
    answers.append([r.new_answer for r in requests])
    encoded = [encode(llm, [(r.prompt, a) for r, a in zip(requests, given, strict=True)]) for given in answers]
    if with_subject:
        encoded = [
            [_tagged(llm, *one) for one in zip(requests, given, rows, strict=True)]
            for given, rows in zip(answers, encoded, strict=True)
        ]
    return list(zip(*encoded, strict=True))


def _tagged(llm: LLM, request: EditRequest, answer: str, row: TargetRow) -> TargetRow:
    """With the place of the subject's last token."""
    end = request.prompt.rindex(request.subject or "") + len(request.subject or "")
    return replace(row, tag=min(last_token(llm, request.prompt, end, answer), row.target_start - 1))


def collate_sides(items: Sequence[Sides], pad_token_id: int = 0) -> TargetBatch:
    """P requests as one batch, side by side: the old answers' rows first.

    The last token of the longest row is left out, too: it predicts nothing that is scored.
    """
    batch = collate_targets([row for side in zip(*items, strict=True) for row in side], pad_token_id)
    return replace(batch, input_ids_BT=batch.input_ids_BT[:, :-1].contiguous())


def tokens_of(item: Sides) -> int:
    """How many tokens an item takes: its rows are padded to one length."""
    return len(item) * (max(len(row.token_ids) for row in item) - 1)


def kept_of_a_token(llm: LLM) -> int:
    """About how many numbers a backward pass keeps of a token in a block: what its linear maps take and put out."""
    return sum(sum(sizes(projection)) for projection in llm.blocks[0].projections("block").values())


class AttributionModule(ScoringModule):
    """Wraps an LLM; a predict step differentiates the sum of the rows' losses, for the callback to read.

    The weights are frozen: the gradient flows from the embeddings' output, and through activations only.
    """

    def __init__(self, llm: LLM, attribution: GradientAttribution) -> None:
        super().__init__(llm)
        self.attribution = attribution

    def collate(self, items: list[Sides]) -> TargetBatch:
        return collate_sides(items, self.llm.pad_token_id)

    def scores(self, batch: TargetBatch) -> Tensor:
        """What the callback makes of the gradients, (P, L)."""
        self.attribution.begin(batch)
        with embeddings_require_grad(self.model.get_input_embeddings()):
            losses = target_losses(self.model, batch)
        losses.sum().backward()
        return self.attribution.take()


@contextmanager
def embeddings_require_grad(embeddings: nn.Module) -> Iterator[None]:
    """Start the graph at the embeddings' output, although every weight is frozen."""
    handle = embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()

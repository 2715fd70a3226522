"""Causal tracing (ROME, arXiv 2202.05262): which block's hidden state brings back what corrupting the subject took.

The embeddings of the subject's tokens are corrupted by Gaussian noise; then one block's output at the subject's
last token is put back to what it is in the clean run. A block's score is how much of the old answer's probability
that recovers: restored less corrupted, mean over samples of noise. As in ROME the answer's first token is what
counts.

A batch of requests runs clean once and under all samples once. For each block all of it runs as one batch more,
from the block above on: what blocks below put out is what it was in the corrupted run.

Shapes: P requests, S samples, R = P · S rows (a request's samples side by side), T tokens, D hidden, L blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.attribution.old_answers import with_old_answers
from pipeline.attribution.scoring import ScoringModule, score_batches, tokens_at_once
from pipeline.attribution.selector import Runtime, Values
from pipeline.model import LLM, encode
from pipeline.model.targets import head_reads_only, last_token
from pipeline.model.upper import handing_on
from pipeline.options import AttributionOptions
from pipeline.requests import EditRequest


class TracedRow(NamedTuple):
    """A prompt's tokens, the first and last of its subject, the answer's first token, and the seed of its noise."""

    token_ids: list[int]
    first: int
    last: int
    target: int
    seed: int


@dataclass
class TracedBatch:
    """P prompts padded on the right, (P, T), and each one's places, target and seed."""

    input_ids_PT: Tensor
    first_P: Tensor
    last_P: Tensor
    read_P: Tensor
    target_P: Tensor
    seeds: list[int]


def score_tracing(
    llm: LLM, requests: Sequence[EditRequest], options: AttributionOptions, runtime: Runtime
) -> Values:
    """Each request's recovered probability at every block, (N, L); subjects must stand in their prompts.

    Raises:
        UserError: for a prompt longer than the context, or an old answer that is missing and cannot be found.
    """
    answered = with_old_answers(llm, requests, options, runtime.trainer, runtime.work)
    return score_batches(
        TracingModule(llm, options),
        traced_rows(llm, answered, runtime.seed),
        tokens=lambda row: options.samples * len(row.token_ids),
        most=tokens_at_once(llm, llm.model.config.get_text_config(decoder=True).hidden_size),
        batch_size=options.batch_size,
        runtime=runtime,
        title="Causal tracing",
    )


def traced_rows(llm: LLM, requests: Sequence[EditRequest], seed: int) -> list[TracedRow]:
    """Every request's prompt with its subject's tokens; of several mentions the last one counts."""
    rows = []
    encoded = encode(llm, [(r.prompt, r.old_answer or "") for r in requests])
    for request, row in zip(requests, encoded, strict=True):
        subject, answer = request.subject or "", request.old_answer or ""
        start = request.prompt.rindex(subject)
        first, last = (
            min(last_token(llm, request.prompt, end, answer), row.target_start - 1)
            for end in (start + 1, start + len(subject))
        )
        own = hashlib.sha256(f"{seed} {request.id}".encode()).digest()  # the same in any set and batch
        ids = row.token_ids
        noise = int.from_bytes(own[:7])
        rows.append(TracedRow(ids[: row.target_start], first, last, ids[row.target_start], noise))
    return rows


class TracingModule(ScoringModule):
    """Wraps an LLM; a predict step traces one batch of requests at every block."""

    def __init__(self, llm: LLM, options: AttributionOptions) -> None:
        super().__init__(llm)
        self.samples = options.samples
        self.noise = options.noise

    def collate(self, items: list[TracedRow]) -> TracedBatch:
        padded = nn.utils.rnn.pad_sequence(
            [torch.tensor(row.token_ids) for row in items], batch_first=True, padding_value=self.llm.pad_token_id
        )
        places = torch.tensor([(row.first, row.last, len(row.token_ids) - 1, row.target) for row in items])
        first_P, last_P, read_P, target_P = places.T.contiguous()
        return TracedBatch(padded, first_P, last_P, read_P, target_P, [row.seed for row in items])

    @torch.no_grad()
    def scores(self, batch: TracedBatch) -> Tensor:
        """Probability recovered at each block, mean over samples, (P, L)."""
        with block_outputs(self.llm) as clean:
            self._probabilities(batch, 1)
        with block_outputs(self.llm) as corrupted, self._corrupting(batch):
            base_PS = self._probabilities(batch, self.samples)
        rows_P = torch.arange(len(batch.last_P), device=batch.last_P.device)
        rows_R = torch.arange(len(rows_P) * self.samples, device=rows_P.device)
        last_R = batch.last_P.repeat_interleave(self.samples)
        found = []
        for layer, (clean_PTD, state_RTD) in enumerate(zip(clean, corrupted, strict=True)):
            clean_PD = clean_PTD[rows_P, batch.last_P]
            state_RTD[rows_R, last_R] = clean_PD.repeat_interleave(self.samples, dim=0)
            with handing_on(self.llm, layer + 1, state_RTD):
                found.append((self._probabilities(batch, self.samples) - base_PS).mean(1))
        return torch.stack(found, dim=1)

    def _probabilities(self, batch: TracedBatch, samples: int) -> Tensor:
        """Of each answer's first token, (P, samples)."""
        ids_RT = batch.input_ids_PT.repeat_interleave(samples, dim=0)
        rows_R = torch.arange(len(ids_RT), device=ids_RT.device)
        with head_reads_only(self.llm.model, rows_R, batch.read_P.repeat_interleave(samples)):
            logits_RV = self.llm.model(input_ids=ids_RT, use_cache=False).logits.squeeze(0)
        wide = torch.promote_types(logits_RV.dtype, torch.float32)
        target_R1 = batch.target_P.repeat_interleave(samples)[:, None]
        return logits_RV.to(wide).softmax(-1).gather(1, target_R1).view(-1, samples)

    @contextmanager
    def _corrupting(self, batch: TracedBatch) -> Iterator[None]:
        """Inside the `with`, embeddings of the subjects' tokens come with noise, drawn anew for every sample."""
        embeddings = self.llm.model.get_input_embeddings()
        noise_RTD = torch.cat([self._noise(batch, number) for number in range(len(batch.seeds))])

        def corrupt(_: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + noise_RTD.to(output)

        handle = embeddings.register_forward_hook(corrupt)
        try:
            yield
        finally:
            handle.remove()

    def _noise(self, batch: TracedBatch, number: int) -> Tensor:
        """A request's noise under every sample, (S, T, D), zero outside its subject; in float32, on the CPU.

        In units of what the embeddings put out: Gemma's are the matrix's rows times √D.
        """
        matrix, ids_T = self.llm.embedding, batch.input_ids_PT[number]
        first, last = int(batch.first_P[number]), int(batch.last_P[number])
        put_out = self.llm.model.get_input_embeddings()(ids_T[last : last + 1])
        deviation = (matrix.float().std() * put_out.float().norm() / matrix[ids_T[last]].float().norm()).item()
        draw = torch.Generator().manual_seed(batch.seeds[number])
        noise_STD = torch.zeros(self.samples, len(ids_T), matrix.shape[1])
        subject = (self.samples, last - first + 1, matrix.shape[1])
        noise_STD[:, first : last + 1] = self.noise * deviation * torch.randn(subject, generator=draw)
        return noise_STD


@contextmanager
def block_outputs(llm: LLM) -> Iterator[list[Tensor]]:
    """Inside the `with`, a pass appends what each block puts out, (B, T, D)."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, _args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for block in llm.blocks:
            hooks.callback(llm.model.get_submodule(block.name).register_forward_hook(keep).remove)
        yield seen

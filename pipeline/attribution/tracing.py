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
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.attribution.selector import Selector, Values, register, tokens_at_once
from pipeline.errors import UserError
from pipeline.model.activations import RowStage, head_reads, wide_logits
from pipeline.model.generation import with_old_answers
from pipeline.model.llm import LLM
from pipeline.model.suffix import parts_of
from pipeline.options.attribution import AttributionOptions
from pipeline.requests.rows import Batch, Row
from pipeline.requests.schema import EditRequest
from pipeline.running.stage import run
from pipeline.running.trainer import Runtime


def score_tracing(
    llm: LLM, requests: Sequence[EditRequest], options: AttributionOptions, runtime: Runtime
) -> Values:
    """Each request's recovered probability at every block, (N, L); subjects must stand in their prompts."""
    answered = with_old_answers(llm, requests, runtime, always=options.old_answers == "model")
    rows = llm.tokens.answered(answered, [request.old_answer or "" for request in answered])
    rows = [row._replace(token_ids=row.token_ids[: row.target_start + 1]) for row in rows]  # its first token counts
    with llm.frozen():
        found = run(
            Tracing(llm, options, runtime.seed),
            rows,
            runtime,
            tokens=lambda row: options.samples * len(row.token_ids),
            batch_size=options.batch_size,
            most_tokens=tokens_at_once(llm, llm.embedding.shape[1]),
            kept="scores",
        )
    return torch.stack(found).numpy()


class Tracing(RowStage):
    """Traces requests at every block, with the same noise in any batch: an output is recovered probabilities."""

    title = "Causal tracing"

    def __init__(self, llm: LLM, options: AttributionOptions, seed: int) -> None:
        super().__init__(llm)
        if not parts_of(llm).blocks:
            raise UserError(f"attribution: causal_tracing runs blocks by themselves, as {llm.name}'s cannot be")
        self.samples, self.noise, self.seed = options.samples, options.noise, seed
        own = llm.model.get_input_embeddings()
        self.embeddings = next(name for name, module in llm.model.named_modules() if module is own)

    def step(self, batch: Batch) -> list[Tensor]:
        names = [block.name for block in self.llm.blocks]
        with self.activations.leaving(*names) as clean:
            self._probabilities(batch, 1)
        noise_RTD = torch.cat([self._noise(text, batch.input_ids_BT.shape[1]) for text in batch.texts])
        rows = len(batch.texts) * self.samples
        with (
            self.activations.leaving(*names) as corrupted,
            self.activations.changing(self.embeddings, rows, lambda _, output: output + noise_RTD.to(output)),
        ):
            base_PS = self._probabilities(batch, self.samples)
        last_P = torch.tensor([text.subject[1] for text in batch.texts if text.subject], device=base_PS.device)
        each_P, each_R = torch.arange(len(last_P)), torch.arange(rows)
        last_R = last_P.repeat_interleave(self.samples)
        found = []
        for layer, name in enumerate(names):
            state_RTD = corrupted[name]
            state_RTD[each_R, last_R] = clean[name][each_P, last_P].repeat_interleave(self.samples, dim=0)
            with self.activations.from_block(layer + 1, state_RTD):
                found.append((self._probabilities(batch, self.samples) - base_PS).mean(1))
        return list(torch.stack(found, dim=1).double().cpu())

    def _probabilities(self, batch: Batch, samples: int) -> Tensor:
        """Of each answer's first token, (P, samples)."""
        ids_RT = batch.input_ids_BT.repeat_interleave(samples, dim=0)
        rows_R = torch.arange(len(ids_RT), device=ids_RT.device)
        with head_reads(self.llm.model, rows_R, batch.position_N.repeat_interleave(samples)):
            logits_RV = wide_logits(self.llm.model(input_ids=ids_RT, use_cache=False))
        target_R1 = batch.target_N.repeat_interleave(samples)[:, None]
        return logits_RV.softmax(-1).gather(1, target_R1).view(-1, samples)

    def _noise(self, text: Row, width: int) -> Tensor:
        """A request's noise under every sample, (S, T, D), zero outside its subject; in float32.

        In units of what the embeddings put out: Gemma's are the matrix's rows times √D.
        """
        assert text.subject
        (first, last), matrix = text.subject, self.llm.embedding
        token = torch.tensor(text.token_ids[last : last + 1], device=matrix.device)
        put_out = self.llm.model.get_input_embeddings()(token)
        deviation = (matrix.float().std() * put_out.float().norm() / matrix[token].float().norm()).item()
        own = hashlib.sha256(f"{self.seed} {text.tag}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(own[:7]))
        noise_STD = torch.zeros(self.samples, width, matrix.shape[1])
        subject = (self.samples, last - first + 1, matrix.shape[1])
        noise_STD[:, first : last + 1] = self.noise * deviation * torch.randn(subject, generator=draw)
        return noise_STD.to(matrix.device)


register("causal_tracing", Selector(score_tracing, needs_subject=True))

"""Stage three: measure a model on edit requests, before and after an update.

All probes of all requests are one stream of length-sorted batches, scored at their answers' tokens; prompts
for generation and windows of ordinary text are two more. One `Trainer.predict` runs all three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch.nn import functional as F

from pipeline.editing import WeightUpdate
from pipeline.errors import UserError
from pipeline.evaluation.answers import is_exact_answer
from pipeline.evaluation.metrics import BootstrapMean, Estimate
from pipeline.model import LLM, TargetBatch, TargetRow, build_trainer, collate_targets, encode, target_logits
from pipeline.model.generation import PromptBatch, collate_prompts, encode_prompts, greedy
from pipeline.model.targets import tokenize
from pipeline.model.trainer import check_shares, predict
from pipeline.options import EvaluationOptions, TrainerOptions
from pipeline.requests import EditRequest, ListDataModule

ORDINARY_TEXT = Path(__file__).with_name("ordinary_text.txt")
WINDOW = 256  # tokens of ordinary text scored at a time
PROBE_METRICS = ("rewrite", "rephrase", "locality", "portability")
OTHER_METRICS = {"generation": "generation_exact_match", "text": "perplexity"}
KINDS = ("probes", *OTHER_METRICS)  # what a measurement can consist of

Metrics = dict[str, Estimate]


class ProbeTag(NamedTuple):
    """Which metric a row counts for, which request it belongs to, its share there, and its own number."""

    metric: str
    request: int
    share: float
    row: int


@dataclass
class Measurement:
    """A model's figures and, in the requests' order, what it generated."""

    metrics: Metrics
    answers: list[str]


@dataclass
class Evaluation:
    """Figures and generations of the base model and, where there was an update, of the edited one."""

    before: Measurement
    after: Measurement | None = None


def evaluate(
    llm: LLM,
    requests: Sequence[EditRequest],
    update: WeightUpdate | None = None,
    options: EvaluationOptions | None = None,
    trainer: TrainerOptions | None = None,
) -> Evaluation:
    """Measure the base model and, with an update, the edited one; the model is the base again afterwards.

    Args:
        llm: the base model.
        requests: what to measure on.
        update: what to measure the effect of.
        options: how to measure.
        trainer: what it runs on.

    Raises:
        UserError: for no requests, an update of another model, texts that do not fit the context, a text file
            too short.
    """
    if update:
        llm.check_made_for("update", update.model, update.fingerprint)
    evaluator = Evaluator(llm, requests, options, trainer)
    before = evaluator.measure("Measuring base")
    if update is None:
        return Evaluation(before)
    with update.applied(llm):
        return Evaluation(before, evaluator.measure("Measuring edited"))


class Evaluator:
    """Measures a model on the same probes again and again; the first measurement is what locality compares to.

    Metrics, each a mean over requests with its count and 95% interval:
        rewrite, rephrase, portability: share of the answer's tokens that are the model's first choice when
            the answer so far is given (teacher forcing), as EasyEdit computes it.
        locality: share of the answer's positions whose first choice is that of the first measurement.
        generation_exact_match: share of requests whose new answer, and nothing more, is what the model says
            by itself from the prompt alone up to the end of the statement.
        perplexity: of ordinary text; count is in tokens.
    """

    def __init__(
        self,
        llm: LLM,
        requests: Sequence[EditRequest],
        options: EvaluationOptions | None = None,
        trainer: TrainerOptions | None = None,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        if not requests:
            raise UserError("requests: none to measure")
        self.llm = llm
        self.requests = list(requests)
        self.numbers = set(range(len(self.requests)))  # of those that are measured
        self.options = options or EvaluationOptions()
        self.trainer = trainer or TrainerOptions()
        self.first_choices: dict[int, torch.Tensor] = {}  # of locality rows, in the first measurement
        pad = partial(collate_targets, pad_token_id=llm.pad_token_id)
        self.kinds = tuple(kinds)
        size = self.options.batch_size
        streams: dict[str, Callable[[], Any]] = {
            "probes": lambda: (encode_probes(llm, self.requests), pad, size),
            "generation": lambda: (
                encode_prompts(llm, [r.prompt for r in self.requests], self.options.max_new_tokens),
                lambda rows: collate_prompts(rows, llm.pad_token_id),
                size,
            ),
            "text": lambda: (encode_text(llm, self.options.text), pad, 1),
        }
        self.data = ListDataModule(*(streams[kind]() for kind in self.kinds))

    def only(self, numbers: Collection[int], kinds: Sequence[str] = KINDS) -> Evaluator:
        """An evaluator of some of the requests, by their numbers; what was measured first of them still counts."""
        part = copy(self)
        part.numbers = set(numbers)
        part.kinds = tuple(kind for kind in self.kinds if kind in kinds)
        belongs: dict[str, Callable[[Any], bool]] = {
            "probes": lambda row: row.tag.request in part.numbers,
            "generation": lambda row: row.index in part.numbers,
            "text": lambda row: True,
        }
        part.data = ListDataModule(
            *(
                (list(filter(belongs[kind], rows)), collate, size)
                for kind, (rows, collate, size) in zip(self.kinds, self.data.streams, strict=True)
                if kind in part.kinds
            )
        )
        return part

    def measure(self, title: str) -> Measurement:
        """Figures of the model as it is now."""
        module = EvaluationModule(self)
        with self.llm.frozen():
            trainer = build_trainer(self.trainer, title)
            check_shares(trainer, len(self.numbers))
            answers = dict(predict(trainer, module, self.data))
        return Measurement(module.metrics, [answers.get(index, "") for index in range(len(self.requests))])


class EvaluationModule(LightningModule):
    """Wraps the LLM for one measurement: stream 0 holds probes, 1 prompts to answer, 2 windows of text."""

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__()
        self.model = evaluator.llm.model
        self.evaluator = evaluator
        measured = [evaluator.requests[number] for number in sorted(evaluator.numbers)]
        counted = {name for request in measured for name, texts in probe_texts(request).items() if texts}
        names = [name for name in PROBE_METRICS if name in counted and "probes" in evaluator.kinds]
        names += [metric for kind, metric in OTHER_METRICS.items() if kind in evaluator.kinds]
        self.means = torch.nn.ModuleDict({name: BootstrapMean() for name in names})
        self.metrics: Metrics = {}

    def predict_step(
        self, batch: TargetBatch | PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[tuple[int, str]]:
        """Count a batch; of prompts, return (request number, answer) pairs."""
        if isinstance(batch, PromptBatch):
            return self._answer(batch)
        logits_NV = target_logits(self.model, batch)
        if isinstance(batch.tags[0], ProbeTag):
            self._count_probes(batch, logits_NV.argmax(-1))
        else:
            self._count_text(batch, logits_NV)
        return []

    def _answer(self, batch: PromptBatch) -> list[tuple[int, str]]:
        evaluator = self.evaluator
        texts = greedy(evaluator.llm, batch, evaluator.options.max_new_tokens)
        exact = [
            float(is_exact_answer(text, evaluator.requests[index].new_answer))
            for index, text in zip(batch.indices, texts, strict=True)
        ]
        ones = [1.0] * len(exact)
        self._mean("generation_exact_match").update(exact, ones, batch.indices, ones)
        return list(zip(batch.indices, texts, strict=True))

    def _count_probes(self, batch: TargetBatch, choice_N: torch.Tensor) -> None:
        expected_N = batch.target_N.clone()
        for row, tag in enumerate(batch.tags):
            if tag.metric == "locality":
                here_N = batch.row_N == row
                first = self.evaluator.first_choices.setdefault(tag.row, choice_N[here_N].cpu())
                expected_N[here_N] = first.to(expected_N)
        hits_B = batch.row_means((choice_N == expected_N).double()).tolist()
        for metric in PROBE_METRICS:
            rows = [(hit, tag) for hit, tag in zip(hits_B, batch.tags, strict=True) if tag.metric == metric]
            if rows:
                shares = [tag.share for _, tag in rows]
                units = [tag.request for _, tag in rows]
                self._mean(metric).update([hit for hit, _ in rows], shares, units, shares)

    def _count_text(self, batch: TargetBatch, logits_NV: torch.Tensor) -> None:
        losses_B = batch.row_means(F.cross_entropy(logits_NV, batch.target_N, reduction="none"))
        if not losses_B.isfinite().all():
            raise UserError("evaluation: the model's loss on ordinary text is not a number: its weights are broken")
        tokens = torch.bincount(batch.row_N).tolist()
        self._mean("perplexity").update(losses_B.tolist(), tokens, batch.tags, tokens)

    def _mean(self, name: str) -> BootstrapMean:
        mean = self.means[name]
        assert isinstance(mean, BootstrapMean)
        return mean

    def on_predict_end(self) -> None:
        """The figures over all ranks; perplexity is the exponential of the mean loss."""
        self.metrics = {name: self._mean(name).compute() for name in self.means}
        if loss := self.metrics.get("perplexity"):
            self.metrics["perplexity"] = Estimate(
                math.exp(loss.mean), loss.count, math.exp(loss.low), math.exp(loss.high)
            )


def probe_texts(request: EditRequest) -> dict[str, list[tuple[str, str]]]:
    """(prompt, answer) texts of a request by metric."""
    return {
        "rewrite": [(request.prompt, request.new_answer)],
        "rephrase": [(rephrase, request.new_answer) for rephrase in request.rephrases],
        "locality": [(probe.prompt, probe.answer) for probe in request.locality],
        "portability": [(probe.prompt, probe.answer) for probe in request.portability],
    }


def encode_probes(llm: LLM, requests: Sequence[EditRequest]) -> list[TargetRow]:
    """Every probe of every request as a row, shortest first; a request's probes of a kind share its weight."""
    pairs: list[tuple[str, str]] = []
    tags: list[ProbeTag] = []
    for number, request in enumerate(requests):
        for metric, texts in probe_texts(request).items():
            for text in texts:
                tags.append(ProbeTag(metric, number, 1 / len(texts), len(tags)))
                pairs.append(text)
    return sorted(encode(llm, pairs, tags), key=lambda row: len(row.token_ids))


def encode_text(llm: LLM, file: str | None) -> list[TargetRow]:
    """Ordinary text as windows in which all tokens but the first are scored; tags are the windows' numbers.

    Raises:
        UserError: when there is no such file, or it holds fewer than two tokens.
    """
    path = Path(file) if file else ORDINARY_TEXT
    try:
        (ids,) = tokenize(llm, [path.read_text(encoding="utf-8")])
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text: {path}: cannot be read; expected a plain UTF-8 text file ({error})") from None
    window = min(WINDOW, llm.context_length or WINDOW)
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    rows = [TargetRow(part, 1, number) for number, part in enumerate(windows) if len(part) > 1]
    if not rows:
        raise UserError(f"text: {path}: {len(ids)} tokens are too few for perplexity")
    return rows

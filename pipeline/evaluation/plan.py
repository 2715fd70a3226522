"""What a measurement consists of, known before any of it is read: texts, questions, and batches of like length."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.answering import Question
from pipeline.requests.answers import inner_ends
from pipeline.evaluation.divergence import MOST_PROBES, compared_offsets
from pipeline.evaluation.reading import collate
from pipeline.evaluation.readings import kept_file
from pipeline.evaluation.rows import pack
from pipeline.evaluation.texts import (
    Asked,
    Scored,
    ScoredTexts,
    asked_prompts,
    evenly,
    ordinary_windows,
    scored_answers,
)
from pipeline.files import cache_folder
from pipeline.model import LLM, TargetRow
from pipeline.model.generation import encode_prompts
from pipeline.model.targets import tokenize
from pipeline.options import EvaluationOptions, TrainerOptions
from pipeline.requests import EditRequest, ListDataModule, in_batches

ROOM = 8  # tokens that an answer may take beyond those of the answer looked for
KINDS = ("generation", "probes", "probability", "text", "divergence", "fluency")


class Plan:
    """All that is put to a model to measure it on requests.

    Args:
        llm: the model, for its tokens.
        requests: what to measure on.
        options: how to measure.
        kinds: what to measure, of KINDS.

    Attributes:
        texts: scored texts with their target tokens, by number.
        rows: what is read to score them.
        asked: prompts to be answered.
        question_of: the number of each asked prompt's question; prompts that are the same share one.
        questions: what is gone on from.
        essays: requests of long generations, by their question's number.
        offsets: of texts whose next-token distributions are compared: at which scored tokens.

    Raises:
        UserError: for no requests, or texts that cannot be measured.
    """

    def __init__(
        self, llm: LLM, requests: Sequence[EditRequest], options: EvaluationOptions, kinds: Sequence[str]
    ) -> None:
        if not requests:
            raise UserError("requests: none to measure")
        self.llm = llm
        self.requests = list(requests)
        self.options = options
        self.kinds = tuple(kinds)
        self.texts: ScoredTexts = {}
        self.rows = pack(self._score())
        self.offsets = self._compare() if "divergence" in kinds else {}
        self.asked: list[Asked] = []
        self.question_of: list[int] = []
        self.questions: list[Question] = []
        self.essays: dict[int, int] = {}
        if "generation" in kinds and options.generation != "none":
            self._ask()
        if "fluency" in kinds and options.fluency:
            self._ask_at_length()

    def _score(self) -> list[TargetRow]:
        scored: list[Scored] = []
        rows: list[TargetRow] = []
        if "probes" in self.kinds:
            scored, rows = scored_answers(self.llm, self.requests, "probability" in self.kinds)
        if "text" in self.kinds:
            windows = ordinary_windows(self.llm, self.options)
            scored += [Scored("text", number) for number in range(len(windows))]
            rows += windows
        targets = [row.token_ids[row.target_start :] for row in rows]
        self.texts = dict(enumerate(zip(scored, targets, strict=True)))
        return rows

    def _compare(self) -> dict[int, range]:
        own = {number: text for number, (text, _) in self.texts.items() if not text.rival}
        probes = evenly([number for number, text in own.items() if text.kind == "locality"], MOST_PROBES)
        windows = [number for number, text in own.items() if text.kind == "text"]
        return {n: compared_offsets(own[n].kind, len(self.texts[n][1])) for n in [*probes, *windows]}

    def _ask(self) -> None:
        """Each different prompt is one question, with room for every answer that is looked for."""
        self.asked = list(asked_prompts(self.requests, self.options.generation))
        looked_for: dict[str, list[str]] = {}
        for one in self.asked:
            looked_for.setdefault(one.prompt, []).append(one.answer)
        numbers = {prompt: number for number, prompt in enumerate(looked_for)}
        self.question_of = [numbers[one.prompt] for one in self.asked]
        answers = list(looked_for.values())
        lengths = {one.answer: 0 for one in self.asked}
        lengths = dict(zip(lengths, map(len, tokenize(self.llm, list(lengths))), strict=True))
        most = self.options.max_new_tokens
        for row in encode_prompts(self.llm, list(looked_for), most):
            here = answers[row.index]
            limit = min(most, max(lengths[answer] for answer in here) + ROOM)
            self.questions.append(Question(row.token_ids, row.index, limit, max(map(inner_ends, here))))

    def _ask_at_length(self) -> None:
        first, limit = len(self.questions), self.options.fluency_tokens
        chosen = evenly(range(len(self.requests)), self.options.fluency)
        for row in encode_prompts(self.llm, [self.requests[number].prompt for number in chosen], limit):
            self.questions.append(Question(row.token_ids, first + row.index, limit, None))
            self.essays[first + row.index] = chosen[row.index]

    def only(self, numbers: Collection[int], kinds: Sequence[str]) -> Plan:
        """The part for some of the requests and kinds; requests, texts and questions keep their numbers."""
        part, wanted = copy(self), set(numbers)
        part.kinds = tuple(kind for kind in self.kinds if kind in kinds)

        def is_in(text: Scored) -> bool:
            if text.kind == "text":
                return "text" in part.kinds
            return "probes" in part.kinds and text.request in wanted and ("probability" in kinds or not text.rival)

        part.texts = {number: text for number, text in self.texts.items() if is_in(text[0])}
        part.rows = [row for row in self.rows if any(span.number in part.texts for span in row.spans)]
        compared = self.offsets if "divergence" in kinds else {}
        part.offsets = {number: offsets for number, offsets in compared.items() if number in part.texts}
        asked = zip(self.asked, self.question_of, strict=True) if "generation" in kinds else ()
        chosen = [(one, question) for one, question in asked if one.request in wanted]
        part.asked, part.question_of = [one for one, _ in chosen], [question for _, question in chosen]
        essays = self.essays.items() if "fluency" in kinds else ()
        part.essays = {question: request for question, request in essays if request in wanted}
        needed = {*part.question_of, *part.essays}
        part.questions = [question for question in self.questions if question.number in needed]
        return part

    def data(self) -> ListDataModule:
        """All batches.

        Ordinary text is a window a batch: all its tokens are scored, each against the whole vocabulary. Long
        generations are apart from answers, which end sooner.
        """
        most, tokens = self.options.batch_size, self.options.batch_tokens
        windows = [row for row in self.rows if self.texts[row.spans[0].number][0].kind == "text"]
        probes = [row for row in self.rows if self.texts[row.spans[0].number][0].kind != "text"]
        batches: list[list[Any]] = in_batches(probes, lambda row: len(row.token_ids), most, tokens)
        batches += [[window] for window in windows]
        for long in (False, True):
            alike = [question for question in self.questions if (question.inner_ends is None) == long]
            batches += in_batches(alike, lambda question: len(question.token_ids), most, tokens)
        pad = partial(collate, pad_token_id=self.llm.pad_token_id)
        return ListDataModule((batches, pad, 1))

    def file(self, trainer: TrainerOptions) -> Path:
        """Where the base model's readings of all this are kept."""
        return kept_file(
            cache_folder(self.options.cache),
            self.llm.fingerprint,
            next(self.llm.model.parameters()).dtype,
            trainer.precision,
            self.texts,
            self.rows,
            self.questions,
            self.offsets,
        )

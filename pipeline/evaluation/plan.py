"""What a measurement consists of, known before any of it is read: texts and questions."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from copy import copy

from pipeline.errors import UserError
from pipeline.evaluation.texts import Text, evenly, free_prompts, ordinary_windows, probe_rows
from pipeline.model.generation import Question, questions
from pipeline.model.llm import LLM
from pipeline.options.evaluation import EvaluationOptions
from pipeline.requests.answers import inner_ends
from pipeline.requests.rows import Row, pack
from pipeline.requests.schema import EditRequest

ROOM = 8  # tokens that an answer may take beyond those of the answer looked for
FLUENCY_TOKENS = 100  # length of what is generated for fluency
MOST_COMPARED = 2000  # locality probes whose next token's distribution is compared
KINDS = ("generation", "probes", "probability", "text", "divergence", "fluency")


class Plan:
    """All that is put to a model to measure it on requests.

    Args:
        llm: the model, for its tokens.
        requests: what to measure on.
        options: how to measure.
        kinds: what to measure, of KINDS.

    Attributes:
        texts: what is read, each tagged with the `Text` that it stands for.
        compared: those of them whose next-token distributions are compared with the base's.
        prompts: what is answered freely.
        questions: their prompts, each once, as questions.
        long: by request, questions that the model goes on from at length.

    Raises:
        UserError: for no requests, or texts that cannot be measured.
    """

    def __init__(
        self, llm: LLM, requests: Sequence[EditRequest], options: EvaluationOptions, kinds: Sequence[str]
    ) -> None:
        if not requests:
            raise UserError("requests: none to measure")
        self.requests = list(requests)
        self.texts: list[Row] = []
        if "probes" in kinds:
            self.texts += probe_rows(llm, requests, "probability" in kinds)
        if "text" in kinds:
            self.texts += ordinary_windows(llm, options.text)
        self.compared = self._compared() if "divergence" in kinds else set()
        asks = "generation" in kinds and options.generation != "none"
        self.prompts = list(free_prompts(requests, options.generation)) if asks else []
        self.questions = self._questions(llm, options.max_new_tokens)
        chosen = evenly(range(len(requests)), options.fluency) if "fluency" in kinds else []
        prompts = [requests[number].prompt for number in chosen]
        self.long = dict(zip(chosen, questions(llm, prompts, FLUENCY_TOKENS), strict=True))

    def _compared(self) -> set[Text]:
        own = [row.tag for row in self.texts if not row.tag.rival]
        probes = [text for text in own if text.kind == "locality"]
        return {*evenly(probes, MOST_COMPARED), *(text for text in own if text.kind == "text")}

    def _questions(self, llm: LLM, most: int) -> dict[str, Question]:
        """Each different prompt is one question, with room for every answer that is looked for."""
        answers: dict[str, list[str]] = {}
        for one in self.prompts:
            answers.setdefault(one.prompt, []).append(one.answer)
        different = list({one.answer: None for one in self.prompts})
        lengths = dict(zip(different, map(len, llm.tokens.texts(different)), strict=True))
        asked = zip(answers.items(), questions(llm, list(answers), most), strict=True)
        return {
            prompt: question._replace(
                limit=min(most, max(lengths[answer] for answer in here) + ROOM),
                inner_ends=max(map(inner_ends, here)),
            )
            for (prompt, here), question in asked
        }

    def only(self, numbers: Collection[int], kinds: Sequence[str]) -> Plan:
        """The part for some of the requests and kinds; requests keep their numbers."""
        part, wanted = copy(self), set(numbers)

        def is_in(text: Text) -> bool:
            if text.kind == "text":
                return "text" in kinds
            return "probes" in kinds and text.request in wanted and ("probability" in kinds or not text.rival)

        part.texts = [row for row in self.texts if is_in(row.tag)]
        part.compared = {text for text in self.compared if is_in(text)} if "divergence" in kinds else set()
        part.prompts = [one for one in self.prompts if "generation" in kinds and one.request in wanted]
        part.questions = {one.prompt: self.questions[one.prompt] for one in part.prompts}
        part.long = {n: question for n, question in self.long.items() if "fluency" in kinds and n in wanted}
        return part

    def groups(self) -> list[list[Row]]:
        """Texts by the row that they are read in: probes share rows, a window of ordinary text has its own."""
        windows = [[row] for row in self.texts if row.tag.kind == "text"]
        return pack([row for row in self.texts if row.tag.kind != "text"]) + windows

    def digest(self, *depends: object) -> str:
        """A name for what is read of all this, given what it depends on besides."""
        content = (*depends, self.texts, sorted(map(repr, self.compared)), self.questions, self.long)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:24]

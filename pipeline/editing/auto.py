"""One edit by two methods, request by request: what a subject's value carries is located, the rest is fine-tuned.

A value at the subject's last token holds a few tokens of one answer, and is read where a statement goes on from its
subject. Questions, whose subject stands far from the answer, long answers, several facts about one subject and
prompts without a subject are better learnt by fine-tuning of the same block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pipeline.editing import solvers
from pipeline.editing.finetune import make_finetune
from pipeline.editing.locate import STACKED, LocateSettings, LocateThenEdit
from pipeline.editing.method import register
from pipeline.errors import note
from pipeline.model.llm import LLM
from pipeline.options.base import Count
from pipeline.options.editing import EditOptions
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import about
from pipeline.running.trainer import Runtime

QUESTION_MARKS = ("?", "？", "؟")


@dataclass(kw_only=True)
class AutoSettings(LocateSettings):
    """memit's settings; fine-tuning has its own by default."""

    long: Count = 8
    """Answers of more tokens than this are fine-tuned."""


class Auto(LocateThenEdit):
    """memit for the requests that it suits, after fine-tuning of the others.

    Attributes:
        tuning: the fine-tuning of the same blocks.
        located_names: the weights that memit changes, by full name.
    """

    settings: AutoSettings

    def __init__(
        self, llm: LLM, layers: Sequence[int], options: EditOptions, earlier: Mapping[str, Tensor] | None = None
    ) -> None:
        def solver(own: LocateSettings) -> partial[Tensor]:
            return partial(solvers.memit, strength=own.strength)

        super().__init__(llm, layers, options, earlier, solver=solver, by_all_keys=True)
        self.tuning = make_finetune(llm, layers, options.by("finetune"))
        self.located_names, self.weight_names = self.weight_names, self.tuning.weight_names  # those are among these

    def run(self, requests: Sequence[EditRequest], runtime: Runtime, earlier: Sequence[EditRequest] = ()) -> None:
        """Fine-tune what memit does not suit, then locate the rest in the model as it is then."""
        located = self.suited(requests, earlier)
        ids = {request.id for request in located}
        tuned = [request for request in requests if request.id not in ids]
        if tuned:
            note(
                f"edit: {len(tuned)} of {len(requests)} requests are fine-tuned (questions, answers of more than "
                f"{self.settings.long} tokens, several facts about one subject, prompts without their subject), "
                f"{len(located)} by memit"
            )
            self.tuning.run(tuned, runtime, earlier)
        else:
            self.weight_names = self.located_names
        if located:
            super().run(located, runtime, [*earlier, *tuned])

    def suited(self, requests: Sequence[EditRequest], earlier: Sequence[EditRequest]) -> list[EditRequest]:
        """The requests whose answers a value at the subject's last token carries."""
        lengths = map(len, self.llm.tokens.texts([request.new_answer for request in requests]))
        facts = Counter(map(about, [*earlier, *requests]))
        return [
            request
            for request, length in zip(requests, lengths, strict=True)
            if request.names_subject
            and length <= self.settings.long
            and facts[about(request)] == 1
            and not request.prompt.rstrip().endswith(QUESTION_MARKS)
        ]


register("auto", Auto, AutoSettings, solves_anew=True, stacked=STACKED)

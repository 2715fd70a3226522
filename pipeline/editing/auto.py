"""One edit by two methods, request by request: what a subject's value carries is located, the rest is fine-tuned.

A value at the subject's last token holds a few tokens of one answer, and is read where a statement goes on from its
subject. Questions, whose subject stands far from the answer, long answers, several facts about one subject and
prompts without a subject are better learnt by fine-tuning of the same block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.editing.columns import owner, owners_in
from pipeline.editing.contexts import is_question
from pipeline.editing.finetune import make_finetune
from pipeline.editing.locate import STACKED, LocateSettings, LocateThenEdit, memit_solver
from pipeline.editing.method import register
from pipeline.errors import note
from pipeline.model.llm import LLM
from pipeline.options.base import Count
from pipeline.options.editing import EditOptions
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import about
from pipeline.running.trainer import Runtime


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
        super().__init__(llm, layers, options, earlier, solver=memit_solver, by_all_keys=True)
        self.tuning = make_finetune(llm, layers, options.by("finetune"))
        self.located_names, self.weight_names = self.weight_names, self.tuning.weight_names  # those are among these

    def run(self, requests: Sequence[EditRequest], runtime: Runtime, earlier: Sequence[EditRequest] = ()) -> None:
        """Locate what memit suits, then fine-tune all in every form, with what the model says before as a guide."""
        suits = self.suits(requests, earlier)
        located, tuned = (
            [one for one, suit in zip(requests, suits, strict=True) if suit == side] for side in (1, 0)
        )
        if replaced := [one for one in tuned if owner(one) in owners_in(self.state)]:
            self.leave_out(replaced, runtime, earlier)  # what memit was asked for them goes
        note(f"edit: {len(located)} of {len(requests)} requests begin with memit's columns; all are fine-tuned")
        (courses,) = self.tuning.lessons([requests], runtime)
        if located:
            super().run(located, runtime, [*earlier, *tuned])
        self.tuning.find_whiteners(runtime)
        self.tuning.fit(courses, runtime)

    def suits(self, requests: Sequence[EditRequest], earlier: Sequence[EditRequest]) -> list[bool]:
        """Whether a value at the subject's last token carries each request's answer."""
        facts = Counter(map(about, [*earlier, *requests]))
        return [
            request.names_subject
            and len(row.targets) <= self.settings.long
            and facts[about(request)] == 1
            and not is_question(request.prompt)
            for request, row in zip(requests, self.llm.tokens.answered(requests), strict=True)
        ]


register("auto", Auto, AutoSettings, solves_anew=True, stacked=STACKED)

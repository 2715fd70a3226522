"""One edit by two methods: what a subject's value carries is located, then all is fine-tuned in every form.

A value at the subject's last token makes a subject say its new answer wherever it is named, which rewordings need,
but bends what else is said of it. Fine-tuning then teaches every form of asking, statements and chat, and brings
other relations of the subject back; gently, after many; not at all, after hundreds. It trains the golden layer and
two blocks further up: its own best blocks are late ones, values' are early ones. Questions, whose subject stands
far from the answer, long answers, several facts about one subject and prompts without one are fine-tuned alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from pipeline.editing.contexts import is_question
from pipeline.editing.finetune import make_finetune
from pipeline.editing.locate import LocateSettings, LocateThenEdit, memit_solver
from pipeline.editing.method import register
from pipeline.errors import note
from pipeline.model.llm import LLM
from pipeline.options.base import Count
from pipeline.options.editing import EditOptions
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import about
from pipeline.running.trainer import Runtime

NAMED = 5  # requests, in a note
HUNDREDS = 256  # located requests: beyond, training would take hours
MANY = 32  # requests: beyond, training takes so many steps that it bends other texts
AFTER_FEW: dict[str, Any] = {"kl": 2.0}  # what a value bends of its subject is to come back
AFTER_MANY: dict[str, Any] = {
    **{"epochs": 16, "learning_rate": 0.003, "last_step": 0.1},
    **{"kl": 3.0, "kept": 4, "sparing": 0.6},
}
MANY_LONG: dict[str, Any] = {"epochs": 16, "kl": 1.2, "sparing": 0.5}  # a long answer teaches much in each step


@dataclass(kw_only=True)
class AutoSettings(LocateSettings):
    """memit's settings, and fine-tuning's."""

    long: Count = 8
    """Answers of more tokens than this are fine-tuned alone."""
    depths: list[float] = field(default_factory=lambda: [0.4, 0.67])
    """Further blocks that are fine-tuned beside the golden layers, each by its depth in the model: 0 to 1."""
    tuning: dict[str, Any] = field(default_factory=dict)
    """Settings of the fine-tuning, by name, such as {"epochs": 20}; others follow from how many were located."""


class Auto(LocateThenEdit):
    """memit for the requests that it suits, then fine-tuning of all, which cannot be left out again."""

    settings: AutoSettings

    def __init__(
        self, llm: LLM, layers: Sequence[int], options: EditOptions, earlier: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(llm, layers, options, earlier, solver=memit_solver)
        expert = {"depths": self.settings.depths, **self.settings.tuning}
        self.tuning = make_finetune(llm, layers, replace(options, method="finetune", expert=expert))
        self.located_names = self.weight_names
        self.weight_names = list(dict.fromkeys([*self.tuning.weight_names, *self.weight_names]))
        self.moments_of = list(dict.fromkeys([*self.moments_of, *self.tuning.moments_of]))

    def run(self, requests: Sequence[EditRequest], runtime: Runtime, earlier: Sequence[EditRequest] = ()) -> None:
        """Locate, then fine-tune; what is to stay is read before either, off the model as it is given."""
        reasons = self.unfit(requests, earlier)
        located, others = (
            [one for one, why in zip(requests, reasons, strict=True) if bool(why) == side] for side in (0, 1)
        )
        if others:
            named = [f"{one.id} ({why})" for one, why in zip(requests, reasons, strict=True) if why]
            named = named[:NAMED] + [f"and {len(named) - NAMED} more"] * (len(named) > NAMED)
            of = f"{len(others)} of {len(requests)} requests"
            note(f"edit: fine-tuned alone, not after memit: {of}: {', '.join(named)}")
        usual: dict[str, Any] = {}
        alone = len(located) > HUNDREDS and not self.settings.tuning
        if alone:
            note(f"edit: {len(located)} requests are taught by memit alone; expert.tuning adds fine-tuning")
            self.weight_names = self.weight_names if others else self.located_names
        elif len(located) > len(others):
            usual = AFTER_MANY if len(located) > MANY else AFTER_FEW
        elif sum(len(row.targets) > self.settings.long for row in self.llm.tokens.answered(others)) > MANY:
            usual = MANY_LONG
        self.tuning.settings = replace(self.tuning.settings, **usual | self.settings.tuning)
        tuned = others if alone else requests
        courses = self.tuning.lessons([tuned], runtime) if tuned else []
        if located:
            super().run(located, runtime, [*earlier, *others])
            self.tuning.after_values = not alone
        self.state, self.tuning.moments = {}, self.moments
        for course in courses:
            self.tuning.fit(course, runtime)

    def unfit(self, requests: Sequence[EditRequest], earlier: Sequence[EditRequest]) -> list[str]:
        """Why a value at the subject's last token does not carry each request's answer; empty where it does.

        At a text's first token a decoder puts what belongs to no token (an attention sink): nothing is read there.
        """
        facts, found = Counter(map(about, [*earlier, *requests])), list[str]()
        for request, row in zip(requests, self.llm.tokens.answered(requests), strict=True):
            reasons = {
                "a question": is_question(request.prompt),
                "no subject after its beginning": row.subject is None or row.subject[1] == 0,
                "a long answer": len(row.targets) > self.settings.long,
                "one of several facts about its subject": facts[about(request)] > 1,
            }
            found.append(next((reason for reason, holds in reasons.items() if holds), ""))
        return found


register("auto", Auto, AutoSettings, solves_anew=True, tried_as="memit")

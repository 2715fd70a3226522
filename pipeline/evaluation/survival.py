"""Which of an update's facts the edited model still gives in another form: quantised, and read again."""

from __future__ import annotations

from pipeline.editing.update import WeightUpdate
from pipeline.evaluation.evaluator import Evaluator, Measurement
from pipeline.evaluation.plan import evenly
from pipeline.model.llm import LLM
from pipeline.options.shared import EvaluationOptions
from pipeline.requests.schema import EditRequest

MOST_FACTS = 300  # that are asked


def facts_of(update: WeightUpdate) -> list[EditRequest]:
    """An update's facts, or a part of many, spread over all of them."""
    return evenly(update.requests, MOST_FACTS)


def ask_facts(llm: LLM, update: WeightUpdate, title: str) -> Measurement:
    """What the model as it is now says to the prompts of `facts_of` an update, put as they were taught.

    Raises:
        UserError: when the update holds no facts, or one does not fit the model's context.
    """
    asked = LLM(llm.model, llm.tokenizer, llm.name, update.chat, llm.fingerprint)
    how = EvaluationOptions(generation="prompts")
    return Evaluator(asked, facts_of(update), how, kinds=("generation",)).measure(title)


def survival(
    update: WeightUpdate, before: Measurement, after: Measurement
) -> tuple[str, list[tuple[str, str, str]]]:
    """How many facts are given, as a line; and of those that are no more: the id, what is asked, what is said."""
    facts = facts_of(update)
    had, has = (one.values["generation_containment"].values for one in (before, after))
    now, then = (f"{sum(given.values()):.0f} of {len(facts)}" for given in (has, had))
    part = f"; {len(facts)} of {len(update.requests)} facts were asked" if len(facts) < len(update.requests) else ""
    line = f"facts that the file gives: {now} ({then} before quantising{part})"
    return line, [(facts[number].id, asked, says) for number, asked, says in after.missed if had[number]]

"""`run.py demo`: a guided run on a handful of facts, from the old answers to the new ones and back.

It is also the pipeline from Python in a page: every step is one call of the public functions.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.attribution.find import find_golden_layer
from pipeline.editing.editor import edit
from pipeline.evaluation.evaluator import evaluate
from pipeline.model.fingerprints import sample
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.options.commands import DemoCommand
from pipeline.options.editing import EditOptions
from pipeline.reporting.run_log import RunLog
from pipeline.reporting.terminal import say, show_answers
from pipeline.requests.answers import first_statement
from pipeline.requests.readers import load_requests
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import split_by_subject
from pipeline.shipped import program

Said = dict[str, str]  # what a model says, by prompt


def show(llm: LLM, options: DemoCommand, log: RunLog) -> None:
    """Go through the steps; what is found and made is kept as `run` keeps it."""
    proxy, others = split_by_subject(load_requests("demo"), 0.5, options.seed)
    facts = others[:: len(others) // options.facts][: options.facts]
    prompts, reworded = [fact.prompt for fact in facts], [fact.rephrases[0] for fact in facts]

    step(1, f"What {llm.name} says today")
    say(f"A language model goes on from a prompt with what it knows. {len(facts)} facts are to change:")
    before = ask(llm, options, facts)
    compare(prompts, {"it says": before, "it shall say": {fact.prompt: fact.new_answer for fact in facts}})

    step(2, "Find the golden layer")
    say(
        f"Which of its {len(llm.blocks)} blocks takes an edit best? For each of {len(proxy)} other requests, the "
        "gradient that makes the old answer likelier is compared with the one that makes the new answer likelier, "
        "block by block. No edit is tried."
    )
    profile = find_golden_layer(llm, proxy, None, options.trainer, "demo", options.seed)
    log.keep_profile(profile)

    step(3, f"Edit block {profile.golden_layers[0]}, and nothing else")
    say(
        "What this block should put out for each subject is searched for all facts together; then its "
        "down-projection is solved for in closed form, so that ordinary text goes through as before."
    )
    how = EditOptions(method="memit")
    update = edit(llm, facts, profile, how, options.trainer, log.loggers, options.seed)

    step(4, "Ask again, also in other words")
    with update.applied(llm):
        after = ask(llm, options, facts)
    compare([*prompts, *reworded], {"before": before, "after": after})

    step(5, "What else moved")
    near = before.keys() - {*prompts, *reworded}
    moved = [prompt for prompt in before if prompt in near and before[prompt] != after[prompt]]
    say(f"Of {len(near)} prompts about other things of the same kind, {len(moved)} are answered otherwise now.")
    if moved:
        compare(moved[:4], {"before": before, "after": after})
    with log.keeping(update):
        measured = evaluate(llm, facts, update, trainer=options.trainer)
    log.keep_metrics(llm.name, facts, measured, update, profile)

    step(6, "Undo")
    same = sample(llm.model) == llm.sample and ask(llm, options, facts) == before
    say(
        "Applying an update is replacing a tensor, undoing it is putting the old one back. Every weight and every "
        f"answer is {'what it was, bit for bit' if same else 'NOT what it was'}.",
        f"The update, its report and figures are kept in {log.folder}. From here:",
        f'  {program()} generate --update {log.folder} --prompt "{facts[0].prompt}"',
        f"  {program()} edit --requests facts.jsonl --profile {log.folder}",
        f"  tensorboard --logdir {log.folder.parent}",
    )


def step(number: int, title: str) -> None:
    """A step's head line."""
    say("", f"{number} of 6: {title}", "")


def ask(llm: LLM, options: DemoCommand, facts: Sequence[EditRequest]) -> Said:
    """What the model says to every prompt of the facts, also in other words, and to their neighbours."""
    asked = [(fact.prompt, fact.rephrases[0], *(probe.prompt for probe in fact.locality)) for fact in facts]
    prompts = list(dict.fromkeys(prompt for one in asked for prompt in one))
    said = generate(llm, prompts, max_new_tokens=8, trainer=options.trainer, title="Asking")
    return dict(zip(prompts, map(first_statement, said), strict=True))


def compare(prompts: Sequence[str], sides: dict[str, Said]) -> None:
    """What each side says to these prompts."""
    show_answers(prompts, {side: [said[prompt] for prompt in prompts] for side, said in sides.items()})

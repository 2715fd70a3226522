"""`run.py demo`: a guided run on a handful of facts, from the old answers to the new ones and back.

It is also the pipeline from Python in a page: every step is one call of the public functions.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from pipeline.attribution import GoldenProfile, find_golden_layer
from pipeline.editing import edit
from pipeline.evaluation import evaluate
from pipeline.model.generation import generate
from pipeline.model.llm import LLM, fingerprint
from pipeline.options import AttributionOptions, DemoCommand, EditOptions, StatisticsOptions
from pipeline.reporting import RunLog, say, show_answers
from pipeline.requests import load_requests, split_by_subject
from pipeline.requests.answers import contains_answer, first_statement
from pipeline.shipped import program

STEPS = 6
BARS = "▁▂▃▄▅▆▇█"
MOVED_SHOWN = 4  # of the neighbours that moved
ANSWER_TOKENS = 8


def show(llm: LLM, options: DemoCommand, log: RunLog) -> None:
    """Go through the steps; what is found and made is kept as `run` keeps it."""
    proxy, others = split_by_subject(load_requests("demo"), 0.5, options.seed)
    facts = others[:: len(others) // options.facts][: options.facts]
    prompts = [fact.prompt for fact in facts]
    reworded = [fact.rephrases[0] for fact in facts]
    answer_of = {probe.prompt: probe.answer for fact in facts for probe in fact.locality}

    def ask(title: str) -> dict[str, str]:
        asked = list(dict.fromkeys([*prompts, *reworded, *answer_of]))
        said = generate(llm, asked, ANSWER_TOKENS, trainer=options.trainer, title=title)
        return dict(zip(asked, map(first_statement, said), strict=True))

    step(1, f"What {llm.name} says today")
    tell(f"A language model goes on from a prompt with what it knows. {len(facts)} facts are to change:")
    before = ask("Asking")
    show_answers(prompts, {"it says": pick(before, prompts), "it shall say": [fact.new_answer for fact in facts]})

    step(2, "Find the golden layer")
    tell(
        f"Which of its {len(llm.blocks)} blocks takes an edit best? For each of {len(proxy)} other requests, the "
        "gradient that makes the old answer likelier is compared with the one that makes the new answer likelier, "
        "block by block. No edit is tried."
    )
    by_size = AttributionOptions(order="magnitude")  # the model knows the demo's answers (see the README)
    profile = find_golden_layer(llm, proxy, by_size, options.trainer, "demo", options.seed)
    log.keep_profile(profile)
    show_scores(profile)

    step(3, f"Edit block {profile.golden_layers[0]}, and nothing else")
    tell(
        "What this block should put out for each subject is searched for all facts together; then its "
        "down-projection is solved for in closed form, so that ordinary text goes through as before."
    )
    how = EditOptions(method="memit", statistics=StatisticsOptions(tokens=16000))
    update = edit(llm, facts, profile, how, options.trainer, log.tensorboard, options.seed)

    step(4, "Ask again, also in other words")
    with update.applied(llm):
        after = ask("Asking the edited model")
    both = [*prompts, *reworded]
    show_answers(both, {"before": pick(before, both), "after": pick(after, both)})

    step(5, "What else moved")
    moved = [prompt for prompt in answer_of if before[prompt] != after[prompt]]
    right = [
        sum(contains_answer(said[prompt], answer) for prompt, answer in answer_of.items())
        for said in (before, after)
    ]
    tell(
        f"Of {len(answer_of)} prompts about other things of the same kind, {right[0]} were right before and "
        f"{right[1]} are now; {len(answer_of) - len(moved)} word for word as before."
        + (" Some that are not:" if moved else "")
    )
    if moved:
        shown = moved[:MOVED_SHOWN]
        show_answers(shown, {"before": pick(before, shown), "after": pick(after, shown)})
    with log.keeping(update):
        measured = evaluate(llm, facts, update, trainer=options.trainer)
    log.keep_metrics(llm.name, facts, measured, update, profile)

    step(6, "Undo")
    same = fingerprint(llm.model) == llm.fingerprint and ask("Asking once more") == before
    tell(
        "Applying an update is replacing a tensor, undoing it is putting the old one back. Every weight and every "
        f"answer is {'what it was, bit for bit' if same else 'NOT what it was'}."
    )
    tell(f"The update, its report and figures are kept in {log.folder}. From here:")
    for command in (
        f'{program()} generate --update {log.folder} --prompt "{facts[0].prompt}"',
        f"{program()} edit --requests facts.jsonl --profile {log.folder}",
        f"tensorboard --logdir {log.folder.parent}",
    ):
        say(f"  {command}")


def pick(said: dict[str, str], prompts: Sequence[str]) -> list[str]:
    """The answers to these prompts."""
    return [said[prompt] for prompt in prompts]


@rank_zero_only
def step(number: int, title: str) -> None:
    """A step's head line."""
    console = Console()
    console.print()
    console.rule(f"[bold]{number} of {STEPS}: {title}[/bold]", align="left")


@rank_zero_only
def tell(text: str) -> None:
    """A few sentences, broken where the window ends."""
    Console().print(text, highlight=False, markup=False)


@rank_zero_only
def show_scores(profile: GoldenProfile) -> None:
    """The blocks' scores by size, a bar each; those outside the fences are dots."""
    inside = {block: abs(profile.scores[block]) for block in profile.ranking}
    highest = max(inside.values()) or 1.0
    bars = [
        BARS[round(inside[block] / highest * (len(BARS) - 1))] if block in inside else "·"
        for block in range(len(profile.scores))
    ]
    golden = profile.golden_layers[0]
    say(f"block 0 {''.join(bars)} {len(bars) - 1}   (·: set aside as an outlier)")
    say(" " * (len("block 0 ") + golden) + f"^ {golden}")

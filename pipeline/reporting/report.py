"""Reports in Markdown, for anyone: of an edit, what was changed, where, how well and how to undo it; of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.attribution.profile import GoldenProfile, Race
from pipeline.editing.update import WeightUpdate
from pipeline.errors import terminal_text
from pipeline.evaluation.evaluator import Evaluation
from pipeline.reporting.tables import (
    markdown_table,
    markdown_text,
    metric_table,
    metrics_of,
    not_measured,
    sides_of,
    study_table,
)
from pipeline.requests.schema import EditRequest
from pipeline.shipped import program

if TYPE_CHECKING:
    from pipeline.study.grid import Row
    from pipeline.study.study import Study

EXAMPLES = 8  # answers that are shown
MISSED = 50  # facts that do not hold, spelt out
OUTCOME = {
    "rephrase_containment": "asked in other words, the model by itself names the new answer in {:.0%}",
    "made_rephrase_containment": "asked in made words, it names it in {:.0%}",
    "made_chat_containment": "asked so in a chat, in {:.0%}",
    "generation_containment": "asked as given, it names it in {:.0%}",
    "generation_exact_match": "it says that and nothing more in {:.0%}",
    "locality/subject": "other probes about the same subject kept {:.0%} of their answers' tokens",
    "made_subject": "{:.0%} of made prompts about the same subject go on as before",
    "made_neighbour": "{:.0%} of made prompts with another name do",
    "sane_texts": "{:.0%} of long texts do not repeat themselves",
    "ability": "of the items of ability, {:.0%} are answered right",
    "rewrite": "teacher-forced it gives {:.0%} of the answers' tokens",
    "locality": "{:.0%} of unrelated answers' tokens stayed as they were",
}


def metrics_table(evaluation: Evaluation) -> str:
    """All metrics in their groups as a Markdown table; after an edit also the paired difference."""
    return markdown_table(*metric_table(metrics_of(evaluation), meanings=True))


def answers_table(requests: Sequence[EditRequest], evaluation: Evaluation) -> str:
    """The first prompts with what the model generates, before and after, as a Markdown table."""
    sides = sides_of(evaluation)
    rows = [
        [request.id, request.prompt, request.new_answer, *(measured.answers[place] for measured in sides.values())]
        for place, request in enumerate(requests[:EXAMPLES])
    ]
    return markdown_table(["id", "prompt", "wanted", *sides], rows)


def missed_table(requests: Sequence[EditRequest], evaluation: Evaluation) -> str:
    """The facts that do not hold, with what the edited model says, as a Markdown table; empty where all do."""
    missed = (evaluation.after or evaluation.before).missed
    rows = [[requests[at].id, asked, requests[at].new_answer, says] for at, asked, says in missed]
    more = f"\nAnd {len(rows) - MISSED} more: `values.csv` has all.\n" if len(rows) > MISSED else ""
    return markdown_table(["id", "asked", "wanted", "says"], rows[:MISSED]) + "\n" + more if rows else ""


def write_report(
    requests: Sequence[EditRequest],
    evaluation: Evaluation,
    update: WeightUpdate,
    profile: GoldenProfile | None,
    folder: Path,
) -> str:
    """The whole report of an edit."""
    layers = f"block{'s' * (len(update.layers) > 1)} {', '.join(map(str, update.layers))}"
    model, where = (terminal_text(text).replace("`", "'") for text in (update.model, str(folder)))
    changes = "; ".join(f"{markdown_text(name)} {change:.2%}" for name, change in evaluation.weights.items())
    parts = [
        f"# Edit of {markdown_text(update.model)}\n",
        f"{len(requests)} facts were changed by {markdown_text(update.method)} in {layers} alone. "
        f"{_outcome(evaluation)}\n",
        "## Before and after\n",
        metrics_table(evaluation) + "\n",
        f"{not_measured((evaluation.after or evaluation.before).metrics)}\n",
        "In brackets: 95% interval (a rate's is Wilson's, any other mean's the bootstrap's); the difference's is "
        "paired, over the same requests. By generation: greedy, from the prompt alone, to the statement's end. "
        "Teacher-forced figures give the model the answer so far, as EasyEdit does, and so look better than what "
        "it says by itself.\n",
        "In plain words: containment asks whether the new answer stands anywhere in what the model says, exact "
        "match whether it says that answer and then stops. What is called made was asked in this report's own "
        "words about a request that brings no probes of that kind; no edit is taught by these words.\n",
        f"Changed weights, ‖change‖ / ‖before‖: {changes}.\n",
        "![metrics](metrics.png)\n",
        "## The model's own answers\n",
        answers_table(requests, evaluation) + "\n",
    ]
    if missed := missed_table(requests, evaluation):
        again = f"`{program()} edit --model {model} --requests missed --after {where}` teaches these anew.\n"
        parts += ["## What does not hold\n", missed, again]
    if profile:
        parts += _why(profile, folder)
    parts += [
        "## Using it, undoing it\n",
        f"- `{program()} export --model {model} --update {where} --output DIR` writes the edited model "
        "as a plain Hugging Face folder.\n"
        f"- `{program()} generate --model {model}{' --chat' if update.chat else ''} --update {where} "
        '--prompt "..."` answers with base and edited model side by side.\n'
        "- The base model is untouched: the update is `update.safetensors`, and leaving it out is undoing it.\n",
    ]
    return "\n".join(parts)


def _why(profile: GoldenProfile, folder: Path) -> list[str]:
    """How the golden layer was found, and how sure that is."""
    ranking = ", ".join(map(str, profile.ranking[:5]))
    aside = ", ".join(map(str, profile.excluded)) or "none"
    fenced = f"Set aside by Tukey's fences: {aside}. Best of the rest" if profile.fences else "Best"
    sure = f" How sure that is: {profile.certainty}." if profile.certainty else ""
    method, request_set = markdown_text(profile.method), markdown_text(profile.request_set)
    kinds = [kind for kind in ("scores", "stability", "race") if (folder / f"{kind}.png").is_file()]
    return [
        "## Why this layer\n",
        f"{method} scored all {len(profile.scores)} blocks on {profile.requests} proxy "
        f"requests ({request_set}) in {profile.seconds:.0f} s. {fenced}, in order: {ranking}.{sure}\n",
        *_raced(profile.race),
        *(f"![{kind}]({kind}.png)\n" for kind in kinds),
    ]


def _raced(race: Race | None) -> list[str]:
    """What trial edits came to, block by block."""
    if not race:
        return []
    told = f"Then blocks raced, by {race.trials} trial edits ({race.method}) in {race.seconds:.0f} s:\n"
    return [told, _table([one.model_dump() for one in race.blocks])]


def _outcome(evaluation: Evaluation) -> str:
    """How the edit went, in a sentence, the model's own answers first."""
    after, before = (evaluation.after or evaluation.before).metrics, evaluation.before.metrics
    found = [sentence.format(after[name].mean) for name, sentence in OUTCOME.items() if name in after]
    ratio = after["perplexity"].mean / before["perplexity"].mean
    return f"Outcome: {'; '.join(found)}; perplexity on ordinary text is {ratio:.3f} times what it was."


def study_report(study: Study) -> str:
    """study.md: the three questions, answered in tables."""
    sets = "; ".join(
        f"{markdown_text(one.name)}: {len(one.tried)} tried, {len(one.proxy)} to choose by" for one in study.sets
    )
    parts = [
        f"# Which block of {markdown_text(study.model)}?\n",
        f"Request sets: {sets}. Every tried request was edited at each tried block, in batches of 8. Score: the "
        "mean of rewrite, rephrase and locality, teacher-forced, less damage to text; in brackets its 95% "
        "bootstrap interval over requests. "
        "A request's own best block is chosen by one half of its probes and judged by the other. "
        "Regret: what a block's score falls short of the best fixed block's, chosen with hindsight on the same "
        "requests.\n",
    ]
    for name, grids in study.grids.items():
        for method, grid in grids.items():
            parts += [
                f"## {markdown_text(name)}, {method}\n",
                f"{len(grid.scores)} requests × {len(grid.blocks)} blocks in {grid.seconds:.0f} s.\n",
                "### A fixed block against each request's own best\n",
                _table(study.against_optimal[name][method]),
                "### Who finds it\n",
                _table(study.selectors[name][method]),
                *(f"![{kind}]({kind}-{name}-{method}.png)\n" for kind in ("sweep", "selectors")),
            ]
    for method in next(iter(study.grids.values())):
        parts += [f"## From proxy to test requests, and from set to set: {method}\n", _table(study.carried[method])]
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    return markdown_table(*study_table(rows)) + "\n"

"""The report: what was changed, where, how well, and how to use or undo it, in Markdown for anyone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.attribution import GoldenProfile
from pipeline.editing import WeightUpdate
from pipeline.evaluation import Evaluation
from pipeline.reporting.groups import figure_text, grouped, label, meaning
from pipeline.requests import EditRequest
from pipeline.shipped import program

EXAMPLES = 8


def metrics_table(evaluation: Evaluation) -> str:
    """All metrics in their groups as a Markdown table; after an edit also the paired difference."""
    before, after = evaluation.before.metrics, evaluation.after.metrics if evaluation.after else {}
    sides = {"before": before, "after": after, "difference": evaluation.difference} if after else {"value": before}
    columns = ["metric", "what it is", "count", *sides]
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    final = after or before
    for group, names in grouped(final).items():
        lines.append(f"| **{group}** |{' |' * (len(columns) - 1)}")
        for name in names:
            cells = [label(name), meaning(name), str(final[name].count)]
            cells += [figure_text(name, side.get(name)) for side in sides.values()]
            lines.append(f"| {' | '.join(_inline(cell) for cell in cells)} |")
    return "\n".join(lines)


def answers_table(requests: Sequence[EditRequest], evaluation: Evaluation, most: int = EXAMPLES) -> str:
    """Prompts with what the model generates, before and after, as a Markdown table."""
    after = evaluation.after
    columns = ["prompt", "wanted", "before", *(["after"] if after else [])]
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for index, request in enumerate(requests[:most]):
        cells = [request.prompt, request.new_answer, evaluation.before.answers[index]]
        if after:
            cells.append(after.answers[index])
        lines.append(f"| {' | '.join(_inline(cell) for cell in cells)} |")
    return "\n".join(lines)


def write_report(
    requests: Sequence[EditRequest],
    evaluation: Evaluation,
    update: WeightUpdate,
    profile: GoldenProfile | None,
    folder: Path,
) -> str:
    """The whole report of an edit."""
    after = evaluation.after
    assert after is not None
    layers = ", ".join(map(str, update.layers))
    parts = [
        f"# Edit of {update.model}\n",
        f"{len(requests)} facts were changed by `{update.method}` in block {layers} alone. "
        f"{_outcome(evaluation)}\n",
        "## Before and after\n",
        metrics_table(evaluation) + "\n",
        "In brackets: 95% bootstrap interval; the difference's is paired, over the same requests. By generation: "
        "greedy, from the prompt alone, to the end of the statement. Teacher-forced figures give the model the "
        "answer so far, as EasyEdit does, and so look better than what it says by itself.\n",
        f"{_weights(evaluation)}\n",
        "![metrics](metrics.png)\n",
        "## The model's own answers\n",
        answers_table(requests, evaluation) + "\n",
    ]
    if profile:
        parts += _why(profile, folder)
    parts += [
        "## Using it, undoing it\n",
        f"- `{program()} export --model {update.model} --update {folder} --output DIR` writes the edited model "
        "as a plain Hugging Face folder.\n"
        f"- `{program()} generate --model {update.model}{' --chat' if update.chat else ''} --update {folder} "
        '--prompt "..."` answers with base and edited model side by side.\n'
        "- The base model is untouched: the update is `update.safetensors`, and leaving it out is undoing it.\n",
    ]
    return "\n".join(parts)


def benchmark_table(results: Sequence[Mapping[str, Any]]) -> str:
    """What was measured against what was asked for, as a Markdown table."""
    lines = ["| measured | value | asked for | met |", "| --- | --- | --- | --- |"]
    for row in results:
        bound = "" if row["bound"] is None else f"{row['bound']:g}"
        met = {None: "", True: "yes", False: "**no**"}[row["met"]]
        lines.append(f"| {_inline(str(row['name']))} | {row['value']:.4g} | {bound} | {met} |")
    return "\n".join(lines)


def _why(profile: GoldenProfile, folder: Path) -> list[str]:
    """How the golden layer was found, and how sure that is."""
    ranking = ", ".join(map(str, profile.ranking[:5]))
    aside = ", ".join(map(str, profile.excluded)) or "none"
    fenced = f"Set aside by Tukey's fences: {aside}. Best of the rest" if profile.fences else "Best"
    sure = f" How sure that is: {profile.certainty}." if profile.certainty else ""
    figures = [
        f"![{kind}]({kind}.png)\n" for kind in ("stability", "agreement") if (folder / f"{kind}.png").is_file()
    ]
    return [
        "## Why this layer\n",
        f"`{profile.method}` scored all {len(profile.scores)} blocks on {profile.requests} proxy "
        f"requests ({profile.request_set}) in {profile.seconds:.0f} s. {fenced}, in order: {ranking}.{sure}\n",
        "![scores](scores.png)\n",
        *figures,
    ]


def _outcome(evaluation: Evaluation) -> str:
    """How the edit went, in a sentence or two, the model's own answers first."""
    after, before = (evaluation.after or evaluation.before).metrics, evaluation.before.metrics
    told = []
    if "generation_exact_match" in after:
        exact, contained = after["generation_exact_match"].mean, after["generation_containment"].mean
        told.append(
            f"By itself the model now answers {exact:.0%} of them with the new answer and nothing more, "
            f"and names it in {contained:.0%}"
        )
    told.append(f"{'t' if told else 'T'}eacher-forced it gives {after['rewrite'].mean:.0%} of the answers' tokens")
    if "locality" in after:
        told.append(f"{after['locality'].mean:.0%} of unrelated answers' tokens stayed as they were")
    ratio = after["perplexity"].mean / before["perplexity"].mean
    return f"{'; '.join(told)}; perplexity on ordinary text is {ratio:.3f} times what it was."


def _weights(evaluation: Evaluation) -> str:
    """How much each changed tensor changed."""
    changes = "; ".join(f"`{name}` {change:.2%}" for name, change in evaluation.weights.items())
    return f"Changed weights, ‖change‖ / ‖before‖: {changes}."


def _inline(text: str) -> str:
    """Text that cannot break a table's row."""
    return " ".join(text.split()).replace("|", "\\|")

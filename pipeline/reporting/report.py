"""The report: what was changed, where, how well, and how to use or undo it, in Markdown for anyone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.attribution import GoldenProfile
from pipeline.editing import WeightUpdate
from pipeline.evaluation import Estimate, Evaluation
from pipeline.requests import EditRequest

EXAMPLES = 8

MEANING = {
    "rewrite": "tokens of the new answer that come first to the model, prompt as given",
    "rephrase": "the same, prompt in other words",
    "locality": "tokens of unrelated answers that did not change",
    "portability": "tokens of what follows from the new answer",
    "generation_exact_match": "requests answered by the model itself with the new answer and nothing more",
    "perplexity": "on ordinary text; lower is better, unchanged is the aim",
}


def metrics_table(evaluation: Evaluation) -> str:
    """Metrics as a Markdown table."""
    after = evaluation.after
    lines = [
        "| metric | what it is | count | before | after |" if after else "| metric | what it is | count | value |",
        "| --- | --- | --- | --- | --- |" if after else "| --- | --- | --- | --- |",
    ]
    for name, before in evaluation.before.metrics.items():
        cells = [name.replace("_", " "), MEANING[name], str(before.count), _cell(before)]
        lines.append(f"| {' | '.join([*cells, _cell(after.metrics[name])] if after else cells)} |")
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
    learnt = after.metrics["rewrite"].mean
    kept = after.metrics["locality"].mean if "locality" in after.metrics else None
    ratio = after.metrics["perplexity"].mean / evaluation.before.metrics["perplexity"].mean
    parts = [
        f"# Edit of {update.model}\n",
        f"{len(requests)} facts were changed by `{update.method}` in block {layers} alone. The model now gives "
        f"{learnt:.0%} of the new answers' tokens"
        + (f", {kept:.0%} of unrelated answers' tokens stayed as they were" if kept is not None else "")
        + f", and perplexity on ordinary text is {ratio:.3f} times what it was.\n",
        "## Before and after\n",
        metrics_table(evaluation) + "\n",
        "In brackets: 95% bootstrap interval. Rewrite, rephrase and portability are teacher-forced, as in "
        "EasyEdit, and so look better than the model's own answers, which are the generation row.\n",
        "![metrics](metrics.png)\n",
        "## The model's own answers\n",
        answers_table(requests, evaluation) + "\n",
    ]
    if profile:
        aside = ", ".join(map(str, profile.excluded)) or "none"
        ranking = ", ".join(map(str, profile.ranking[:5]))
        parts += [
            "## Why this layer\n",
            f"{profile.method.upper()} scored all {len(profile.scores)} blocks on {profile.requests} proxy "
            f"requests ({profile.request_set}) in {profile.seconds:.0f} s. Set aside by Tukey's fences: {aside}. "
            f"Best of the rest, in order: {ranking}.\n",
            "![scores](scores.png)\n",
        ]
    parts += [
        "## Using it, undoing it\n",
        f"- `python run.py export --model {update.model} --update {folder} --output DIR` writes the edited model "
        "as a plain Hugging Face folder.\n"
        f"- `python run.py generate --model {update.model}{' --chat' if update.chat else ''} --update {folder} "
        '--prompt "..."` answers with base and edited model side by side.\n'
        "- The base model is untouched: the update is `update.safetensors`, and leaving it out is undoing it.\n",
    ]
    return "\n".join(parts)


def _cell(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _inline(text: str) -> str:
    """Text that cannot break a table's row."""
    return " ".join(text.split()).replace("|", "\\|")

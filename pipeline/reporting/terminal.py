"""Short tables for the terminal, right in a narrow window and in a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_only
from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.errors import terminal_text
from pipeline.reporting.tables import metric_table, not_measured, sides_of, study_table

if TYPE_CHECKING:
    from pipeline.attribution.profile import GoldenProfile
    from pipeline.evaluation.evaluator import Evaluation
    from pipeline.evaluation.metrics import Estimate
    from pipeline.model.llm import ShownToken
    from pipeline.planning.plan import MemoryPlan
    from pipeline.requests.schema import EditRequest
    from pipeline.study.study import Study

LOG_WIDTH = 160  # columns of what is no terminal, unless COLUMNS says otherwise
SMALLER = (
    "more devices share the weights with --trainer.strategy fsdp2; one holds them in 4 bits with "
    "--trainer.precision nf4; shorter rows (--length) take less; neither tensor parallelism nor offloading is used"
)
WIDE = 80  # columns in which intervals have room
MISSED, ANSWER = 5, 160  # facts that do not hold, spelt out, and letters of what is asked and said


def screen(soft_wrap: bool = False) -> Console:
    """The output stream: as wide as the terminal, and wide enough for any table where it is a file or a pipe.

    With `soft_wrap` lines stay whole where it is no terminal; a terminal's are broken between words.
    """
    terminal = sys.stdout.isatty()
    wide = None if terminal or "COLUMNS" in os.environ else LOG_WIDTH
    return Console(soft_wrap=soft_wrap and not terminal, width=wide)


@rank_zero_only
def say(*lines: str) -> None:
    """Plain lines; whatever they hold of somebody's text neither steers the terminal nor begins a line."""
    screen(soft_wrap=True).print("\n".join(map(terminal_text, lines)), highlight=False, markup=False)


@rank_zero_only
def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, boxed: bool = False) -> None:
    """A table; a row of one cell is a heading over those below it.

    The first columns, as many as `left` says, hold words, the others numbers, which are set to the right. `boxed`
    puts lines between cells, which may be long.
    """
    table = Table(box=HEAVY_HEAD if boxed else None, pad_edge=boxed, show_lines=boxed, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(_cell(column), overflow="fold", justify="left" if place < left else "right")
    indent = " " if any(len(row) == 1 for row in rows) else ""
    for first, *others in rows:
        name = _cell(indent + first) if others else f"[bold]{_cell(first)}[/bold]"
        table.add_row(name, *map(_cell, others))
    screen().print(table, highlight=False)


def _cell(text: str) -> str:
    return escape(terminal_text(text))


def show_profile(profile: GoldenProfile) -> None:
    """The golden layers and the runners-up, in a line or two."""
    golden, method = ", ".join(map(str, profile.golden_layers)), profile.method + ", a race" * bool(profile.race)
    next_best = ", ".join(map(str, profile.ranking[len(profile.golden_layers) :][:4]))
    aside = ", ".join(map(str, profile.excluded)) or "none"
    say(
        f"golden layer {golden} of {len(profile.scores)} blocks ({method}, {profile.requests} requests, "
        f"{profile.seconds:.0f} s); next {next_best or 'none'}; set aside {aside}"
    )
    if profile.certainty:
        say(profile.certainty)
    if profile.other_choice:
        order, block = profile.other_choice
        negative = sum(score < 0 for score in profile.scores)
        say(
            f"note: --order {order} would name block {block}; {negative} of {len(profile.scores)} scores are "
            "negative, as where a model knows the old answers well: the signed order then puts least reach first"
        )


def show_metrics(requests: Sequence[EditRequest], evaluation: Evaluation) -> None:
    """The chief metrics before and after, in their groups; metrics.json and the report hold all of them."""
    if evaluation.weights and not any(evaluation.weights.values()):
        say("note: the edit changes no weight: every answer was as asked for, or nothing was learnt")
    show_sides({side: measured.metrics for side, measured in sides_of(evaluation).items()})
    if evaluation.weights:
        name, change = max(evaluation.weights.items(), key=lambda item: item[1])
        say(f"largest change: {change:.1%} of the norm of {name}")
        measured = evaluation.after or evaluation.before
        show_missed([(requests[number].id, asked, says) for number, asked, says in measured.missed])


def show_missed(missed: Sequence[tuple[str, str, str]]) -> None:
    """Facts that do not hold, an id, what was asked and what the model says to each; the first of many."""
    for name, asked, says in missed[:MISSED]:
        say(f"does not hold: {name}: {_shortened(asked)} -> {_shortened(says)!r}")
    if len(missed) > MISSED:
        say(f"and {len(missed) - MISSED} more that do not hold")


def _shortened(text: str) -> str:
    return text if len(text) <= ANSWER else f"{text[:ANSWER]} …"


def show_sides(sides: Mapping[str, Mapping[str, Estimate]]) -> None:
    """The chief metrics by side, and a line that names what was not measured."""
    intervals = screen().width >= WIDE
    headed = {f"{side}{' [95%]' * intervals}": figures for side, figures in sides.items()}
    show_table(*metric_table(headed, short=True, intervals=intervals))
    if missing := not_measured([*sides.values()][-1]):
        say(missing)


def show_study(study: Study) -> None:
    """How near the golden layer comes to the best, and what each selector chose; study.md holds all of it."""
    for name, grids in study.grids.items():
        for method in grids:
            say(f"{name}, {method}")
            choices, selectors = study.against_optimal[name][method], study.selectors[name][method]
            show_table(*study_table(choices, ("choice", "block", "score", "of the optimum")))
            show_table(*study_table(selectors, ("selector", "block", "regret", "spearman", "seconds")))


def show_answers(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> None:
    """Prompts with each model's answer beside."""
    rows = [[prompt, *(texts[place].strip() for texts in answers.values())] for place, prompt in enumerate(prompts)]
    show_table(["prompt", *answers], rows, left=1 + len(answers), boxed=True)


def show_tokens(request: EditRequest, tokens: Sequence[ShownToken]) -> None:
    """A request's tokens, a line each, with what is scored and where its subject ends."""
    rows = []
    for token in tokens:
        marks = ["scored"] * token.scored + ["the subject's last token"] * token.ends_subject
        rows.append([str(token.place), str(token.token_id), repr(token.text), ", ".join(marks)])
    say(f"request {request.id}")
    show_table(["place", "id", "token", ""], rows, left=4)


def show_plan(plan: MemoryPlan) -> None:
    """What a device needs, stage by stage, and the longest batch that fits."""
    devices = "1 device" if plan.devices == 1 else f"{plan.devices} devices ({plan.strategy})"
    active = f" ({plan.active / 1e6:,.0f} M of them active)" if plan.active < plan.parameters else ""
    say(
        f"{plan.model}: {plan.parameters / 1e6:,.0f} M weights{active}, {plan.blocks} blocks, "
        f"golden layer {plan.layer}, {plan.precision}, {devices}, rows of {plan.length} tokens; GB on each device"
    )
    rows = []
    for need in plan.stages:
        figures = [f"{size / 1e9:.2f}" for size in (need.weights, need.beside, need.total)]
        longest = f"{need.longest_batch:,}" if need.longest_batch else "any" if need.fits else "does not fit"
        rows.append([need.stage, str(need.batch), *figures, longest])
    longest_in = f"longest batch in {plan.memory / 1e9:.3g} GB"
    show_table(["stage", "at once", "weights", "beside", "in all", longest_in], rows)
    if not all(need.fits for need in plan.stages):
        say(f"note: {SMALLER}")

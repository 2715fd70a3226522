"""Short tables for the terminal, right in a narrow window and in a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_only
from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from pipeline.reporting.tables import metric_table, sides_of, study_table

if TYPE_CHECKING:
    from pipeline.attribution.profile import GoldenProfile
    from pipeline.evaluation.evaluator import Evaluation
    from pipeline.model.explain import ShownToken
    from pipeline.planning.plan import MemoryPlan, Need
    from pipeline.requests.schema import EditRequest
    from pipeline.study.study import Study

LOG_WIDTH = 160  # columns of what is no terminal, unless COLUMNS says otherwise


def screen(soft_wrap: bool = False) -> Console:
    """The output stream: as wide as the terminal, and wide enough for any table where it is a file or a pipe.

    Args:
        soft_wrap: leave lines whole where it is no terminal; a terminal's are broken between words.
    """
    terminal = sys.stdout.isatty()
    wide = None if terminal or "COLUMNS" in os.environ else LOG_WIDTH
    return Console(soft_wrap=soft_wrap and not terminal, width=wide)


def table_of(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, **look: Any) -> Table:
    """A table for the terminal.

    Args:
        columns: headings.
        rows: cells, shown as they are; one alone is a heading over those below it.
        left: how many columns, from the first on, hold words; the others' numbers are set to the right.
        look: of rich's Table.
    """
    table = Table(**({"box": None, "pad_edge": False, "header_style": "bold"} | look))
    for place, column in enumerate(columns):
        words = place < left
        table.add_column(
            escape(column), overflow="fold" if words else "ellipsis", justify="left" if words else "right"
        )
    indent = " " if any(len(row) == 1 for row in rows) else ""
    for first, *others in rows:
        if others:
            table.add_row(escape(indent + first), *map(escape, others))
        else:
            table.add_row(f"[bold]{escape(first)}[/bold]")
    return table


@rank_zero_only
def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, **look: Any) -> None:
    """A table; see `table_of`."""
    screen().print(table_of(columns, rows, left, **look), highlight=False)


@rank_zero_only
def show_profile(profile: GoldenProfile) -> None:
    """The golden layers and the runners-up, in a line or two."""
    golden = ", ".join(map(str, profile.golden_layers))
    next_best = ", ".join(map(str, profile.ranking[len(profile.golden_layers) :][:4]))
    aside = ", ".join(map(str, profile.excluded)) or "none"
    screen().print(
        f"[bold]golden layer {golden}[/bold] of {len(profile.scores)} blocks ({profile.method}, "
        f"{profile.requests} requests, {profile.seconds:.0f} s); next {next_best or 'none'}; set aside {aside}",
        highlight=False,
    )
    if profile.certainty:
        say(profile.certainty)
    if profile.is_inverted:
        say(
            "note: most scores are negative: the model knows the old answers well, and the signed order then "
            "names the block of least reach; --order magnitude ranks by size"
        )


@rank_zero_only
def show_metrics(evaluation: Evaluation) -> None:
    """The chief metrics before and after, in their groups; metrics.json and the report hold all of them."""
    console, sides = screen(), {side: measured.metrics for side, measured in sides_of(evaluation).items()}
    with_intervals = {f"{side} [95%]": figures for side, figures in sides.items()}
    table = table_of(*metric_table(with_intervals, short=True))
    if Measurement.get(console, console.options.update_width(LOG_WIDTH), table).maximum > console.width:
        table = table_of(*metric_table(sides, short=True, intervals=False))
    console.print(table, highlight=False)
    if evaluation.weights:
        name, change = max(evaluation.weights.items(), key=lambda item: item[1])
        say(f"largest change: {change:.1%} of the norm of {name}")


@rank_zero_only
def show_study(study: Study) -> None:
    """How near the golden layer comes to the best, and what each selector chose; study.md holds all of it."""
    for name, grids in study.grids.items():
        for method in grids:
            say(f"{name}, {method}")
            show_table(
                *study_table(study.against_optimal[name][method], ("choice", "block", "score", "of the optimum"))
            )
            shown = ("selector", "block", "regret", "spearman", "seconds")
            show_table(*study_table(study.selectors[name][method], shown))


@rank_zero_only
def show_answers(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> None:
    """Prompts with each model's answer beside."""
    rows = [[prompt, *(texts[place].strip() for texts in answers.values())] for place, prompt in enumerate(prompts)]
    columns = ["prompt", *answers]
    show_table(columns, rows, left=len(columns), box=HEAVY_HEAD, pad_edge=True, show_lines=True)


@rank_zero_only
def show_tokens(request: EditRequest, tokens: Sequence[ShownToken]) -> None:
    """A request's tokens, a line each, with what is scored and where its subject ends."""
    rows = []
    for token in tokens:
        marks = ["scored"] * token.scored + ["the subject's last token"] * token.ends_subject
        rows.append([str(token.place), str(token.token_id), repr(token.text), ", ".join(marks)])
    title = f"request {escape(request.id)}"
    show_table(["place", "id", "token", ""], rows, left=4, title=title, title_justify="left", pad_edge=True)


@rank_zero_only
def say(text: str) -> None:
    """One plain line."""
    screen(soft_wrap=True).print(text, highlight=False, markup=False)


@rank_zero_only
def show_plan(plan: MemoryPlan) -> None:
    """What a device needs, stage by stage, and the longest batch that fits."""
    devices = "1 device" if plan.devices == 1 else f"{plan.devices} devices ({plan.strategy})"
    say(
        f"{plan.model}: {plan.parameters / 1e6:,.0f} M weights, {plan.blocks} blocks, golden layer {plan.layer}, "
        f"{plan.precision}, {devices}, rows of {plan.length} tokens; GB on each device"
    )
    rows = []
    for need in plan.stages:
        figures = [f"{size / 1e9:.2f}" for size in (need.weights, need.beside, need.total)]
        rows.append([need.stage, str(need.batch), *figures, _longest(need)])
    longest = f"longest batch in {plan.memory / 1e9:.3g} GB"
    columns = ["stage", "at once", "weights", "beside", "in all", longest]
    show_table(columns, rows)


def _longest(need: Need) -> str:
    if not need.fits and not need.longest_batch:
        return "does not fit"
    return "any" if need.longest_batch is None else f"{need.longest_batch:,}"

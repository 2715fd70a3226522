"""Short tables for the terminal, right in a narrow window and in a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from pipeline.attribution import GoldenProfile
from pipeline.evaluation import Evaluation
from pipeline.model.explain import ShownToken
from pipeline.planning import MemoryPlan, Need
from pipeline.reporting.groups import IN_SHORT, figure_text, grouped, label
from pipeline.requests import EditRequest
from pipeline.study import Study

LOG_WIDTH = 160  # columns of what is no terminal, unless COLUMNS says otherwise


def screen(soft_wrap: bool = False) -> Console:
    """The output stream: as wide as the terminal, and wide enough for any table where it is a file or a pipe.

    Args:
        soft_wrap: leave lines whole where it is no terminal; a terminal's are broken between words.
    """
    terminal = sys.stdout.isatty()
    wide = None if terminal or "COLUMNS" in os.environ else LOG_WIDTH
    return Console(soft_wrap=soft_wrap and not terminal, width=wide)


def _fits(table: Table, console: Console) -> bool:
    return Measurement.get(console, console.options.update_width(LOG_WIDTH), table).maximum <= console.width


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
    console, table = screen(), _metrics_table(evaluation, intervals=True)
    if not _fits(table, console):
        table = _metrics_table(evaluation, intervals=False)
    console.print(table, highlight=False)
    if evaluation.weights:
        name, change = max(evaluation.weights.items(), key=lambda item: item[1])
        say(f"largest change: {change:.1%} of the norm of {name}")


def _metrics_table(evaluation: Evaluation, intervals: bool) -> Table:
    """A row a metric; a narrow terminal has no room for intervals."""
    before, after = evaluation.before.metrics, evaluation.after.metrics if evaluation.after else {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("metric", overflow="fold")
    table.add_column("count", justify="right")
    for side in ["before", "after"] if after else ["before"]:
        table.add_column(f"{side} [95%]" if intervals else side, justify="right")
    for group, names in grouped(after or before).items():
        table.add_row(f"[bold]{group}[/bold]")
        for name in (name for name in names if name in IN_SHORT):
            cells = [f" {label(name)}", str((after or before)[name].count)]
            figures = [figure_text(name, side.get(name)) for side in (before, after)]
            cells += [escape(figure if intervals else figure.partition(" ")[0]) for figure in figures]
            table.add_row(*cells[: len(table.columns)])
    return table


@rank_zero_only
def show_study(study: Study) -> None:
    """How near the golden layer comes to the best, and what each selector chose; study.md holds all of it."""
    for name, grids in study.grids.items():
        for method in grids:
            own, fixed, golden, *_ = study.against_optimal(name, method)
            say(
                f"{name}, {method}: golden layer {golden['block']} scores {golden['score']:.3f}; the best fixed "
                f"block, {fixed['block']}, {fixed['score']:.3f}; each request's own best {own['score']:.3f}"
            )
            table = Table(box=None, pad_edge=False, header_style="bold")
            table.add_column("chosen by", overflow="fold")
            for column in ("block", "regret", "Spearman", "seconds"):
                table.add_column(column, justify="right")
            for row in study.selectors(name, method):
                figures = [(row["regret"], 3), (row["spearman"], 2), (row["seconds"], 0)]
                shown = [f"{value:.{digits}f}" if isinstance(value, float) else "" for value, digits in figures]
                table.add_row(f" {row['selector']}", str(row["block"]), *shown)
            screen().print(table, highlight=False)


@rank_zero_only
def show_answers(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> None:
    """Prompts with each model's answer beside."""
    table = Table(show_lines=True, header_style="bold")
    table.add_column("prompt", overflow="fold", ratio=1)
    for name in answers:
        table.add_column(name, overflow="fold", ratio=1)
    for index, prompt in enumerate(prompts):
        table.add_row(escape(prompt), *(escape(texts[index].strip()) for texts in answers.values()))
    screen().print(table, highlight=False)


@rank_zero_only
def show_tokens(request: EditRequest, tokens: Sequence[ShownToken]) -> None:
    """A request's tokens, a line each, with what is scored and where its subject ends."""
    table = Table("place", "id", "token", "", title=f"request {escape(request.id)}", title_justify="left", box=None)
    for token in tokens:
        marks = ["scored"] * token.scored + ["the subject's last token"] * token.ends_subject
        table.add_row(str(token.place), str(token.token_id), escape(repr(token.text)), ", ".join(marks))
    screen().print(table, highlight=False)


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
    table = Table("stage", box=None, header_style="bold", pad_edge=False)
    for column in ("at once", "weights", "beside", "in all", f"longest batch in {plan.memory / 1e9:.3g} GB"):
        table.add_column(column, justify="right")
    for need in plan.stages:
        figures = [f"{size / 1e9:.2f}" for size in (need.weights, need.beside, need.total)]
        table.add_row(need.stage, str(need.batch), *figures, _longest(need))
    screen().print(table, highlight=False)


def _longest(need: Need) -> str:
    if not need.fits and not need.longest_batch:
        return "does not fit"
    return "any" if need.longest_batch is None else f"{need.longest_batch:,}"


@rank_zero_only
def show_benchmark(results: Sequence[Mapping[str, Any]]) -> None:
    """What was measured, what was asked for, and whether it was met."""
    table = Table("measured", "value", "bound", "met", box=None, header_style="bold", pad_edge=False)
    for result in results:
        bound = "" if result["bound"] is None else f"{result['bound']:g}"
        met = {None: "", True: "yes", False: "NO"}[result["met"]]
        table.add_row(escape(result["name"]), f"{result['value']:.4g}", bound, met)
    screen().print(table)

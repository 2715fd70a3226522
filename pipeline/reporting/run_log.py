"""One command's output: its folder, its TensorBoard run, its files, and what it says in the terminal."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from pipeline.attribution import GoldenProfile, Scores
from pipeline.attribution.profile import PROFILE_FILE
from pipeline.attribution.scores import SCORES_FILE
from pipeline.editing import WeightUpdate
from pipeline.editing.update import UPDATE_FILE
from pipeline.errors import UserError
from pipeline.evaluation import Evaluation
from pipeline.files import write_json, write_text, write_whole
from pipeline.output import OutputFolder, default_output, is_fresh, output_folder
from pipeline.reporting.dashboards import columns, edit_charts, study_charts, study_tag, tag
from pipeline.reporting.events import EventsLogger
from pipeline.reporting.figures import (
    agreement_figure,
    block_means,
    by_cost,
    cost_figure,
    metrics_figure,
    score_figure,
    selectors_figure,
    squares_figure,
    stability_figure,
    sweep_figure,
)
from pipeline.reporting.report import answers_table, benchmark_table, metrics_table, write_report
from pipeline.reporting.study import study_report
from pipeline.reporting.terminal import say, show_benchmark, show_metrics, show_profile, show_study
from pipeline.reporting.values import values_csv
from pipeline.requests import EditRequest
from pipeline.study import Study

PICTURE = re.compile(r"!\[\w+\]\([^)]*\.png\)\n*")
SHOWN_ANSWERS = 30
STUDY_FIGURES = {"sweep": sweep_figure, "squares": squares_figure, "selectors": selectors_figure}
CLOSING_SECONDS = 2  # a writer whose queue an interrupt has broken would never close


@contextmanager
def run_log(
    command: str,
    output: str | None,
    overwrite: bool,
    options: dict[str, Any],
    resume: bool = False,
    may_change: Collection[str] = (),
) -> Iterator[RunLog]:
    """Open a command's output folder; on an error nothing half-written stays (see `output_folder`)."""
    if resume and not output:
        raise UserError("resume: which? name the interrupted command's folder with --output")
    path = Path(output) if output else default_output(command)
    if resume and is_fresh(path):
        say(f"nothing is there to go on from in {path}: starting from the beginning")
        resume = False
    folder = OutputFolder(path, resume, may_change)
    try:
        with output_folder(folder, overwrite, options):
            log = RunLog(folder, options)
            try:
                yield log
            finally:
                log.close()
    except BaseException as error:
        kept = [name for name in sorted(folder.finished) if (path / name).is_file()] if not overwrite else []
        if kept:
            say(f"finished before it failed, and kept in {path}: {', '.join(kept)}")
        if folder.goes_on or (kept and "resume" in options and not isinstance(error, Exception)):
            say(f"work in progress is kept in {path}: the same command with --output {path} --resume goes on")
        raise
    say(f"written to {path}")


class RunLog:
    """Keeps results as files, in TensorBoard and on the terminal; on other ranks than zero it does nothing.

    Attributes:
        folder: where everything is written.
        tensorboard: the logger to hand to a Trainer; its events lie in the folder itself, so that
            `tensorboard --logdir runs` shows a run a folder.
        work: a folder for work in progress.
    """

    def __init__(self, output: OutputFolder, options: dict[str, Any]) -> None:
        self.output = output
        self.folder = output.path
        self.work = output.unfinished
        self.options = options
        self.tensorboard = EventsLogger(
            self.folder.parent, name=self.folder.name, version="", default_hp_metric=False, flush_secs=10
        )

    @rank_zero_only
    def close(self) -> None:
        """Flush TensorBoard's events, if there are any."""
        if self.tensorboard._experiment is not None:
            closing = Thread(target=self.tensorboard.experiment.close, daemon=True)
            closing.start()
            closing.join(CLOSING_SECONDS)

    @rank_zero_only
    def keep_profile(self, profile: GoldenProfile, scores: Scores | None = None) -> None:
        """Write the profile and, where found now, the requests' scores; keep them even if a later stage fails."""
        shown = self.output.resumed and any(self.folder.glob("events.*"))
        if scores:
            scores.save(self.folder)
        profile.save(self.folder)  # last: a resumed command that finds it finds the scores, too
        self.output.finished |= {PROFILE_FILE, SCORES_FILE, "scores.png", "stability.png", "agreement.png"}
        if not shown:
            self._profile_figures(profile, scores or self._scores_kept())
            self.tensorboard.experiment.flush()
        show_profile(profile)

    def profile_kept(self) -> GoldenProfile | None:
        """The profile that the resumed command had found."""
        return GoldenProfile.load(self.folder) if self._kept(PROFILE_FILE) else None

    def _scores_kept(self) -> Scores | None:
        return Scores.load(self.folder) if self._kept(SCORES_FILE) else None

    def update_kept(self) -> WeightUpdate | None:
        """The update that the resumed command had finished."""
        return WeightUpdate.load(self.folder) if self._kept(UPDATE_FILE) else None

    def _kept(self, file: str) -> bool:
        return self.output.resumed and (self.folder / file).is_file()

    @contextmanager
    def keeping(self, update: WeightUpdate) -> Iterator[None]:
        """Save an update, and keep it whatever happens inside, unless that is a UserError: then it is broken."""
        update.save(self.folder)
        self.output.finished |= set(update.FILES)
        self.output.drop_unfinished("edit")
        try:
            yield
        except UserError:
            self.output.finished -= set(update.FILES)
            raise

    @rank_zero_only
    def keep_metrics(
        self,
        model: str,
        requests: Sequence[EditRequest],
        evaluation: Evaluation,
        update: WeightUpdate | None = None,
        profile: GoldenProfile | None = None,
    ) -> None:
        """Write metrics.json, values.csv and, for an edit, report.md; show the figures everywhere."""
        sides = {"before": evaluation.before} | ({"after": evaluation.after} if evaluation.after else {})
        tables = {side: measured.metrics for side, measured in sides.items()}
        if evaluation.after:
            tables["difference"] = evaluation.difference
        figures = {
            side: {name: asdict(estimate) for name, estimate in metrics.items()} for side, metrics in tables.items()
        }
        changes = {"weights": evaluation.weights} if evaluation.weights else {}
        write_json(self.folder / "metrics.json", {"model": model, "requests": len(requests), **figures, **changes})
        write_text(self.folder / "values.csv", values_csv(requests, evaluation))
        board = self.tensorboard.experiment
        for step, measured in enumerate(sides.values()):
            for name, estimate in measured.metrics.items():
                board.add_scalar(tag(name), estimate.mean, step)
        self._figure("evaluation/before_and_after", "metrics.png", metrics_figure(evaluation))
        if evaluation.after:
            self.tensorboard.charts(edit_charts())
        self.tensorboard.compare(columns(model, len(requests), self.options, update, profile))
        if update:
            if profile and not (self.folder / "scores.png").is_file():
                self._profile_figures(profile)
            report = write_report(requests, evaluation, update, profile, self.folder)
            write_text(self.folder / "report.md", report)
            self._text("report", report)
        else:
            self._text("evaluation/metrics", metrics_table(evaluation))
            self._text("evaluation/answers", answers_table(requests, evaluation, most=SHOWN_ANSWERS))
        show_metrics(evaluation)

    @rank_zero_only
    def going_on(self, *files: str) -> None:
        """Keep these files, and all that a resumed command finds, whatever happens: the command can be resumed."""
        found = {file.name for file in self.folder.iterdir() if file.is_file()} if self.output.resumed else set()
        self.output.finished |= {*files, *found}
        self.work.mkdir(exist_ok=True)
        write_text(self.work / "going-on.txt", "")

    @rank_zero_only
    def keep_study(self, study: Study) -> None:
        """Write study.json, study.md and the figures; show the answers."""
        self._show_anew()
        report = study_report(study)
        write_json(self.folder / "study.json", study.as_json())
        write_text(self.folder / "study.md", report)
        self._text("study/report", report)
        for name, grids in study.grids.items():
            for method, grid in grids.items():
                for metric, values in {**grid.values, "score": grid.scores}.items():
                    for block, mean in zip(grid.blocks, block_means(values), strict=True):
                        if np.isnan(mean):
                            continue  # no request has such a probe
                        self.tensorboard.experiment.add_scalar(study_tag(name, method, metric), mean, block)
                for number, (kind, draw) in enumerate(STUDY_FIGURES.items(), start=1):
                    shown = draw(study, name, method)
                    self._figure(f"study/{name}_{method}_{number}_{kind}", f"{kind}-{name}-{method}.png", shown)
        self.tensorboard.charts(study_charts({name: list(grids) for name, grids in study.grids.items()}))
        show_study(study)

    @rank_zero_only
    def keep_benchmark(self, results: Sequence[dict[str, Any]], model: str) -> None:
        """Write benchmark.json and, where costs were measured, quality against cost as a figure; show all."""
        self._show_anew()
        write_json(self.folder / "benchmark.json", results)
        for what, methods in by_cost(results).items():
            file = re.sub(r"[^\w.-]+", "-", f"cost-{what}")
            self._figure(f"benchmark/{file}", f"{file}.png", cost_figure(what, methods, model))
        self._text("benchmark/results", benchmark_table(results))
        show_benchmark(results)

    def _show_anew(self) -> None:
        """Take what an interrupted or smaller one has shown out of TensorBoard: all of it is shown again."""
        if self.output.resumed and self.tensorboard._experiment is None:
            for file in self.folder.glob("events.out.tfevents.*"):
                file.unlink()

    def _profile_figures(self, profile: GoldenProfile, scores: Scores | None = None) -> None:
        for block, score in enumerate(profile.scores):
            self.tensorboard.experiment.add_scalar("attribution/score_by_block", score, block)
        self._figure("attribution/1_scores", "scores.png", score_figure(profile))
        if profile.stability:
            self._figure("attribution/2_stability", "stability.png", stability_figure(profile))
        if profile.stability and scores:
            self._figure("attribution/3_agreement", "agreement.png", agreement_figure(profile, scores))

    def _text(self, tag: str, text: str) -> None:
        """Markdown without its pictures, which TensorBoard shows elsewhere."""
        self.tensorboard.experiment.add_text(tag, PICTURE.sub("", text))

    def _figure(self, tag: str, file: str, figure: Figure) -> None:
        write_whole(self.folder / file, lambda partial: figure.savefig(partial, format="png"))
        self.tensorboard.experiment.add_figure(tag, figure, close=False)

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
from lightning.pytorch.loggers import TensorBoardLogger
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
from pipeline.reporting.figures import metrics_figure, score_figure, stability_figure
from pipeline.reporting.groups import IN_SHORT
from pipeline.reporting.report import answers_table, metrics_table, write_report
from pipeline.reporting.study import selectors_figure, study_report, sweep_figure
from pipeline.reporting.terminal import say, show_metrics, show_profile, show_study
from pipeline.reporting.values import values_csv
from pipeline.requests import EditRequest
from pipeline.study import Study

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


class EventsLogger(TensorBoardLogger):
    """TensorBoardLogger without its hparams.yaml: options.yaml holds the options."""

    @rank_zero_only
    def save(self) -> None:
        """Nothing: the writer flushes by itself, and Lightning would wait for the disk after every step."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close after a success only: an interrupt may have broken the writer's queue, and closing waits for it."""
        if status == "success":
            super().finalize(status)


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
        if scores:
            scores.save(self.folder)
        profile.save(self.folder)  # last: a resumed command that finds it finds the scores, too
        self.output.finished |= {PROFILE_FILE, SCORES_FILE, "scores.png", "stability.png"}
        for layer, score in enumerate(profile.scores):
            self.tensorboard.experiment.add_scalar("attribution/score_by_block", score, layer)
        self._profile_figures(profile)
        show_profile(profile)

    def profile_kept(self) -> GoldenProfile | None:
        """The profile that the resumed command had found."""
        return GoldenProfile.load(self.folder) if self._kept(PROFILE_FILE) else None

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
                board.add_scalar(f"evaluation/{name}", estimate.mean, step)
        board.add_text("evaluation/metrics", metrics_table(evaluation))
        board.add_text("evaluation/answers", answers_table(requests, evaluation, most=30))
        self._figure("evaluation/before_and_after", "metrics.png", metrics_figure(evaluation))
        final = evaluation.after or evaluation.before
        self.tensorboard.log_hyperparams(
            _flat(self.options),
            {f"final/{name}": final.metrics[name].mean for name in final.metrics if name in IN_SHORT},
        )
        if update:
            if profile and not (self.folder / "scores.png").is_file():
                self._profile_figures(profile)
            report = write_report(requests, evaluation, update, profile, self.folder)
            write_text(self.folder / "report.md", report)
            board.add_text("report", re.sub(r"!\[\w+\]\(\w+\.png\)", "", report))
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
        report = study_report(study)
        write_json(self.folder / "study.json", study.as_json())
        write_text(self.folder / "study.md", report)
        board = self.tensorboard.experiment
        board.add_text("study/report", "\n".join(line for line in report.splitlines() if not line.startswith("![")))
        for name, grids in study.grids.items():
            for method, grid in grids.items():
                for metric, values in {**grid.values, "score": grid.scores}.items():
                    for block, mean in zip(grid.blocks, np.nanmean(values, axis=0), strict=True):
                        board.add_scalar(f"study_{name}_{method}/{metric.replace('/', '_')}_by_block", mean, block)
                for kind, draw in (("sweep", sweep_figure), ("selectors", selectors_figure)):
                    self._figure(
                        f"study/{name}_{method}_{kind}", f"{kind}-{name}-{method}.png", draw(study, name, method)
                    )
        show_study(study)

    def _profile_figures(self, profile: GoldenProfile) -> None:
        self._figure("attribution/scores", "scores.png", score_figure(profile))
        if profile.stability:
            self._figure("attribution/stability", "stability.png", stability_figure(profile))

    def _figure(self, tag: str, file: str, figure: Figure) -> None:
        write_whole(self.folder / file, lambda partial: figure.savefig(partial, format="png"))
        self.tensorboard.experiment.add_figure(tag, figure, close=False)


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as dotted names, in types that TensorBoard's HPARAMS page knows."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat

"""One command's output: its folder, its TensorBoard run, its files, and what it says in the terminal."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from pipeline.attribution.profile import PROFILE_FILE, SCORES_FILE, GoldenProfile, Scores
from pipeline.editing.update import WeightUpdate
from pipeline.errors import UserError
from pipeline.evaluation.evaluator import Evaluation
from pipeline.files import write_json, write_text, write_whole
from pipeline.output import OutputFolder, is_fresh, output_folder, started
from pipeline.reporting.dashboards import hparams_row, loggers_of, request_set, show_results
from pipeline.reporting.figures import STUDY_FIGURES, metrics_figure, race_figure, score_figure, stability_figure
from pipeline.reporting.report import answers_table, metrics_table, study_report, write_report
from pipeline.reporting.tables import metrics_of, values_csv
from pipeline.reporting.terminal import say, show_metrics, show_profile, show_study
from pipeline.requests.schema import EditRequest

if TYPE_CHECKING:
    from pipeline.study.study import Study

PICTURE = re.compile(r"!\[\w+\]\([^)]*\.png\)\n*")


@contextmanager
def run_log(
    command: str, output: str | None, overwrite: bool, options: dict[str, Any], may_change: Collection[str] = ()
) -> Iterator[RunLog]:
    """Open a command's output folder; on an error nothing half-written stays (see `output_folder`)."""
    resume = options.get("resume", False)
    if resume and not output:
        raise UserError("resume: which? name the interrupted command's folder with --output")
    path = Path(output or f"runs/{command}-{started()}")
    if resume and is_fresh(path):
        say(f"nothing is there to go on from in {path}: starting from the beginning")
        resume = False
    folder = OutputFolder(path, resume, may_change)
    try:
        with output_folder(folder, overwrite, options):
            log = RunLog(folder, options)
            yield log
            for logger in log.loggers:
                logger.finalize("success")
    except BaseException as error:
        kept = [name for name in sorted(folder.finished) if (path / name).is_file()] if not overwrite else []
        if kept:
            say(f"finished before it ended, and kept in {path}: {', '.join(kept)}")
        if folder.goes_on or (kept and "resume" in options and not isinstance(error, Exception)):
            say(f"work in progress is kept in {path}: the same command with --output {path} --resume goes on")
        raise
    say(f"written to {path}")


class RunLog:
    """Keeps results as files, with loggers and on the terminal; on other ranks than zero it does nothing."""

    def __init__(self, output: OutputFolder, options: dict[str, Any]) -> None:
        self.output = output
        self.folder = output.path
        self.work = output.unfinished  # in progress
        self.options = options
        self.loggers = loggers_of(options.get("trainer", {}).get("logger", ["tensorboard"]), self.folder)
        boards = (one for one in self.loggers if isinstance(one, TensorBoardLogger))
        self.board = next(boards, DummyLogger())  # for texts and figures

    @rank_zero_only
    def keep_profile(self, profile: GoldenProfile, scores: Scores | None = None) -> None:
        """Write the profile and, where found now, the requests' scores; keep them even if a later stage fails."""
        shown = self.output.resumed and any(self.folder.glob("events.*"))
        if scores:
            scores.save(self.folder)
        profile.save(self.folder)  # last: a resumed command that finds it finds the scores, too
        self.output.finished |= {PROFILE_FILE, SCORES_FILE, "scores.png", "stability.png", "race.png"}
        if not shown:
            self._profile_figures(profile)
            self.board.experiment.flush()
        show_profile(profile)

    def has(self, file: str) -> bool:
        """Whether the command that this one resumes had finished a file."""
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
        made: bool = True,
    ) -> None:
        """Write metrics.json, values.csv and, for an update `made` here, report.md; show the figures everywhere."""
        sides = metrics_of(evaluation)
        write_json(
            self.folder / "metrics.json",
            {"model": model, "requests": len(requests)}
            | {side: {name: asdict(one) for name, one in metrics.items()} for side, metrics in sides.items()}
            | ({"weights": evaluation.weights} if evaluation.weights else {}),
        )
        write_text(self.folder / "values.csv", values_csv(requests, evaluation))
        self._figure(
            "evaluation/before_and_after", "metrics.png", metrics_figure(evaluation, request_set(self.options))
        )
        show_results(self.loggers, evaluation, hparams_row(model, len(requests), self.options, update, profile))
        if update and made:
            if profile and not (self.folder / "scores.png").is_file():
                self._profile_figures(profile)
            report = write_report(requests, evaluation, update, profile, self.folder)
            write_text(self.folder / "report.md", report)
            self._text("report", report)
        else:
            self._text("evaluation/metrics", metrics_table(evaluation))
            self._text("evaluation/answers", answers_table(requests, evaluation))
        show_metrics(requests, evaluation)

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
        for file in self.folder.glob("events.*"):
            file.unlink()  # what a smaller study has shown: all of it is shown again
        report = study_report(study)
        write_json(self.folder / "study.json", study.as_json())
        write_text(self.folder / "study.md", report)
        self._text("study/report", report)
        for name, grids in study.grids.items():
            for method in grids:
                for number, (kind, draw) in enumerate(STUDY_FIGURES.items(), start=1):
                    shown = draw(study, name, method)
                    self._figure(f"study/{name}_{method}_{number}_{kind}", f"{kind}-{name}-{method}.png", shown)
        show_study(study)

    def _profile_figures(self, profile: GoldenProfile) -> None:
        self._figure("attribution/1_scores", "scores.png", score_figure(profile))
        if profile.stability:
            self._figure("attribution/2_stability", "stability.png", stability_figure(profile))
        if profile.race:
            self._figure("attribution/3_race", "race.png", race_figure(profile))

    def _text(self, tag: str, text: str) -> None:
        """Markdown without its pictures, which TensorBoard shows elsewhere."""
        self.board.experiment.add_text(tag, PICTURE.sub("", text))

    def _figure(self, tag: str, file: str, figure: Figure) -> None:
        write_whole(self.folder / file, lambda partial: figure.savefig(partial, format="png"))
        self.board.experiment.add_figure(tag, figure, close=False)

"""Loggers, and what they are given: tags in the order of reading, a row of HPARAMS a run, a store's versions.

Only what has steps is a curve, which TensorBoard smooths. It sorts by name: numbers in tags put stages, groups and
figures in the order that people want them in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from pipeline.attribution.profile import GoldenProfile
from pipeline.editing.update import WeightUpdate
from pipeline.errors import UserError, check_choice, one_line
from pipeline.evaluation.evaluator import Evaluation
from pipeline.reporting.tables import GROUPS, kind_of
from pipeline.updates.disk import read_metrics, transaction
from pipeline.updates.store import Store

BOARD, EVENTS = "tensorboard", "events.out.tfevents.0.store"  # the folder of a store's run, and its file
COUNTS = ("applied", "held_back", "retracted", "facts")
PROJECT = "golden-layers"  # what runs are gathered under by loggers that gather them


def loggers_of(kinds: Sequence[str], folder: Path) -> list[Any]:
    """Lightning's loggers of these kinds, begun but for TensorBoard; UserError for one that cannot be had."""
    loggers: list[Any] = []
    for kind in kinds:
        check_choice("trainer.logger", kind, MAKERS)
        try:
            loggers.append(MAKERS[kind](folder))
            if kind != "tensorboard":
                loggers[-1].experiment  # noqa: B018
        except Exception as error:
            raise UserError(f"trainer.logger: {kind}: {one_line(error)}") from error
    return loggers


def show_results(loggers: Sequence[Logger], evaluation: Evaluation, row: dict[str, str]) -> None:
    """Show a row of HPARAMS and what came out, a point a metric, perplexity as a multiple of what it was before."""
    before, after = evaluation.before.metrics, (evaluation.after or evaluation.before).metrics
    shown = {tag(name): one.mean for name, one in after.items() if name != "perplexity"}
    shown[f"{tag('perplexity')}_ratio"] = after["perplexity"].mean / before["perplexity"].mean
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(row, shown, 0)
        else:
            logger.log_hyperparams(row)
            logger.log_metrics(shown)


def tag(name: str, stage: str = "evaluation") -> str:
    """A metric's tag: stage and group, then its place among them."""
    kind = kind_of(name)
    for number, (group, members) in enumerate(GROUPS.items(), start=1):
        if kind in members:
            return f"{stage}_{number}_{group.replace(' ', '_')}/{list(members).index(kind) + 1}_{name}"
    raise KeyError(name)


def hparams_row(
    model: str,
    requests: int,
    options: Mapping[str, Any],
    update: WeightUpdate | None,
    profile: GoldenProfile | None,
) -> dict[str, str]:
    """A run's row in HPARAMS, in texts: numbers get four digits there. All runs have the columns of the first."""
    named = options.get("layers") or options.get("edit", {}).get("layers")
    blocks, settings = (update.layers, update.options) if update else ([], {})
    chosen_by = "hand" if named else "not known" if update else "none"
    if profile and not named:  # the first that the method can edit (see `choose_layers`)
        ranked = dict.fromkeys([*profile.golden_layers, *profile.ranking])
        blocks = [block for block in ranked if block in blocks][: len(profile.golden_layers)]
        chosen_by = f"{profile.method}, {profile.order}" if profile.scope else profile.method
    return {
        "block": ", ".join(map(str, named or blocks)) or "none",
        "block chosen by": chosen_by,
        "method": update.method if update else "none",
        "model": model,
        "request set": request_set(options),
        "requests": str(requests),
        "seed": str(options.get("seed", 0)),
        "settings": ", ".join(f"{name} {value}" for name, value in settings.items() if not isinstance(value, dict)),
        "with chat template": "yes" if options.get("chat") else "no",
    }


def request_set(options: Mapping[str, Any]) -> str:
    """What a command's requests are called: the facts themselves, or where they are from, and which part of it."""
    name = "; ".join(options.get("fact") or [str(options.get("requests", "demo"))])
    name += f" of {options['after']}" if name == "missed" and options.get("after") else ""
    return name + "".join(f", {part} {options[part]}" for part in ("offset", "limit") if options.get(part))


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

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Without the epoch, which Lightning puts beside every figure."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


MAKERS: dict[str, Callable[[Path], Logger]] = {
    # its events lie in the folder itself, so that `tensorboard --logdir runs` shows a run a folder
    "tensorboard": lambda at: EventsLogger(at.parent, at.name, "", default_hp_metric=False, flush_secs=10),
    "csv": lambda at: CSVLogger(at, "csv"),
    "wandb": lambda at: WandbLogger(at.name, at, project=PROJECT),
    "mlflow": lambda at: MLFlowLogger(PROJECT, at.name, save_dir=str(at / "mlruns")),
}


def show_on_board(store: Store) -> None:
    """Append what TensorBoard does not have yet of a store's versions, whichever process published them.

    A store has one file of events, whatever number of updates; it knows how long that is, so that what a kill left
    half written is written again.
    """
    with transaction(store.database) as database:
        rows = database.execute("SELECT number FROM versions WHERE shown = 0 ORDER BY number").fetchall()
        if rows:
            events = []
            for (number,) in rows:
                figures = read_metrics(store.folder, number)
                values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(figures).items()]
                events.append(Event(wall_time=figures["made"], step=number, summary=Summary(value=values)))
            store.set_about("board", _append(store.folder / BOARD / EVENTS, int(store.about("board") or 0), events))
            database.executemany("UPDATE versions SET shown = 1 WHERE number = ?", rows)


def _append(file: Path, size: int, events: Sequence[Event]) -> int:
    """Add events to a file of so many bytes, a new one where it is shorter; returns how many it has then."""
    file.parent.mkdir(exist_ok=True)
    with file.open("ab") as opened:
        start = size if opened.tell() >= size else 0
        opened.truncate(start)
        writer = RecordWriter(opened)
        for event in events if start else [Event(file_version="brain.Event:2"), *events]:
            writer.write(event.SerializeToString())
        opened.flush()
        os.fsync(opened.fileno())
        return opened.tell()


def scalars(figures: dict[str, Any]) -> dict[str, float]:
    """A version's figures by their tags in TensorBoard, as measured with it in force."""
    after = figures["after"]
    found = {f"version_0_requests/{place}_{name}": float(figures[name]) for place, name in enumerate(COUNTS, 1)}
    found |= {tag(name, "version"): one["mean"] for name, one in after["metrics"].items() if name != "perplexity"}
    found |= {f"version_4_damage/{name}": after[name] for name in ("perplexity_ratio", "drift")}
    if after["earlier"] is not None:
        found["version_2_teacher-forced/5_earlier_facts"] = after["earlier"]
    return found | {f"version_5_seconds/{name}": float(value) for name, value in figures["seconds"].items()}

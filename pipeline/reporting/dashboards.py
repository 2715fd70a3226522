"""TensorBoard as every command uses it: tags in the order of reading, charts of several figures, the HPARAMS page.

TensorBoard sorts by name: numbers in tags put stages, groups and figures in the order that people want them in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from torch.utils.tensorboard import SummaryWriter

from pipeline.attribution import GoldenProfile
from pipeline.editing import WeightUpdate
from pipeline.reporting.groups import GROUPS, label

Layout = dict[str, dict[str, list[Any]]]

CHIEF = ("rewrite", "rephrase", "locality")
COMPARED = ("generation_exact_match", *CHIEF, "portability", "rome_score", "perplexity", "locality_kl", "text_kl")
COLUMNS: dict[str, type] = {  # of HPARAMS, the first five being shown at once
    "method": str,
    "block": float,
    "requests": float,
    "block chosen by": str,
    "request set": str,
    "model": str,
    "chat": bool,
    "learning rate": float,
    "epochs": float,
    "rank": float,
    "steps": float,
    "bound": float,
    "strength": float,
    "devices": str,
    "seed": float,
}
TYPES = {  # of a column: the protocol's name, and its field
    str: (api_pb2.DATA_TYPE_STRING, "string_value"),
    float: (api_pb2.DATA_TYPE_FLOAT64, "number_value"),
    bool: (api_pb2.DATA_TYPE_BOOL, "bool_value"),
}


def tag(name: str, stage: str = "evaluation") -> str:
    """A metric's tag: stage and group, then its place among them."""
    kind = name.partition("/")[0]
    for number, (group, members) in enumerate(GROUPS.items(), start=1):
        if kind in members:
            return f"{stage}_{number}_{group.replace(' ', '_')}/{list(members).index(kind) + 1}_{name}"
    raise KeyError(name)


def columns(
    model: str,
    requests: int,
    options: Mapping[str, Any],
    update: WeightUpdate | None,
    profile: GoldenProfile | None,
) -> dict[str, Any]:
    """A run's row in HPARAMS: what was done where, and the settings that its method looks at."""
    row: dict[str, Any] = {"requests": requests, "model": model}
    row |= {"request set": options.get("requests"), "chat": options.get("chat"), "seed": options.get("seed")}
    row["devices"] = str(options.get("trainer", {}).get("devices", ""))
    if update:
        found = profile is not None and update.layers[0] in profile.golden_layers
        row |= {"method": update.method, "block": update.layers[0]}
        row["block chosen by"] = f"{profile.method}, {profile.order}" if profile and found else "hand"
        row |= {name: update.options.get(name) for name in ("epochs", "rank", "steps", "bound", "strength")}
        rates = [update.options[name] for name in ("learning_rate", "step", "rate") if name in update.options]
        row["learning rate"] = rates[0] if rates else None
    return {name: kind(row[name]) for name, kind in COLUMNS.items() if row.get(name) is not None}


def edit_charts() -> Layout:
    """Chief figures side by side, from step 0, before the edit, to step 1, after it."""
    own = ("generation_exact_match", "generation_containment", "rephrase_exact_match", "distractor_exact_match")
    damage = ("locality_kl", "text_kl")
    return {
        "The edit: before (step 0) and after (step 1)": {
            "rewrite, rephrase, locality": _chart(map(tag, CHIEF)),
            "the model's own answers": _chart(map(tag, own)),
            "perplexity": _chart([tag("perplexity")]),
            "divergence from the base, nats": _chart(map(tag, damage)),
        }
    }


def study_charts(study: Mapping[str, Sequence[str]]) -> Layout:
    """What edits come to block by block (a step is a block), a chart a set and method, and the scores in one.

    Args:
        study: by set its methods.
    """
    pairs = [(name, method) for name, methods in study.items() for method in methods]
    charts = {"score, of every set and method": _chart(study_tag(*pair, "score") for pair in pairs)}
    for name, method in pairs:
        charts[f"{name}, {method}: rewrite, rephrase, locality"] = _chart(study_tag(name, method, m) for m in CHIEF)
    return {"Single edits at every block (step: block)": charts}


def store_charts() -> Layout:
    """A store's figures over its versions (a step is a version)."""
    return {
        "A store (step: version)": {
            "rewrite, rephrase, locality": _chart(tag(name, "version") for name in CHIEF),
            "perplexity over the base's": _chart(["version_4_damage/perplexity_ratio"]),
            "facts": _chart(["version_0_requests/4_facts"]),
        }
    }


def study_tag(name: str, method: str, metric: str) -> str:
    """The tag of a figure by block."""
    places = {"score": 1} | {known: place for place, known in enumerate(CHIEF, start=2)}
    return f"study_{name}_{method}/{places.get(metric, 5)}_{metric.replace('/', '_')}_by_block"


def _chart(tags: Any) -> list[Any]:
    """A chart of these tags and no others: TensorBoard takes patterns, which match from the beginning."""
    return ["Multiline", [f"{re.escape(each)}$" for each in tags]]


class EventsLogger(TensorBoardLogger):
    """TensorBoardLogger without its hparams.yaml: options.yaml holds the options.

    Attributes:
        opened: whether anything was shown.
    """

    opened = False

    @property
    def experiment(self) -> SummaryWriter:
        """The writer; its file is made when it is first asked for."""
        self.opened = True
        return super().experiment

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

    @rank_zero_only
    def compare(self, row: Mapping[str, Any]) -> None:
        """Put a run into the HPARAMS page, whose columns are the same for all runs.

        The metrics in it are read from the scalars of their tags: none is written for it.

        Args:
            row: values of columns of `COLUMNS`, in their types; others stay empty.
        """
        started = SessionStartInfo()
        for name, value in row.items():
            setattr(started.hparams[_key(name)], TYPES[COLUMNS[name]][1], value)
        ended = SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
        contents = {
            metadata.EXPERIMENT_TAG: HParamsPluginData(experiment=_experiment()),
            metadata.SESSION_START_INFO_TAG: HParamsPluginData(session_start_info=started),
            metadata.SESSION_END_INFO_TAG: HParamsPluginData(session_end_info=ended),
        }
        writer: Any = self.experiment.file_writer
        for name, content in contents.items():
            value = Summary.Value(tag=name, metadata=metadata.create_summary_metadata(content))
            writer.add_summary(Summary(value=[value]))

    @rank_zero_only
    def charts(self, layout: Layout) -> None:
        """Charts of several figures, on the page of custom scalars."""
        self.experiment.add_custom_scalars(layout)


def _experiment() -> api_pb2.Experiment:
    """The columns of HPARAMS, in their order."""
    settings = [
        api_pb2.HParamInfo(name=_key(name), display_name=name, type=TYPES[kind][0])
        for name, kind in COLUMNS.items()
    ]
    metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag(name)), display_name=label(name)) for name in COMPARED
    ]
    return api_pb2.Experiment(hparam_infos=settings, metric_infos=metrics)


def _key(column: str) -> str:
    """By which TensorBoard sorts, and of which it shows nothing."""
    return f"{list(COLUMNS).index(column) + 1:02d} {column}"

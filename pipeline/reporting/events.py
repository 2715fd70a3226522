"""TensorBoard's writer as every command uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from pipeline.reporting.dashboards import COLUMNS, Layout, metric_names

TYPES = {str: api_pb2.DATA_TYPE_STRING, float: api_pb2.DATA_TYPE_FLOAT64, bool: api_pb2.DATA_TYPE_BOOL}
FIELDS = {str: "string_value", float: "number_value", bool: "bool_value"}


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

    @rank_zero_only
    def compare(self, row: Mapping[str, Any]) -> None:
        """Put a run into the HPARAMS page, whose columns are the same for all runs.

        The metrics in it are read from the scalars of their tags: none is written for it.

        Args:
            row: values of columns of `COLUMNS`, in their types; others stay empty.
        """
        started = SessionStartInfo()
        for name, value in row.items():
            setattr(started.hparams[_key(name)], FIELDS[COLUMNS[name]], value)
        ended = SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
        contents = {
            metadata.EXPERIMENT_TAG: HParamsPluginData(experiment=_experiment()),
            metadata.SESSION_START_INFO_TAG: HParamsPluginData(session_start_info=started),
            metadata.SESSION_END_INFO_TAG: HParamsPluginData(session_end_info=ended),
        }
        for tag, content in contents.items():
            value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(content))
            self.experiment._get_file_writer().add_summary(Summary(value=[value]))

    @rank_zero_only
    def charts(self, layout: Layout) -> None:
        """Charts of several figures, on the page of custom scalars."""
        self.experiment.add_custom_scalars(layout)


def _experiment() -> api_pb2.Experiment:
    """The columns of HPARAMS, in their order."""
    settings = [
        api_pb2.HParamInfo(name=_key(name), display_name=name, type=TYPES[kind]) for name, kind in COLUMNS.items()
    ]
    metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=shown)
        for tag, shown in metric_names().items()
    ]
    return api_pb2.Experiment(hparam_infos=settings, metric_infos=metrics)


def _key(column: str) -> str:
    """By which TensorBoard sorts, and of which it shows nothing."""
    return f"{list(COLUMNS).index(column) + 1:02d} {column}"

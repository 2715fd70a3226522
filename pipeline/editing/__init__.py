"""The change: one file a kind of edit, all entered in METHODS, all ending in a WeightUpdate."""

from pipeline.editing.edit import METHODS, accept, check_earlier, choose_layers, edit
from pipeline.editing.export import export_adapter, export_merged
from pipeline.editing.finetune import FineTune
from pipeline.editing.leave_out import can_leave_out, leave_out
from pipeline.editing.update import WeightUpdate

__all__ = [
    "METHODS",
    "FineTune",
    "WeightUpdate",
    "accept",
    "can_leave_out",
    "check_earlier",
    "choose_layers",
    "edit",
    "export_adapter",
    "export_merged",
    "leave_out",
]

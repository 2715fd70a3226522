"""The change: one file a kind of edit, all ending in a WeightUpdate."""

from pipeline.offered import offered

__getattr__, __all__ = offered(
    __name__,
    {
        "editor": ("METHODS", "accept", "check_earlier", "choose_layers", "edit", "settings_of"),
        "export": ("export_adapter", "export_merged"),
        "finetune": ("FineTune",),
        "leave_out": ("can_leave_out", "leave_out"),
        "method": ("register",),
        "update": ("WeightUpdate",),
    },
)

"""The change: one file a kind of edit, all ending in a WeightUpdate."""

from pipeline.offered import offered

__getattr__, __all__ = offered(
    __name__,
    {
        "editor": ("METHODS", "accept", "can_leave_out", "check_earlier", "choose_layers", "edit", "leave_out"),
        "export": ("export_adapter", "export_merged"),
        "finetune": ("FineTune",),
        "method": ("register", "settings_of"),
        "update": ("WeightUpdate",),
    },
)

"""The change: one file a kind of edit, all ending in a WeightUpdate."""

from pipeline.offered import offered

__getattr__, __all__ = offered(
    __name__,
    {
        "edit": ("accept", "check_earlier", "choose_layers", "edit"),
        "export": ("export_adapter", "export_merged"),
        "leave_out": ("can_leave_out", "leave_out"),
        "method": ("METHODS",),
        "update": ("WeightUpdate",),
    },
)

"""What a device needs for a model of which only the config is there."""

from pipeline.offered import offered

__getattr__, __all__ = offered(__name__, {"plan": ("MemoryPlan", "Need", "plan_memory")})

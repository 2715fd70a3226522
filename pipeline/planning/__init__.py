"""What a device needs for a model of which only the config is there."""

from pipeline.planning.plan import MemoryPlan, Need, plan_memory

__all__ = ["MemoryPlan", "Need", "plan_memory"]

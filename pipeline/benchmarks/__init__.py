"""What `run.py benchmark` measures: speed, memory and quality of the methods themselves, against what is asked."""

from pipeline.benchmarks.attribution import AttributionBench
from pipeline.benchmarks.bench import Bench
from pipeline.benchmarks.distributed import DistributedBench
from pipeline.benchmarks.editing import EditingBench
from pipeline.benchmarks.evaluation import EvaluationBench
from pipeline.benchmarks.updates import UpdatesBench

BENCHMARKS: dict[str, type[Bench]] = {
    "attribution": AttributionBench,
    "distributed": DistributedBench,
    "editing": EditingBench,
    "evaluation": EvaluationBench,
    "updates": UpdatesBench,
}

__all__ = ["BENCHMARKS", "Bench"]

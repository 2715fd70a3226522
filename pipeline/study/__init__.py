"""What stands above editing and evaluation: trial edits, studies, and measurements of the methods themselves."""

from pipeline.study.attribution import AttributionBench
from pipeline.study.bench import Bench
from pipeline.study.distributed import DistributedBench
from pipeline.study.editing import EditingBench
from pipeline.study.evaluation import EvaluationBench
from pipeline.study.study import Study, run_study
from pipeline.study.sweep import Grid, Sweep
from pipeline.study.updates import UpdatesBench

BENCHMARKS: dict[str, type[Bench]] = {
    "attribution": AttributionBench,
    "distributed": DistributedBench,
    "editing": EditingBench,
    "evaluation": EvaluationBench,
    "updates": UpdatesBench,
}

__all__ = ["BENCHMARKS", "Bench", "Grid", "Study", "Sweep", "run_study"]

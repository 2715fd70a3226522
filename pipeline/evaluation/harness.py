"""Tasks of EleutherAI's evaluation harness (lm-eval), on the model as it is in memory: `evaluate --harness`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

from pipeline.errors import UserError, did_you_mean, one_line
from pipeline.evaluation.metrics import NORMAL_95, Estimate
from pipeline.model.llm import LLM
from pipeline.running.processes import world_size

BATCH_SIZE = 16  # texts at a time

Found = tuple[str, dict[int, float], Estimate]  # a metric, each item's value, and the mean as the harness gives it


def load_tasks(names: Sequence[str]) -> list[Any]:
    """The harness's tasks of these names, or of these YAML files, with their data; a group's one by one.

    UserError on several devices, where lm-eval is not installed, or a task does not exist or cannot be read.
    """
    if names and world_size() > 1:
        raise UserError("harness: runs on one device; give --trainer.devices 1")
    if not names:
        return []
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            "harness: needs the package `lm-eval`; install the extra: pip install -e '.[harness]'"
        ) from None
    manager, tasks = TaskManager(), dict[str, Any]()
    for name in names:
        if name not in manager.all_tasks and not name.endswith(".yaml"):
            raise UserError(f"harness: {name!r} is no task of lm-eval{did_you_mean(name, manager.all_tasks)}")
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # of whatever kind: a task has a loader of its own
            raise UserError(f"harness: {name}: cannot be read: {type(error).__name__}: {one_line(error)}") from None
    return [*tasks.values()]


def run_tasks(llm: LLM, tasks: Sequence[Any], limit: int | None) -> Iterator[Found]:
    """Every metric of the tasks that is a mean over items, on so many items of each; its interval is the mean ±
    1.96 of the harness's standard errors. UserError where a task cannot be run.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer: Any = deepcopy(llm.tokenizer)  # the harness gives it a token to pad with
    try:
        with llm.frozen():
            model = HFLM(pretrained=llm.model, tokenizer=tokenizer, backend="causal", batch_size=BATCH_SIZE)
            found = simple_evaluate(model, tasks=[*tasks], limit=limit)
    except Exception as error:
        raise UserError(f"harness: cannot be run: {type(error).__name__}: {one_line(error)}") from None
    assert found
    for task, samples in found["samples"].items():
        yield from _means(task, samples, found["results"][task])


def _means(task: str, samples: Sequence[dict[str, Any]], results: dict[str, Any]) -> Iterator[Found]:
    for (metric, by), stderr in _stderrs(results).items():
        values = {one["doc_id"]: one.get(metric) for one in samples if one["filter"] == by}
        numbers = {item: float(value) for item, value in values.items() if isinstance(value, int | float)}
        if len(numbers) < len(values):
            continue  # what is no mean over items, such as a perplexity
        mean, half = results[f"{metric},{by}"], NORMAL_95 * stderr
        name = f"harness/{task} {metric}" + (f" {by}" if by != "none" else "")
        yield name, numbers, Estimate(mean, len(numbers), mean - half, mean + half)


def _stderrs(results: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Standard errors, by metric and filter of the answers."""
    keys = [key.rpartition("_stderr,") for key in results]
    found = {(metric, by): results[f"{metric}_stderr,{by}"] for metric, middle, by in keys if middle}
    return {key: value for key, value in found.items() if isinstance(value, float)}

"""`run.py benchmark editing`: how well every method edits, alone, in batches and one update after another.

Requests are CounterFact's, measured teacher-forced as in EasyEdit. Every figure is kept as soon as it is found, so
that an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from pipeline.attribution import find_golden_layer
from pipeline.benchmarks.bench import Bench, Figures
from pipeline.editing import WeightUpdate, edit
from pipeline.evaluation import Evaluator
from pipeline.model import collate_targets, encode, target_losses
from pipeline.model.upper import handing_on, reading_enter
from pipeline.options import (
    AttributionOptions,
    EditOptions,
    FinetuneOptions,
    LocateOptions,
    StatisticsOptions,
)
from pipeline.requests import EditRequest

PROXY = slice(1000, 1128)  # records that name the golden layer
BATCH, ALONE, MANY = slice(0, 100), slice(0, 20), slice(0, 1000)
HIGH, TURNS = 2, 3  # fine-tuned at two thirds of the height, so many times each way
UPDATES, EACH = 10, 50  # one update after another
BEST = "memit"
SMALL = LocateOptions(  # as in configs/many.yaml
    bound=1.3, step=0.13, steps=25, key_contexts=1, neighbour_weight=0.2, strength=300.0
)
FINISH = FinetuneOptions(  # on top of it, for what it missed; in configs/many.yaml as well
    epochs=4, learning_rate=0.015, last_step=0.1, kl=3.0, learnt=0.6
)
OTHERS, FURTHER = ("finetune", "lora", "one_pass"), ("emmet", "rome", "alphaedit")

BOUNDS: dict[str, Figures] = {  # what a figure is to reach: at least, or for costs and perplexity at most
    f"batch of 100, {BEST}": {"rewrite": 0.95, "rephrase": 0.30, "locality": 0.85, "cost": 80},
    "batch of 100, finetune": {"rewrite": 0.95, "rephrase": 0.30, "locality": 0.50, "cost": 60},
    "batch of 100, lora": {"rewrite": 0.95, "rephrase": 0.25, "locality": 0.45},
    "batch of 100, one_pass": {"cost": 4},
    f"20 requests, each alone, {BEST}": {"rewrite": 1.00, "rephrase": 0.40, "locality": 0.90},
    f"batch of 1000, {BEST} then finetune": {"rewrite": 0.80, "locality": 0.55, "perplexity ratio": 1.20},
    f"ten updates of 50, {BEST} then finetune": {"rewrite": 0.80, "locality": 0.60, "perplexity ratio": 1.15},
    "upper blocks alone, fine-tuning": {"speed-up": 1.5, "difference of the gradient": 1e-5},
}
AT_MOST = ("cost", "perplexity ratio", "difference of the gradient")


class EditingBench(Bench):
    """The golden layer, and one method a measurement."""

    bounds = BOUNDS
    at_most = AT_MOST
    needed = PROXY.stop

    def measurements(self) -> Iterator[tuple[str, Callable[[], Figures]]]:
        """Name and function of each, what something is asked of first."""
        yield "golden layer by LGA", self.golden
        for method in (BEST, *OTHERS):
            yield f"batch of 100, {method}", partial(self.batch, method, BATCH)
        yield f"20 requests, each alone, {BEST}", self.alone
        yield "upper blocks alone, fine-tuning", self.upper_blocks
        yield f"ten updates of 50, {BEST} then finetune", self.updates
        yield f"batch of 1000, {BEST} then finetune", self.many
        for method in FURTHER:
            yield f"batch of 100, {method}", partial(self.batch, method, BATCH)

    def golden(self) -> Figures:
        """The golden layer that LGA names from records which no figure is measured on."""
        profile = find_golden_layer(self.llm, self.records[PROXY], AttributionOptions(), self.trainer)
        return {"block": profile.golden_layers[0]}

    def edit(
        self,
        requests: Sequence[EditRequest],
        method: str,
        after: WeightUpdate | None = None,
        work: str | None = None,
        **changed: Any,
    ) -> WeightUpdate:
        """An edit at the golden layer, with the project's defaults but for the groups of options named.

        A long one, whose time is not measured, keeps its work in a folder named `work`, and goes on from it.
        """
        layer = int(self.kept("golden layer by LGA", self.golden)["block"])
        statistics = StatisticsOptions(text=self.text)
        options = EditOptions(method=method, layers=[layer], statistics=statistics, **changed)
        place = self.folder / work if work else None
        return edit(
            self.llm, requests, None, options, self.trainer, seed=self.options.seed, after=after, work=place
        )

    def batch(self, method: str, records: slice) -> Figures:
        """All requests in one update."""
        requests = self.records[records]
        evaluator = self._evaluator(requests)
        base = evaluator.measure("Measuring base").metrics
        passes = [self.pass_seconds(requests[:100])]
        self.edit(requests[:1], method)  # statistics are there, and code is warm
        started = time.perf_counter()
        update = self.edit(requests, method)
        seconds = time.perf_counter() - started
        passes.append(self.pass_seconds(requests[:100]))
        figures = self._figures(evaluator, base["perplexity"].mean, update)
        return figures | {
            "cost": seconds / len(requests) / median(passes),
            "seconds a request": seconds / len(requests),
        }

    def alone(self) -> Figures:
        """Every request in an update of its own, from the fresh model."""
        found = []
        for request in self.records[ALONE]:
            evaluator = Evaluator(self.llm, [request], trainer=self.trainer, kinds=("probes",))
            evaluator.measure("Measuring base")
            with self.edit([request], BEST).applied(self.llm):
                found.append(evaluator.measure("Measuring edited").metrics)
        return {name: sum(each[name].mean for each in found) / len(found) for name in found[0]}

    def updates(self) -> Figures:
        """One update on top of another, measured on all of them; then all are taught what they miss by then."""
        requests = self.records[: UPDATES * EACH]
        update = None
        for start in range(0, len(requests), EACH):
            update = self.edit(requests[start : start + EACH], BEST, update, f"update-{start}", locate=SMALL)
        assert update
        before = {f"{name} before finetune": value for name, value in self._held(requests, update).items()}
        return self._held(requests, self.edit(requests, "finetune", update, finetune=FINISH)) | before

    def many(self) -> Figures:
        """All requests in one batch: most by the best method, the rest by fine-tuning on top."""
        requests = self.records[MANY]
        update = self.edit(requests, BEST, work="many", locate=SMALL)
        before = {f"{name} before finetune": value for name, value in self._held(requests, update).items()}
        return self._held(requests, self.edit(requests, "finetune", update, finetune=FINISH)) | before

    def upper_blocks(self) -> Figures:
        """Fine-tuning far up, with the blocks below run once and with all of them run every time, in turns."""
        requests, layer = self.records[BATCH], HIGH * len(self.llm.blocks) // 3
        seconds: dict[bool, list[float]] = {True: [], False: []}
        weights: dict[bool, dict[str, torch.Tensor]] = {}
        for _ in range(TURNS):
            for reuse in (True, False):
                finetune = FinetuneOptions(epochs=10, contexts=0, learnt=0.0, kl=0.0, whiten=0.0, reuse=reuse)
                options = EditOptions(method="finetune", layers=[layer], finetune=finetune)
                started = time.perf_counter()
                weights[reuse] = edit(self.llm, requests, None, options, self.trainer).tensors
                seconds[reuse].append(time.perf_counter() - started)
        base = {name: self.llm.model.get_parameter(name).detach().cpu() for name in weights[True]}
        upper, every = ({name: weights[way][name] - base[name] for name in base} for way in (True, False))
        return {
            "speed-up": median(seconds[False]) / median(seconds[True]),
            "difference of the gradient": self._upper_gradient(layer, requests),
            "difference of the change": relative_difference(upper, every),
        }

    def _upper_gradient(self, layer: int, requests: Sequence[EditRequest]) -> float:
        """How far gradients over the requests are, without the blocks below, from those with them."""
        rows = encode(self.llm, [(r.prompt, r.new_answer) for r in requests])
        batch = move_data_to_device(collate_targets(rows, self.llm.pad_token_id), self.device)
        names = self.llm.blocks[layer].weight_names("mlp")
        weights = [self.llm.model.get_parameter(name) for name in names]
        with self.llm.frozen(trainable=names), reading_enter(self.llm, layer) as entering:
            every = torch.autograd.grad(target_losses(self.llm.model, batch).mean(), weights)
            with handing_on(self.llm, layer, entering[0].detach()):
                upper = torch.autograd.grad(target_losses(self.llm.model, batch).mean(), weights)
        return relative_difference(dict(zip(names, upper, strict=True)), dict(zip(names, every, strict=True)))

    def _evaluator(self, requests: Sequence[EditRequest]) -> Evaluator:
        return Evaluator(self.llm, requests, trainer=self.trainer, kinds=("probes", "text"))

    def _held(self, requests: Sequence[EditRequest], update: WeightUpdate) -> Figures:
        evaluator = self._evaluator(requests)
        base = evaluator.measure("Measuring base").metrics
        return self._figures(evaluator, base["perplexity"].mean, update)

    def _figures(self, evaluator: Evaluator, perplexity: float, update: WeightUpdate) -> Figures:
        with update.applied(self.llm):
            metrics = evaluator.measure("Measuring edited").metrics
        ratio = metrics.pop("perplexity").mean / perplexity
        return {name: estimate.mean for name, estimate in metrics.items()} | {"perplexity ratio": ratio}


def relative_difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest of ‖found − expected‖ / ‖expected‖ over tensors, as Frobenius norms."""
    return max(((found[name] - tensor).norm() / tensor.norm()).item() for name, tensor in expected.items())

"""How well every method edits, alone, in batches and one update after another: `python -m benchmarks.editing …`.

Requests are CounterFact's, measured teacher-forced as in EasyEdit, at the golden layer that LGA names from other
records. Cost is in plain forward passes of a request's own prompt and new answer, the whole edit included.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from statistics import median

from benchmarks.bench import Bench, Figures, in_turns, plain_passes, run
from pipeline import EditOptions, EditRequest, StatisticsOptions, WeightUpdate, edit, find_golden_layer
from pipeline.evaluation.evaluator import Evaluator

PROXY = slice(1000, 1128)  # records that name the golden layer
BATCH, ALONE, MANY = 100, 20, 1000  # records
UPDATES, EACH = 10, 50  # one update after another
BEST, FURTHER = "memit", ("emmet", "rome", "alphaedit")
LEAST: dict[str, Figures] = {
    "auto": {"rewrite": 0.97, "rephrase": 0.55, "locality": 0.88},
    BEST: {"rewrite": 0.95, "rephrase": 0.30, "locality": 0.85},
    "finetune": {"rewrite": 0.95, "rephrase": 0.30, "locality": 0.50},
    "lora": {"rewrite": 0.95, "rephrase": 0.25, "locality": 0.45},
}
COST = {BEST: 120.0, "finetune": 60.0}


class Editing:
    """Edits of CounterFact's records at the golden layer, with the methods' defaults."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.llm, self.records = bench, bench.llm, bench.records
        self.profile = find_golden_layer(self.llm, self.records[PROXY], trainer=bench.trainer)

    def edit(self, requests: Sequence[EditRequest], method: str, after: WeightUpdate | None = None) -> WeightUpdate:
        """An edit by the method's defaults."""
        options = EditOptions(method=method, statistics=StatisticsOptions(text=self.bench.text))
        trainer, seed = self.bench.trainer, self.bench.seed
        return edit(self.llm, requests, self.profile, options, trainer, seed=seed, after=after)

    def batch(self, method: str) -> Figures:
        """All requests in one update."""
        requests = self.records[:BATCH]
        self.edit(requests[:1], method)  # statistics are there, and code is warm
        passing = partial(
            plain_passes, self.llm, [(one.prompt, one.new_answer) for one in requests], self.bench.trainer
        )
        before, _ = in_turns({"passed": passing}, 5)
        started = time.perf_counter()
        update = self.edit(requests, method)
        seconds = time.perf_counter() - started
        after, _ = in_turns({"passed": passing}, 5)
        cost = seconds / median([before["passed"], after["passed"]])
        return self.held(requests, update) | {"cost": cost, "seconds a request": seconds / len(requests)}

    def alone(self) -> Figures:
        """Every request in an update of its own, from the fresh model."""
        found = [self.held([one], self.edit([one], BEST), ("probes",)) for one in self.records[:ALONE]]
        return {name: sum(each[name] for each in found) / len(found) for name in found[0]}

    def one_after_another(self, updates: int, each: int) -> Figures:
        """One update on top of another, measured on all of them."""
        requests, update = self.records[: updates * each], None
        for start in range(0, len(requests), each):
            update = self.edit(requests[start : start + each], BEST, update)
        assert update
        return self.held(requests, update)

    def held(
        self, requests: Sequence[EditRequest], update: WeightUpdate, kinds: Sequence[str] = ("probes", "text")
    ) -> Figures:
        """The edited model's figures; perplexity over that of the base."""
        evaluator = Evaluator(self.llm, requests, trainer=self.bench.trainer, kinds=kinds)
        base = evaluator.measure("Measuring base").metrics
        with update.applied(self.llm):
            figures = {name: found.mean for name, found in evaluator.measure("Measuring edited").metrics.items()}
        if "perplexity" in figures:
            figures["perplexity ratio"] = figures.pop("perplexity") / base["perplexity"].mean
        return figures


def main(words: Sequence[str] | None = None) -> None:
    bench = Bench(__doc__, words, needed=PROXY.stop)
    editing = Editing(bench)
    bench.measure("golden layer by LGA", lambda: {"block": editing.profile.golden_layers[0]})
    for method, least in LEAST.items():
        most = {"cost": COST[method]} if method in COST else {}
        bench.measure(f"batch of {BATCH}, {method}", partial(editing.batch, method), least, most)
    alone = {"rewrite": 1.00, "rephrase": 0.40, "locality": 0.90}
    bench.measure(f"{ALONE} requests, each alone, {BEST}", editing.alone, alone)
    bench.measure(
        f"{UPDATES} updates of {EACH}, {BEST}",
        partial(editing.one_after_another, UPDATES, EACH),
        least={"rewrite": 0.93, "rephrase": 0.45, "locality": 0.80},
        most={"perplexity ratio": 1.06},
    )
    bench.measure(
        f"batch of {MANY}, {BEST}",
        partial(editing.one_after_another, 1, MANY),
        least={"rewrite": 0.93, "rephrase": 0.45, "locality": 0.75},
        most={"perplexity ratio": 1.08},
    )
    for method in FURTHER:
        bench.measure(f"batch of {BATCH}, {method}", partial(editing.batch, method))


if __name__ == "__main__":
    run(main)

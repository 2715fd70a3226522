"""`run.py benchmark attribution`: what layer gradient analysis costs in time and memory, and what it is worth.

Requests are CounterFact's. What is compared runs in turns, and medians are taken.

Memory is that of the weights and of all tensors alive at once in a pass over the largest batch: on a CPU as the
profiler sees them come and go, on CUDA as the allocator counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from lightning.fabric.utilities import move_data_to_device

from pipeline.attribution import GradientAttribution, score_requests
from pipeline.attribution.lga import (
    AttributionModule,
    collate_sides,
    encode_sides,
    kept_of_a_token,
    tokens_of,
)
from pipeline.attribution.scoring import tokens_at_once
from pipeline.benchmarks.bench import COUNTERFACT, Bench, Figures
from pipeline.model import TargetBatch, encode, target_logits, target_losses
from pipeline.model.targets import collate_targets
from pipeline.options import AttributionOptions, StudyCommand
from pipeline.requests import EditRequest, in_batches, load_requests
from pipeline.study.study import parted, run_study

SOME = slice(0, 64)  # records
MANY = 128  # records, and twice as many
SETS = (COUNTERFACT, "zsre_knowedit.json")  # whose requests are tried at every block
TRIED, PROXY = 32, 128  # requests of each, and others to choose by
TURNS = 3

BOUNDS: dict[str, Figures] = {  # what a figure is to reach: at most, and speed-ups at least
    "LGA against a plain pass, same batches": {"time": 2.5, "memory": 1.6},
    "LGA against autograd, one request at a time": {"speed-up": 4.0},
    "LGA, twice as many requests": {"time": 2.1},
} | {
    f"trial edits at every block, {Path(file).stem}": {
        "sweep over LGA": 100.0,
        "regret of LGA's block": 0.03,
        "golden layer over each request's own best": 0.90,
    }
    for file in SETS
}
AT_MOST = ("time", "memory", "regret of LGA's block")


class AttributionBench(Bench):
    """LGA against less, against the plain way to the same scores, and against trying every block."""

    bounds = BOUNDS
    at_most = AT_MOST
    files: Sequence[str] = SETS
    needed = 2 * MANY

    def measurements(self) -> Iterator[tuple[str, Callable[[], Figures]]]:
        """Name and function of each."""
        yield "LGA against a plain pass, same batches", self.plain_pass
        yield "LGA against autograd, one request at a time", self.autograd
        yield "LGA, twice as many requests", self.twice
        for file in SETS:
            yield f"trial edits at every block, {Path(file).stem}", partial(self.trials, file)

    def plain_pass(self) -> Figures:
        """Time and memory over those of a forward pass, logits at the answers' tokens included."""
        batches = self._batches(self.records[SOME])
        plain, lga = partial(self._plain, batches), partial(self._lga, batches)
        seconds, _ = self.in_turns({"plain": plain, "lga": lga}, TURNS, warm_up=1)
        largest = max(batches, key=lambda batch: batch.input_ids_BT.numel())
        memory = self._memory({"plain": partial(self._plain, [largest]), "lga": partial(self._lga, [largest])})
        return {
            "time": seconds["lga"] / seconds["plain"],
            "memory": memory["lga"] / memory["plain"],
            "tokens a second": sum(batch.input_ids_BT.numel() for batch in batches) / seconds["lga"],
        }

    def autograd(self) -> Figures:
        """How much sooner LGA is done than the gradients themselves are, and whether both say the same."""
        requests = self.records[SOME]

        def lga() -> torch.Tensor:
            return torch.from_numpy(score_requests(self.llm, requests, trainer=self.trainer).values)

        def reference() -> torch.Tensor:
            return torch.stack([self._products(request) for request in requests])

        seconds, found = self.in_turns({"lga": lga, "autograd": reference}, TURNS, warm_up=1)
        means = {name: values.mean(0) for name, values in found.items()}
        return {
            "speed-up": seconds["autograd"] / seconds["lga"],
            "requests a second": len(requests) / seconds["lga"],
            "largest relative difference of means": (
                ((means["lga"] - means["autograd"]) / means["autograd"]).abs().max().item()
            ),
        }

    def twice(self) -> Figures:
        """Time over that for half of the requests."""
        half, whole = (partial(score_requests, self.llm, self.records[:n]) for n in (MANY, 2 * MANY))
        seconds, _ = self.in_turns({"half": half, "whole": whole}, TURNS, warm_up=1)
        return {"time": seconds["whole"] / seconds["half"]}

    def trials(self, file: str) -> Figures:
        """How near the block that LGA chooses comes to the best, and how much sooner it is found than by trying."""
        options = StudyCommand(limit=TRIED, proxy=PROXY, selectors=["lga"], trainer=self.trainer)
        options.edit.statistics.text = self.text
        requests = load_requests(str(Path(self.options.data) / file), TRIED + 4 * PROXY)
        tried = parted(Path(file).stem, requests, options)
        study = run_study(self.llm, [tried], options, self.folder / "trials")
        (method,) = options.methods
        golden = next(row for row in study.against_optimal(tried.name, method) if row["choice"] == "golden layer")
        lga = study.selectors(tried.name, method)[0]
        return {
            "sweep over LGA": float(lga["times faster than the sweep"] or 0),
            "regret of LGA's block": float(lga["regret"] or 0),
            "golden layer over each request's own best": float(golden["of the optimum"] or 0),
            "rank correlation": float(lga["spearman"] or 0),
            "block": float(golden["block"] or 0),
            "seconds of the sweep": study.grids[tried.name][method].seconds,
        }

    def _batches(self, requests: Sequence[EditRequest]) -> list[TargetBatch]:
        """Old and new answers as attribution batches them."""
        items = list(enumerate(encode_sides(self.llm, requests)))
        most = tokens_at_once(self.llm, kept_of_a_token(self.llm))
        batches = in_batches(items, lambda item: tokens_of(item[1]), AttributionOptions().batch_size, most)
        collated = [collate_sides([item for _, item in batch], self.llm.pad_token_id) for batch in batches]
        return [move_data_to_device(batch, self.device) for batch in collated]

    @torch.no_grad()
    def _plain(self, batches: Sequence[TargetBatch]) -> None:
        with self.llm.frozen():
            for batch in batches:
                target_logits(self.llm.model, batch)[0, 0].item()

    def _lga(self, batches: Sequence[TargetBatch]) -> None:
        attribution = GradientAttribution(self.llm.blocks)
        module = AttributionModule(self.llm, attribution)
        with self.llm.frozen(), attribution.attached():
            for batch in batches:
                attribution.begin(batch)
                module.scores(batch)[0, 0].item()

    def _products(self, request: EditRequest) -> torch.Tensor:
        """A request's inner product of every block, by the gradients of its MLP weights, (L,)."""
        names = [block.weight_names("mlp") for block in self.llm.blocks]
        every = [name for row in names for name in row]
        weights = [self.llm.model.get_parameter(name) for name in every]
        gradients = []
        with self.llm.frozen(trainable=every):
            for answer in (request.old_answer or "", request.new_answer):
                batch = collate_targets(encode(self.llm, [(request.prompt, answer)]))
                loss = target_losses(self.llm.model, move_data_to_device(batch, self.device)).sum()
                gradients.append(dict(zip(every, torch.autograd.grad(loss, weights), strict=True)))
        old, new = gradients
        return torch.tensor([sum((old[n] * new[n]).sum().item() for n in row) for row in names])

    def _memory(self, ways: dict[str, Callable[[], None]]) -> dict[str, float]:
        """Bytes that the weights and a way's pass take together at their peak."""
        if self.device.type == "cuda":
            peaks = {}
            for name, way in ways.items():
                torch.cuda.reset_peak_memory_stats(self.device)
                way()
                peaks[name] = float(torch.cuda.max_memory_allocated(self.device))
            return peaks
        weights = sum(p.numel() * p.element_size() for p in self.llm.model.parameters())
        return {name: weights + most_alive(way) for name, way in ways.items()}


def most_alive(way: Callable[[], None]) -> int:
    """The most bytes of tensors made on the CPU that were alive at once while `way` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        way()
    results = profiled.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    alive = accumulate(change for _, change in sorted(changes))
    return max(alive, default=0)

"""What layer gradient analysis costs: `python -m benchmarks.attribution --data DIR --output DIR`.

Time and memory over plain forward passes of the same texts, and time over the plain way to the same scores: the
gradients of every weight, one request at a time. Memory is that of the weights and of all tensors alive at once: on
a CPU as the profiler sees them come and go, on CUDA as the allocator counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.bench import Bench, Figures, batch_of, both_answers, in_turns, peak_bytes, plain_passes, run
from pipeline import LLM, EditRequest, TrainerOptions
from pipeline.attribution.find import score_requests
from pipeline.model.activations import target_losses

SOME = 64  # records
LONGEST = 8  # of them, whose memory is measured
MANY = 128  # records, and twice as many
TURNS = 3


def main(words: Sequence[str] | None = None) -> None:
    bench = Bench(__doc__, words, needed=2 * MANY)
    llm, trainer, some = bench.llm, bench.trainer, bench.records[:SOME]
    bench.measure(
        "LGA against a plain pass, same texts",
        lambda: against_plain(llm, some, trainer),
        most={"time": 2.5, "memory": 1.6},
    )
    bench.measure(
        "LGA against autograd, one request at a time",
        lambda: against_autograd(llm, some, trainer),
        least={"speed-up": 4.0},
    )
    bench.measure(
        "LGA, twice as many requests", lambda: twice(llm, bench.records[: 2 * MANY], trainer), most={"time": 2.1}
    )


def against_plain(llm: LLM, requests: Sequence[EditRequest], trainer: TrainerOptions) -> Figures:
    """Time and memory over those of forward passes, logits at the answers' tokens included.

    Time is that of all requests less that of every second one: what it takes to begin is left out.
    """
    half = requests[::2]
    longest = sorted(requests, key=lambda one: len(one.prompt))[-LONGEST:]

    def plain(some: Sequence[EditRequest]) -> None:
        plain_passes(llm, both_answers(some), trainer)

    def lga(some: Sequence[EditRequest]) -> None:
        score_requests(llm, some, trainer=trainer)

    ways = {"plain": plain, "lga": lga}
    wholes, _ = in_turns({name: partial(way, requests) for name, way in ways.items()}, TURNS, warm_up=1)
    halves, _ = in_turns({name: partial(way, half) for name, way in ways.items()}, TURNS)
    seconds = {name: wholes[name] - halves[name] for name in ways}
    peaks = {name: peak_bytes(llm, partial(way, longest), trainer) for name, way in ways.items()}
    return {
        "time": seconds["lga"] / seconds["plain"],
        "memory": peaks["lga"] / peaks["plain"],
        "requests a second": (len(requests) - len(half)) / seconds["lga"],
        "peak memory in GB": peaks["lga"] / 1e9,
    }


def against_autograd(llm: LLM, requests: Sequence[EditRequest], trainer: TrainerOptions) -> Figures:
    """How much sooner LGA is done than the gradients themselves are, and whether both say the same."""

    def lga() -> Tensor:
        return torch.from_numpy(score_requests(llm, requests, trainer=trainer).values)

    def reference() -> Tensor:
        return torch.stack([products(llm, request, trainer) for request in requests])

    seconds, found = in_turns({"lga": lga, "autograd": reference}, TURNS, warm_up=1)
    lga_L, autograd_L = found["lga"].mean(0), found["autograd"].mean(0)
    return {
        "speed-up": seconds["autograd"] / seconds["lga"],
        "largest relative difference of means": ((lga_L - autograd_L) / autograd_L).abs().max().item(),
    }


def products(llm: LLM, request: EditRequest, trainer: TrainerOptions) -> Tensor:
    """A request's inner product of every block, by the gradients of its MLP weights, (L,)."""
    names = [block.weight_names("mlp") for block in llm.blocks]
    every = [name for row in names for name in row]
    gradients = []
    with llm.frozen(trainable=every):
        for text in both_answers([request]):
            batch = batch_of(llm, [text], trainer)
            weights = [llm.model.get_parameter(name) for name in every]
            found = torch.autograd.grad(target_losses(llm.model, batch).sum(), weights)
            gradients.append(dict(zip(every, found, strict=True)))
    old, new = gradients
    return torch.tensor([sum((old[name] * new[name]).sum().item() for name in row) for row in names])


def twice(llm: LLM, requests: Sequence[EditRequest], trainer: TrainerOptions) -> Figures:
    """Time over that for half of the requests."""
    half, whole = requests[: len(requests) // 2], requests
    ways = {"half": partial(score_requests, llm, half), "whole": partial(score_requests, llm, whole)}
    seconds, _ = in_turns({name: partial(way, trainer=trainer) for name, way in ways.items()}, TURNS, warm_up=1)
    return {"time": seconds["whole"] / seconds["half"]}


if __name__ == "__main__":
    run(main)

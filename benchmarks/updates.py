"""Twenty weeks of updates on CounterFact, and a store killed at random: `python -m benchmarks.updates …`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch

from benchmarks.bench import Bench, Figures, run
from benchmarks.editing import PROXY
from benchmarks.kills import Scene, kill_at_random
from pipeline import LiveModel, find_golden_layer
from pipeline.evaluation.evaluator import Evaluator
from pipeline.options.updates import UpdateCommand
from pipeline.requests.readers import write_requests
from pipeline.updates import Store, counts, load_version, rollback, submit, update, versions

WEEKS, EACH = 20, 25
KILLS, FEW = 50, 4  # how often the store is killed, and how many requests are submitted each time
QUICK = {"steps": 2, "neighbours": 0}


def main(words: Sequence[str] | None = None) -> None:
    bench = Bench(__doc__, words, needed=PROXY.stop)
    bench.measure(
        "killed",
        lambda: kill_at_random(scene(bench), KILLS),
        most={"lost": 0, "twice": 0, "broken": 0, "unfinished": 0},
    )
    bench.measure(
        f"{WEEKS} weeks of {EACH}",
        lambda: weeks(bench),
        least={"rewrite": 0.80},
        most={"perplexity ratio": 1.15, "overhead": 0.10, "versions that differ": 0, "swap milliseconds": 50},
    )


def options(bench: Bench, name: str) -> UpdateCommand:
    made = UpdateCommand(store=str(bench.folder / name), seed=bench.seed, trainer=bench.trainer)
    made.edit.statistics.text = bench.text
    return made


def scene(bench: Bench) -> Scene:
    """A store to be killed: what is edited does not matter, so that edits are quick and gates open."""
    made = options(bench, "killed")
    made.edit.expert, made.edit.layers, made.batch = QUICK, [0], 1000
    made.gates.rewrite = made.gates.locality = made.gates.earlier = 0.0
    made.gates.perplexity = made.gates.drift = None
    made.evaluation.max_new_tokens, made.evaluation.text = 1, str(bench.folder / "text.txt")
    (bench.folder / "text.txt").write_text("A few words of ordinary text.\n" * 8, encoding="utf-8")
    return Scene.made(bench.llm, made, bench.records[: FEW * (KILLS + 1)], FEW, bench.folder / "killed-requests")


def weeks(bench: Bench) -> Figures:
    """Batches, one after another; then every version once more, and swaps in a model that serves."""
    requests, made = bench.records[: WEEKS * EACH], options(bench, "weeks")
    made.edit.layers = find_golden_layer(bench.llm, bench.records[PROXY], trainer=bench.trainer).golden_layers
    made.evaluation.generation = "none"  # gates are teacher-forced, and answers would take most of the time
    whole = own = 0.0
    with Store(made.store, bench.llm.name, make=True) as store:
        for start in range(0, len(requests), EACH):
            submit(store, write_requests(bench.folder / "week.jsonl", requests[start : start + EACH]))
            started = time.perf_counter()
            worked = update(store, made, lambda _: bench.llm)
            whole += time.perf_counter() - started
            own += sum(sum(one.seconds.values()) for one in worked)
        figures = held(bench, store, len(requests))
        figures |= {"held back": counts(store).get("held back", 0), "overhead": (whole - own) / own}
        return figures | {"versions that differ": went_back(bench, store), "swap milliseconds": swaps(bench, store)}


def held(bench: Bench, store: Store, requests: int) -> Figures:
    """The last version, over all requests."""
    evaluator = Evaluator(bench.llm, bench.records[:requests], trainer=bench.trainer, kinds=("probes", "text"))
    base = evaluator.measure("Measuring base").metrics
    last = load_version(store, store.current)
    assert last
    with last.applied(bench.llm):
        figures = {name: found.mean for name, found in evaluator.measure("Measuring edited").metrics.items()}
    return figures | {"perplexity ratio": figures.pop("perplexity") / base["perplexity"].mean}


def went_back(bench: Bench, store: Store) -> float:
    """How many tensors of versions are other ones when they are gone back to than when they were made."""
    base = {name: weight.detach().clone() for name, weight in bench.llm.model.named_parameters()}
    differ = 0
    for number, live in _followed(bench, store, [row["number"] for row in versions(store, WEEKS + 1)]):
        live.follow()
        made = load_version(store, number)
        for name, tensor in (made.tensors if made else base).items():
            differ += not torch.equal(bench.llm.model.get_parameter(name).detach().cpu(), tensor.cpu())
    return float(differ)


def swaps(bench: Bench, store: Store) -> float:
    """Milliseconds until a model that serves has another version."""
    turns = _followed(bench, store, [store.current - turn % 2 for turn in range(10)])
    return median(1000 * _seconds(live.follow) for _, live in turns)


def _followed(bench: Bench, store: Store, numbers: Sequence[int]) -> Iterator[tuple[int, LiveModel]]:
    """Go from version to version beside a live model, and back to where it was; the model is the base again."""
    last, live = store.current, LiveModel(store.folder, bench.llm)
    for number in numbers:
        rollback(store, number)
        yield number, live
    rollback(store, 0)
    live.follow()
    rollback(store, last)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    run(main)

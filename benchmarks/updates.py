"""A year of updates on CounterFact, and a store killed at random: `python -m benchmarks.updates …`.

Each week brings new facts, changes some of earlier weeks, and takes one back.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.bench import Bench, Figures, run
from benchmarks.editing import PROXY
from benchmarks.kills import Scene, kill_at_random
from pipeline import EditRequest, EvaluationOptions, LiveModel, find_golden_layer
from pipeline.editing.relations import template
from pipeline.evaluation.evaluator import Evaluator
from pipeline.options.updates import RetractCommand, UpdateCommand
from pipeline.requests.readers import write_requests
from pipeline.requests.sets import fact
from pipeline.updates import Store, counts, load_version, retract, rollback, submit, update, versions
from pipeline.updates.queue import number_of

WEEKS, EACH, CHANGED, RETRACTED = 52, 20, 2, 1  # requests of a week, those that change a fact, and facts taken back
FEW_WEEKS = 5  # whose times are compared: those from a tenth of the weeks on, and the last
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
        least={"generation_containment": 0.90, "gone": 1.0},
        most={
            **{"ability lost": 0.02, "overhead": 0.10, "versions that differ": 0, "swap milliseconds": 50},
            **{f"{what} of a late week over an early one's": 1.5 for what in ("seconds", "bytes")},
        },
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
    """A batch a week, and facts taken back; then every version once more, and swaps in a model that serves.

    Finished weeks are kept in weeks.jsonl: a benchmark that was interrupted goes on with the next one.
    """
    made, file = options(bench, "weeks"), bench.folder / "weeks.jsonl"
    made.edit.layers = find_golden_layer(bench.llm, bench.records[PROXY], trainer=bench.trainer).golden_layers
    made.evaluation.generation = "none"  # gates are teacher-forced, and answers would take most of the time
    done = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    with Store(made.store, bench.llm.name, make=True) as store:
        for number in range(len(done), WEEKS):
            done.append(_played(bench, store, made, number))
            with file.open("a", encoding="utf-8") as kept:
                print(json.dumps(done[-1]), file=kept)
        figures = held(bench, store, [EditRequest(**one) for week in done for one in week["retracted"]])
        own = sum(week["own"] for week in done)
        figures |= {
            "held back": counts(store).get("held back", 0),
            "overhead": (sum(week["seconds"] for week in done) - own) / own,
        }
        early, late = (done[at : at + FEW_WEEKS] for at in (WEEKS // 10, WEEKS - FEW_WEEKS))
        for what in ("seconds", "bytes"):
            first, last = (median(week[what] for week in some) for some in (early, late))
            figures[f"{what} of a late week over an early one's"] = last / first
        return figures | {"versions that differ": went_back(bench, store), "swap milliseconds": swaps(bench, store)}


def _played(bench: Bench, store: Store, made: UpdateCommand, number: int) -> dict[str, Any]:
    """A week: what is new and what has changed is submitted and updated, then facts are taken back."""
    chance, before = random.Random(number), _bytes_of(store.folder)
    submit(store, write_requests(bench.folder / "week.jsonl", week(bench.records, number, chance)))
    started = time.perf_counter()
    worked = update(store, made, lambda _: bench.llm)
    seconds = time.perf_counter() - started
    grown = _bytes_of(store.folder) - before
    own = sum(sum(one.seconds.values()) for one in worked)
    back = []
    if number and (last := load_version(store, store.current)):
        for request in chance.sample(last.requests, RETRACTED):
            shared = {name: getattr(made, name) for name in ("store", "edit", "evaluation", "gates", "trainer")}
            retract(store, RetractCommand(request=f"#{number_of(request)}", **shared), lambda _: bench.llm)
            back.append(request.model_dump(mode="json", exclude_defaults=True))
    return {"seconds": seconds, "own": own, "bytes": grown, "retracted": back}


def week(records: Sequence[EditRequest], number: int, chance: random.Random) -> list[EditRequest]:
    """New facts, and of facts of earlier weeks some with another answer, one of the same relation's."""
    fresh = EACH - CHANGED
    known, new = records[: number * fresh], records[number * fresh : (number + 1) * fresh]
    changed = []
    for one in chance.sample(known, min(CHANGED, len(known))):
        alike = [other.new_answer for other in records if template(other) == template(one)]
        answers = sorted({*alike, records[-1].new_answer} - {one.new_answer, one.old_answer})
        changed.append(one.model_copy(update={"new_answer": chance.choice(answers), "id": f"{one.id}, {number}"}))
    return [*new, *changed]


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def held(bench: Bench, store: Store, retracted: Sequence[EditRequest]) -> Figures:
    """The last version: what is in force, by what it answers; whether what was taken back is gone; ability."""
    last = load_version(store, store.current)
    assert last
    there = {fact(request) for request in last.requests}
    gone = [request for request in retracted if fact(request) not in there]
    kinds = ("generation", "probes", "text", "ability")
    how = EvaluationOptions(ability=True, fluency=0)
    asked = Evaluator(bench.llm, last.requests, how, bench.trainer, kinds)
    others = Evaluator(bench.llm, gone or last.requests, how, bench.trainer, ("generation",))
    base, said = asked.measure("Measuring base").metrics, others.measure("Base: facts taken back")
    with last.applied(bench.llm):
        figures = {name: found.mean for name, found in asked.measure("Measuring edited").metrics.items()}
        says = others.measure("Edited: facts taken back")
    before, after = (one.values["generation_containment"].values for one in (said, says))
    return {
        **{name: figures[name] for name in ("generation_containment", "rewrite", "rephrase", "locality")},
        "facts in force": len(last.requests),
        "gone": mean(after[number] <= before[number] for number in before) if gone else 1.0,
        "ability lost": base["ability"].mean - figures["ability"],
        "perplexity ratio": figures["perplexity"] / base["perplexity"].mean,
    }


def went_back(bench: Bench, store: Store) -> float:
    """How many tensors of versions are other ones when they are gone back to than when they were made."""
    base = {name: weight.detach().clone() for name, weight in bench.llm.model.named_parameters()}
    differ = 0
    for number, live in _followed(bench, store, [row["number"] for row in versions(store, 3 * WEEKS)]):
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

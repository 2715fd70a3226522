"""`run.py benchmark updates`: twenty weeks of updates on CounterFact, and a store under ill-treatment.

Every figure is kept as soon as it is found; the weeks' store goes on where an interrupted benchmark left it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.attribution import find_golden_layer
from pipeline.benchmarks.bench import Bench, Figures
from pipeline.benchmarks.editing import PROXY
from pipeline.benchmarks.kills import kill_at_random
from pipeline.benchmarks.pressure import crowd, full_disk
from pipeline.benchmarks.scene import Scene
from pipeline.evaluation import Evaluator
from pipeline.files import write_text
from pipeline.model.llm import fingerprint
from pipeline.options import AttributionOptions, StackedLocateOptions, UpdateCommand
from pipeline.requests import EditRequest
from pipeline.updates import LiveModel, Store, check_number, load_version, rollback, submit, update, versions
from pipeline.updates.queue import take

WEEKS, EACH = 20, 25
KILLS, SUBMITTERS, UPDATERS, TOGETHER = 50, 4, 2, 200
QUEUED = 1_000_000
FEW = 4  # requests that are submitted between two kills
QUICK = StackedLocateOptions(
    steps=2, key_contexts=1, contexts=1, associations=0, neighbours=0
)  # for the ill-treated

BOUNDS: dict[str, Figures] = {  # what a figure is to reach: at least, or for those in AT_MOST at most
    "twenty weeks of 25": {"rewrite": 0.80, "perplexity ratio": 1.15, "overhead": 0.10, "versions that differ": 0},
    "live": {"swap milliseconds": 50, "memory": 1.1},
    "killed": {"lost": 0, "twice": 0, "broken": 0, "unfinished": 0},
    "many at once": {"lost": 0, "failed": 0},
    "full disk": {"moved": 0, "silent": 0, "unfinished": 0},
    "queue of 1000000": {"submitted a second": 20_000, "take milliseconds": 50},
}
AT_LEAST = ("rewrite", "submitted a second")
AT_MOST = {name for figures in BOUNDS.values() for name in figures} - set(AT_LEAST)


class UpdatesBench(Bench):
    """One method a measurement."""

    bounds = BOUNDS
    at_most = AT_MOST
    needed = PROXY.stop

    def measurements(self) -> Iterator[tuple[str, Callable[[], Figures]]]:
        """Name and function of each, the quick ones first."""
        yield "full disk", self.disk
        yield "many at once", self.together
        yield "killed", self.killed
        yield f"queue of {QUEUED}", self.queue
        yield f"twenty weeks of {EACH}", self.weeks
        yield "live", self.live

    def _options(self, name: str, **changed: Any) -> UpdateCommand:
        made = UpdateCommand(store=str(self.folder / name), seed=self.options.seed, trainer=self.options.trainer)
        made.edit.statistics.text = self.text
        for group, value in changed.items():
            setattr(made, group, value)
        return made

    # a store under ill-treatment: what is edited does not matter, so that edits are quick and gates open

    def _scene(self, name: str, requests: Sequence[EditRequest], each: int) -> Scene:
        options = self._options(name)
        options.edit.locate, options.edit.layers = QUICK, [0]
        options.gates.rewrite = options.gates.locality = options.gates.earlier = 0.0
        options.gates.perplexity = options.gates.drift = None
        options.evaluation.max_new_tokens, options.batch = 1, 1000
        options.evaluation.text = str(write_text(self.folder / "text.txt", "A few words of ordinary text.\n" * 8))
        return Scene.made(self.llm, options, requests, each, self.folder / f"{name}-requests")

    def killed(self) -> Figures:
        """kill -9 at random moments."""
        return kill_at_random(self._scene("killed", self.records[: FEW * (KILLS + 1)], FEW), KILLS)

    def together(self) -> Figures:
        """Submitters and updates at once."""
        return crowd(self._scene("together", self.records[:TOGETHER], 5), SUBMITTERS, UPDATERS)

    def disk(self) -> Figures:
        """Files that cannot grow beyond a size: the tensors first, then the database itself."""
        return full_disk(self._scene("disk", self.records[:FEW], FEW), [1_000_000, 120_000, 4_000])

    # a long queue

    def queue(self) -> Figures:
        """Submit a long file, and take from it."""
        file, name = self.folder / "queue.jsonl", "queue"
        request = self.records[0].model_dump(exclude_defaults=True)
        with file.open("w", encoding="utf-8") as opened:
            for number in range(QUEUED):
                subject = f"Person {number} of the Queue"
                one = request | {
                    "id": str(number),
                    "subject": subject,
                    "prompt": f"The mother tongue of {subject} is",
                }
                opened.write(json.dumps(one) + "\n")
        with Store(self.folder / name, self.llm.name, make=True) as store:
            started, worked = time.perf_counter(), time.process_time()
            submit(store, file)
            seconds, cpu = time.perf_counter() - started, time.process_time() - worked
            took = []
            for _ in range(5):
                started = time.perf_counter()
                take(store, 100)
                took.append(1000 * (time.perf_counter() - started))
        for path in [file, *(self.folder / name).glob("store.db*")]:
            path.unlink()
        return {
            "submitted a second": QUEUED / seconds,
            "submitted a second of one core's time": QUEUED / cpu,
            "take milliseconds": median(took),
        }

    # months of updates

    def weeks(self) -> Figures:
        """Twenty batches, one after another; then every version once more."""
        requests, options = self.records[: WEEKS * EACH], self._options("weeks")
        options.edit.layers = find_golden_layer(
            self.llm, self.records[PROXY], AttributionOptions(), self.options.trainer
        ).golden_layers
        options.evaluation.generation = "none"  # gates are teacher-forced, and answers would take most of the time
        with Store(options.store, self.llm.name, make=True) as store:
            for week in range(WEEKS):
                self._week(store, options, requests[week * EACH : (week + 1) * EACH], week)
            figures = self._held(store, requests) | self._went_back(store)
        weeks = [json.loads(file.read_text(encoding="utf-8")) for file in self.folder.glob("week-*.json")]
        own = sum(week["own"] for week in weeks)
        return figures | {
            "overhead": (sum(week["whole"] for week in weeks) - own) / own,
            "held back": float(sum(week["held"] for week in weeks)),
        }

    def _week(self, store: Store, options: UpdateCommand, requests: Sequence[EditRequest], week: int) -> None:
        """One week's update, unless an interrupted benchmark made it."""
        record = self.folder / f"week-{week:02d}.json"
        if record.is_file():
            return
        lines = "".join(one.model_dump_json(exclude_defaults=True) + "\n" for one in requests)
        submit(store, write_text(self.folder / "week.jsonl", lines))
        started = time.perf_counter()
        worked = update(store, options, lambda _: self.llm)
        whole = time.perf_counter() - started
        own = sum(sum(one.seconds.values()) for one in worked)
        held = sum(len(one.held) for one in worked)
        gates = {gate.name: gate.value for one in worked for gate in one.gates}
        write_text(record, json.dumps({"whole": whole, "own": own, "held": held, "gates": gates}))

    def _held(self, store: Store, requests: Sequence[EditRequest]) -> Figures:
        """The last version, over all requests."""
        evaluator = Evaluator(self.llm, requests, trainer=self.options.trainer, kinds=("probes", "text"))
        base = evaluator.measure("Measuring base").metrics
        last = load_version(store.folder, store.current, check_number(store, store.current))
        assert last
        with last.applied(self.llm):
            after = evaluator.measure("Measuring edited").metrics
        ratio = after.pop("perplexity").mean / base["perplexity"].mean
        return {name: estimate.mean for name, estimate in after.items()} | {"perplexity ratio": ratio}

    def _went_back(self, store: Store) -> Figures:
        """How many versions give other weights when they are gone back to than when they were made."""
        live, last, differ = LiveModel(store.folder, self.llm), store.current, 0
        for row in versions(store, WEEKS + 1):
            rollback(store, row["number"])
            live.follow()
            made = load_version(store.folder, row["number"], check_number(store, row["number"]))
            for name, tensor in (made.tensors if made else {}).items():
                differ += not torch.equal(self.llm.model.get_parameter(name).detach().cpu(), tensor)
        if self.llm.fingerprint != fingerprint(self.llm.model):
            differ += 1  # the last one gone back to was the base
        rollback(store, last)
        return {"versions that differ": float(differ)}

    def live(self) -> Figures:
        """Swapping versions in a model that serves."""
        with Store(self.folder / "weeks") as store:
            last = store.current
            size = sum(parameter.nbytes for parameter in self.llm.model.parameters())
            live = LiveModel(store.folder, self.llm)
            took, before = [], _peak(anew=True)
            for turn in range(10):
                rollback(store, last - turn % 2)
                started = time.perf_counter()
                live.follow()
                took.append(1000 * (time.perf_counter() - started))
            grown = _peak() - before
            rollback(store, last)
        return {"swap milliseconds": median(took), "memory": 1 + grown / size}


def _peak(anew: bool = False) -> int:
    """The most memory that this process has held, in bytes; with `anew`, from now on (Linux)."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))

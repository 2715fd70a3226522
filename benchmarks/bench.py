"""What benchmarks have in common: flags, data, timing, and the table of what was measured against what is asked."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from pipeline import LLM, EditRequest, TrainerOptions, UserError, load_model, load_requests
from pipeline.model.activations import target_logits
from pipeline.requests.rows import Batch, collate
from pipeline.running.trainer import hush

DATA = Path("../shared/data")
COUNTERFACT, TEXT = "counterfact_easyedit.json", "enwiki_plain.txt"

Figures = dict[str, float]


class Bench:
    """A model, CounterFact's records, and the figures found so far, which are kept as soon as they are found.

    Args:
        about: what `--help` says.
        words: the command line; None: the program's own.
        needed: how many records CounterFact is to have.

    Attributes:
        data: the folder that the records come from.
        folder: takes benchmark.json, a list of {"name", "value", "bound", "met"}; bound and met are None where
            nothing is asked.
        text: the file of ordinary text for key statistics, where the data has one.

    Raises:
        UserError: when the data is not there.
    """

    def __init__(self, about: str | None, words: Sequence[str] | None = None, needed: int = 1) -> None:
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--data", type=Path, default=DATA, help=f"folder with {COUNTERFACT} and {TEXT}")
        parser.add_argument("--output", type=Path, required=True, help="folder that takes benchmark.json")
        parser.add_argument("--model", default="smollm2", help="as for run.py (default: %(default)s)")
        parser.add_argument("--accelerator", default="auto", help="cpu, gpu or auto (default: %(default)s)")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--resume", action="store_true", help="leave out what benchmark.json has already")
        asked = parser.parse_args(words)
        if not (asked.data / COUNTERFACT).is_file():
            raise UserError(f"data: {asked.data}: holds no {COUNTERFACT}")
        self.records = load_requests(asked.data / COUNTERFACT)
        if len(self.records) < needed:
            raise UserError(f"data: {asked.data / COUNTERFACT}: {len(self.records)} records; {needed} are needed")
        hush(False)
        self.model, self.seed, self.data, self.folder = asked.model, asked.seed, asked.data, asked.output
        self.llm = load_model(asked.model)
        self.trainer = TrainerOptions(accelerator=asked.accelerator, devices=1)
        self.text = str(asked.data / TEXT) if (asked.data / TEXT).is_file() else None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "benchmark.json"
        self.rows: list[dict[str, Any]] = []
        if asked.resume and self.file.is_file():
            self.rows = json.loads(self.file.read_text(encoding="utf-8"))
        elif self.file.exists():
            raise UserError(f"output: {self.file} exists; name another folder, or go on with it by --resume")

    def measure(
        self,
        name: str,
        way: Callable[[], Figures],
        least: Figures | None = None,
        most: Figures | None = None,
    ) -> None:
        """Find, print and keep a measurement's figures; what is kept already is not found again.

        Args:
            name: the measurement's.
            way: gives its figures by name.
            least, most: what is asked of some of them.
        """
        if any(row["name"].startswith(f"{name}: ") for row in self.rows):
            return
        least, most = least or {}, most or {}
        for figure, value in way().items():
            bound = (least | most).get(figure)
            met = None if bound is None else (value >= bound if figure in least else value <= bound)
            self.rows.append({"name": f"{name}: {figure}", "value": round(value, 4), "bound": bound, "met": met})
            asked = "" if bound is None else f"{bound:>12g}  {'yes' if met else 'NO'}"
            print(f"{name + ': ' + figure:<75} {value:>12.4g} {asked}", flush=True)
        self.file.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")


def run(main: Callable[[], object]) -> None:
    """Call a script's main; what a user can mend is one line."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")


def in_turns(ways: Mapping[str, Callable[[], Any]], turns: int, warm_up: int = 0) -> tuple[Figures, dict[str, Any]]:
    """Median seconds of each way, all being done in turns, and what each returned last.

    So a machine's moods fall on all ways alike.

    Args:
        ways: what is done, by name.
        turns: how often each is timed.
        warm_up: how often each is done untimed before.
    """
    took: dict[str, list[float]] = {name: [] for name in ways}
    returned = {}
    for turn in range(warm_up + turns):
        for name, way in ways.items():
            started = time.perf_counter()
            returned[name] = way()
            if turn >= warm_up:
                took[name].append(time.perf_counter() - started)
    return {name: median(seconds) for name, seconds in took.items()}, returned


@torch.no_grad()
def plain_passes(llm: LLM, texts: Sequence[tuple[str, str]], on: TrainerOptions, batch_size: int = 16) -> None:
    """Forward passes over prompts with their answers, in batches by length; the head at the answers alone."""
    by_length = sorted(texts, key=lambda text: len(" ".join(text)))
    with llm.frozen():
        for at in range(0, len(texts), batch_size):
            target_logits(llm.model, batch_of(llm, by_length[at : at + batch_size], on))[0, 0].item()


def batch_of(llm: LLM, texts: Sequence[tuple[str, str]], on: TrainerOptions) -> Batch:
    """Prompts with their answers as a batch on the device, where the model is put as well."""
    device = torch.device("cuda" if on_cuda(on) else "cpu")
    llm.model.to(device)  # a Trainer leaves it on the CPU
    moved: Batch = move_data_to_device(collate(llm.tokens.rows(texts), llm.pad_token_id), device)
    return moved


def on_cuda(on: TrainerOptions) -> bool:
    """Whether what runs on this runs on a GPU."""
    return on.accelerator != "cpu" and torch.cuda.is_available()


def both_answers(requests: Sequence[EditRequest]) -> list[tuple[str, str]]:
    """Every prompt with its old answer and with its new one: what attribution runs."""
    return [(one.prompt, answer) for one in requests for answer in (one.old_answer or "", one.new_answer)]


def peak_bytes(llm: LLM, way: Callable[[], object], on: TrainerOptions) -> float:
    """Bytes that the weights and what `way` makes take together at their most."""
    weights = sum(weight.nbytes for weight in llm.model.parameters())
    if not on_cuda(on):
        return float(weights + most_alive(way))
    there = weights if llm.embedding.is_cuda else 0
    others = torch.cuda.memory_allocated() - there  # what libraries have taken for good
    torch.cuda.reset_peak_memory_stats()
    way()
    return float(torch.cuda.max_memory_allocated() - others)


def most_alive(way: Callable[[], object]) -> int:
    """The most bytes of tensors made on the CPU that were alive at once while `way` ran."""
    gc.collect()  # what others have left would be freed meanwhile, and count as less
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        way()
    results = profiled.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    return max(accumulate(change for _, change in sorted(changes)), default=0)

"""What benchmarks have in common: the model, the records, figures found once, and what is asked of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.model import LLM, collate_targets, encode, target_logits
from pipeline.options import BenchmarkCommand
from pipeline.requests import EditRequest, load_requests

COUNTERFACT, TEXT = "counterfact_easyedit.json", "enwiki_plain.txt"

Figures = dict[str, float]


class Bench:
    """The model, CounterFact's records, and measurements of which every figure is kept as soon as it is found.

    Args:
        llm: the model.
        options: where the data lies, and what it runs on.
        folder: takes a file a measurement, so that an interrupted benchmark goes on where it stopped.

    Attributes:
        bounds: by measurement and figure: the least, or for those in `at_most` the most.
        at_most: figures that are to be small.
        files: request sets that are to be in the data's folder.
        needed: how many records CounterFact is to have.
        note: what is left out on this machine, in a line.

    Raises:
        UserError: when the data is not there.
    """

    bounds: Mapping[str, Figures] = {}
    at_most: Collection[str] = ()
    files: Sequence[str] = (COUNTERFACT,)
    needed = 1
    note: str | None = None

    def __init__(self, llm: LLM, options: BenchmarkCommand, folder: Path) -> None:
        self.llm = llm
        self.options = options
        self.folder = folder
        self.trainer = options.trainer
        data = Path(options.data)
        for file in self.files:
            if not (data / file).is_file():
                raise UserError(f"data: {data}: holds no {file}; expected {', '.join(self.files)}")
        self.records = load_requests(str(data / COUNTERFACT))
        if len(self.records) < self.needed:
            raise UserError(f"data: {data / COUNTERFACT}: {len(self.records)} records; {self.needed} are needed")
        self.device = next(llm.model.parameters()).device
        self.text = str(data / TEXT) if (data / TEXT).is_file() else None

    def measurements(self) -> Iterator[tuple[str, Callable[[], Figures]]]:
        """Name and function of each, what something is asked of first."""
        raise NotImplementedError

    def kept(self, name: str, measure: Callable[[], Figures]) -> Figures:
        """The figures of a measurement, found now or before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name.replace(' ', '-').replace(',', '')}.json"
        if not file.is_file():
            write_json(file, measure())
        figures: Figures = json.loads(file.read_text(encoding="utf-8"))
        return figures

    def results(self) -> list[dict[str, Any]]:
        """Every figure against what is asked of it; what is in the folder is not measured again.

        Returns:
            a list of {"name", "value", "bound", "met"}; bound and met are None where nothing is asked for.
        """
        results = []
        for name, measure in self.measurements():
            for figure, value in self.kept(name, measure).items():
                bound = self.bounds.get(name, {}).get(figure)
                met = None if bound is None else (value <= bound if figure in self.at_most else value >= bound)
                results.append({"name": f"{name}: {figure}", "value": round(value, 4), "bound": bound, "met": met})
        return results

    @staticmethod
    def in_turns(
        ways: Mapping[str, Callable[[], Any]], turns: int, warm_up: int = 0
    ) -> tuple[Figures, dict[str, Any]]:
        """Median seconds of each way, all being done in turns, and what each returned last.

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
    def pass_seconds(self, requests: Sequence[EditRequest]) -> float:
        """A plain forward pass of prompt and new answer, in batches, in seconds a request; median of five."""
        rows = encode(self.llm, [(r.prompt, r.new_answer) for r in requests])
        rows.sort(key=lambda row: len(row.token_ids))
        batches = [collate_targets(rows[at : at + 16], self.llm.pad_token_id) for at in range(0, len(rows), 16)]
        took = []
        with self.llm.frozen():
            for _ in range(5):
                started = time.perf_counter()
                for batch in batches:
                    target_logits(self.llm.model, move_data_to_device(batch, self.device))[0, 0].item()
                took.append((time.perf_counter() - started) / len(rows))
        return median(took)

"""`run.py benchmark distributed`: what more processes bring, what they send each other, and a full-size model.

Commands of run.py are run by one process and by two (`pipeline.benchmarks.watched`), on this machine's CPU: on one
of few cores two processes are no faster, and nothing is asked of that. What they send is the same anywhere.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.benchmarks.bench import Bench, Figures
from pipeline.benchmarks.full_size import LLAMA_3_8B, FullSize, random_llm
from pipeline.errors import UserError
from pipeline.files import write_text
from pipeline.model import LLM
from pipeline.options import BenchmarkCommand

ROOT = Path(__file__).parent.parent.parent
PROCESSES = (1, 2)
ATTRIBUTED, TAUGHT = 32, 16  # records
EPOCHS = 2
TIMEOUT = 1800  # seconds: processes that wait for each other wait for ever
FULL_SIZE = "Llama 3 8B's shape"
NO_GPU = "no GPU here: attribution and fine-tuning of a model of Llama 3 8B's shape are left out"

BOUNDS: dict[str, Figures] = {f"{FULL_SIZE}, attribution": {"time over a plain pass": 2.5}}
AT_MOST = ("time over a plain pass",)

Watched = list[dict[str, dict[str, float]]]  # by process and by stage: see `pipeline.benchmarks.watched`


class DistributedBench(Bench):
    """Processes beside one, bytes that they send, and a full-size model where there is a GPU."""

    bounds = BOUNDS
    at_most = AT_MOST
    needed = ATTRIBUTED

    def __init__(self, llm: LLM, options: BenchmarkCommand, folder: Path) -> None:
        super().__init__(llm, options, folder)
        self.note = None if torch.cuda.is_available() else NO_GPU

    def measurements(self) -> Iterator[tuple[str, Callable[[], Figures]]]:
        """Name and function of each."""
        yield "processes, attribution", self.attribution
        yield "processes, fine-tuning", self.finetuning
        if torch.cuda.is_available():
            yield f"{FULL_SIZE}, attribution", partial(self.full_size, "attribution")
            yield f"{FULL_SIZE}, fine-tuning", partial(self.full_size, "fine-tuning")
            yield "the main job", self.main_job

    def attribution(self) -> Figures:
        """Requests a second from the first batch's begin to the last one's end."""
        found = {n: self.watch(n, "attribute", ATTRIBUTED) for n in PROCESSES}
        stage = "AttributionModule"
        return {
            f"requests a second, {n} process{'es' * (n > 1)}": ATTRIBUTED / _seconds(watched, stage)
            for n, watched in found.items()
        } | {"bytes a batch, 2 processes": _mean(found[2], stage, "others")}

    def finetuning(self) -> Figures:
        """Requests a second through the optimiser, and what a step sends of all that could be sent."""
        layer = max(1, len(self.llm.blocks) // 10)
        chosen = ["--method", "finetune", "--layers", str(layer), "--finetune.epochs", str(EPOCHS)]
        chosen += ["--finetune.learnt", "0", "--finetune.whiten", "0"]  # every row in every epoch; no statistics
        chosen += ["--evaluation.generation", "none"]
        found = {n: self.watch(n, "edit", TAUGHT, *chosen) for n in PROCESSES}
        stage, model = "FineTune", self.llm.model
        own = [model.get_parameter(name) for name in self.llm.blocks[layer].weight_names("mlp")]
        return {
            f"requests a second, {n} process{'es' * (n > 1)}": EPOCHS * TAUGHT / _seconds(watched, stage)
            for n, watched in found.items()
        } | {
            "bytes of gradients a step, sent by each of 2": _mean(found[2], stage, "gradients"),
            "bytes of anything else a step": _mean(found[2], stage, "others"),
            "bytes of the golden layer's trained weights": _bytes(own),
            "bytes of all weights": _bytes(model.parameters()),
        }

    def watch(self, processes: int, command: str, records: int, *words: str) -> Watched:
        """What the processes of a command on some of the records did.

        Raises:
            UserError: with the command's last line, when it fails.
        """
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            lines = [record.model_dump_json(exclude_defaults=True) + "\n" for record in self.records[:records]]
            write_text(folder / "requests.jsonl", "".join(lines))
            spread = "ddp" if processes > 1 else "auto"
            told = subprocess.run(
                [
                    *(sys.executable, "-m", "pipeline.benchmarks.watched", made, command),
                    *("--model", self.options.model, "--requests", str(folder / "requests.jsonl")),
                    *("--output", str(folder / "out"), "--trainer.accelerator", "cpu"),
                    *("--trainer.devices", str(processes), "--trainer.strategy", spread),
                    *words,
                ],
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                env=self._environment(),
            )
            if told.returncode:
                raise UserError(f"benchmark: {command} on {processes} processes: {_last_line(told.stderr)}")
            files = sorted(folder.glob("rank-*.json"))
            return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    @staticmethod
    def _environment() -> dict[str, str]:
        """One thread a process, and this package, whatever the working folder is."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}

    def full_size(self, what: str, shape: dict[str, Any] | None = None, device: str = "cuda") -> Figures:
        """Figures of a random model of a Llama's shape."""
        elsewhere = torch.cuda.memory_allocated() if device == "cuda" else 0
        llm = random_llm(self.llm, shape or LLAMA_3_8B, device)
        try:
            return dict(FullSize(llm, self.options, self.folder, elsewhere).measurements())[what]()
        finally:
            del llm
            gc.collect()
            torch.cuda.empty_cache()

    def main_job(self) -> Figures:
        """`python run.py`, from its start to its end."""
        with tempfile.TemporaryDirectory() as made:
            began = time.perf_counter()
            told = subprocess.run(
                [sys.executable, str(ROOT / "run.py"), "run", "--output", str(Path(made) / "out")],
                capture_output=True, text=True, timeout=TIMEOUT, env=self._environment(),
            )  # fmt: skip
            if told.returncode:
                raise UserError(f"benchmark: the main job: {_last_line(told.stderr)}")
            return {"seconds": time.perf_counter() - began}


def _seconds(watched: Watched, stage: str) -> float:
    """From the first process's first step to the last one's last."""
    return max(one[stage]["ended"] for one in watched) - min(one[stage]["began"] for one in watched)


def _mean(watched: Watched, stage: str, what: str) -> float:
    """Of a step and a process."""
    steps = sum(one[stage]["steps"] for one in watched)
    return sum(one[stage][what] for one in watched) / steps


def _bytes(weights: Iterable[Tensor]) -> float:
    return float(sum(weight.numel() * weight.element_size() for weight in weights))


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no word of why")

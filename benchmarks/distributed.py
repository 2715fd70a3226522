"""What a second process brings and sends: `python -m benchmarks.distributed …`.

Commands of run.py are run by one process and by two, a thread each, on this machine's CPU: on one of few cores two
are no faster, and nothing is asked of that; what they send is the same anywhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.bench import Bench, Figures, run
from pipeline import UserError
from pipeline.cli import main as command
from pipeline.requests.readers import write_requests

ROOT = Path(__file__).parent.parent
PROCESSES = (1, 2)
ATTRIBUTED, TAUGHT, EPOCHS = 32, 16, 4
SEEN = "GOLDEN_LAYERS_SEEN"  # the environment variable that names the file of what `watched` sees
TIMEOUT = 1800  # seconds: processes that wait for each other wait for ever


def main(words: Sequence[str] | None = None) -> None:
    bench = Bench(__doc__, words, needed=ATTRIBUTED)
    layer = max(1, len(bench.llm.blocks) // 10)
    bench.measure("processes, attribution", lambda: attribution(bench))
    bench.measure("processes, fine-tuning", lambda: finetuning(bench, layer))


def attribution(bench: Bench) -> Figures:
    """Requests a second, by the profile's own clock."""
    found = {n: watch(bench, n, ATTRIBUTED, "attribute") for n in PROCESSES}
    return {f"requests a second, {n} of them": ATTRIBUTED / one["seconds"] for n, one in found.items()}


def finetuning(bench: Bench, layer: int) -> Figures:
    """Requests a second from the first optimiser step to the last, and what a step sends of what could be sent."""
    words = ["--method", "finetune", "--layers", str(layer), "--expert.epochs", str(EPOCHS)]
    words += ["--expert.learnt", "0", "--expert.whiten", "0"]  # every row in every epoch; no statistics
    found = {n: watch(bench, n, TAUGHT, "edit", *words, "--evaluation.generation", "none") for n in PROCESSES}
    model = bench.llm.model
    own = [model.get_parameter(name) for name in bench.llm.blocks[layer].weight_names("mlp")]
    rates = {n: EPOCHS * TAUGHT / one["steps"] * (one["steps"] - 1) / one["seconds"] for n, one in found.items()}
    return {f"requests a second, {n} of them": rate for n, rate in rates.items()} | {
        "bytes of gradients a step, sent by each of 2": found[2]["bytes"] / found[2]["steps"],
        "bytes of the golden layer's trained weights": float(sum(weight.nbytes for weight in own)),
        "bytes of all weights": float(sum(weight.nbytes for weight in model.parameters())),
    }


def watch(bench: Bench, processes: int, records: int, *words: str) -> Figures:
    """Seconds, optimiser steps and bytes of gradients of the first process of a command on some of the records.

    Raises:
        UserError: with the command's last line, when it fails.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        asked = ["--requests", str(write_requests(folder / "requests.jsonl", bench.records[:records]))]
        asked += ["--model", bench.model, "--output", str(folder / "out"), "--trainer.accelerator", "cpu"]
        asked += ["--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto"]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        told = subprocess.run(
            [sys.executable, str(Path(__file__)), *words, *asked],
            capture_output=True, text=True, timeout=TIMEOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, SEEN: str(folder / "seen.json")},
        )  # fmt: skip
        if told.returncode:
            lines = told.stderr.strip().splitlines() or ["no word of why"]
            raise UserError(f"{words[0]} on {processes} processes: {lines[-1]}")
        seen: Figures = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
        if words[0] == "attribute":
            profile = json.loads((folder / "out" / "golden_profile.json").read_text(encoding="utf-8"))
            seen["seconds"] = profile["seconds"]
        return seen


def watched(file: str, words: Sequence[str]) -> int:
    """Run a command, and write down when its optimiser stepped and what gradients DistributedDataParallel sent."""
    steps: list[float] = []
    sent: list[int] = []
    made = DistributedDataParallel.__init__

    def send(_: None, bucket: Any) -> Any:
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # of the default group

    def make(self: DistributedDataParallel, *args: Any, **settings: Any) -> None:
        made(self, *args, **settings)
        send.__annotations__ = {}  # which it would check against types, not their names
        self.register_comm_hook(None, send)

    DistributedDataParallel.__init__ = make  # type: ignore[method-assign]
    register_optimizer_step_post_hook(lambda *_: steps.append(time.perf_counter()))
    code = command(list(words))
    if (
        os.environ.get("LOCAL_RANK", "0") == "0" and not Path(file).exists()
    ):  # else an agent's first process wrote it
        found = {"steps": len(steps), "seconds": steps[-1] - steps[0] if steps else 0.0, "bytes": sum(sent)}
        Path(file).write_text(json.dumps(found), encoding="utf-8")
    return code


if __name__ == "__main__":
    if SEEN in os.environ:  # started by `watch`, and by the command's own agent from there
        sys.exit(watched(os.environ[SEEN], sys.argv[1:]))
    run(main)

"""A model of Llama 3 8B's shape with random weights, attributed and fine-tuned: for where there is a GPU.

Figures of speed and memory do not hang on what a model knows, so that nothing has to be fetched. Texts are of the
bundled tokenizer, whose token ids are among the model's.

Model FLOPs are those of the blocks' linear maps: two for a weight and a token on the way up, two on the way down
(the gradient of what entered), and two more where the weight itself is trained; padding counts, the head does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.benchmarks.attribution import AttributionBench, most_alive
from pipeline.benchmarks.bench import COUNTERFACT, Figures
from pipeline.editing.finetune import FineTune
from pipeline.editing.lessons import Lesson
from pipeline.editing.method import Runtime
from pipeline.model import LLM, TargetBatch, sizes
from pipeline.options import AttributionOptions, BenchmarkCommand, EditOptions, FinetuneOptions, TrainerOptions
from pipeline.planning import edits, passes
from pipeline.planning.case import Case
from pipeline.planning.memory import weight_bytes
from pipeline.planning.shape import shape_of

LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
DTYPE, PRECISION = torch.bfloat16, "bf16-true"
SOME = slice(0, 64)  # records
LAYER = 3
EPOCHS = 2
TURNS = 3
PEAKS = {  # dense bf16, in FLOP a second, by a part of the device's name
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def random_llm(llm: LLM, shape: dict[str, Any], device: str) -> LLM:
    """A model of a Llama's shape with random weights, made on the device, with another model's tokenizer."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=DTYPE)
    return LLM(model.eval(), llm.tokenizer, "a random model")


class FullSize(AttributionBench):
    """Attribution and fine-tuning of one model, against a plain pass, against the plan, and against the device.

    Args:
        llm: the model, on its device.
        elsewhere: bytes on the device that are none of its own.
    """

    files: Sequence[str] = (COUNTERFACT,)
    needed = 1

    def __init__(self, llm: LLM, options: BenchmarkCommand, folder: Path, elsewhere: int = 0) -> None:
        super().__init__(llm, options, folder)
        self.elsewhere = elsewhere
        on = "cpu" if self.device.type == "cpu" else "gpu"
        self.trainer = TrainerOptions(accelerator=on, devices=1, precision=PRECISION)
        self.shape = shape_of(llm.model.config, llm.name, DTYPE)

    def measurements(self) -> Iterator[tuple[str, Callable[[], Figures]]]:
        """Name and function of each."""
        yield "attribution", self.attribution
        yield "fine-tuning", self.finetuning

    def attribution(self) -> Figures:
        """Layer gradient analysis of some records, in the batches that it makes of them."""
        batches = self._batches(self.records[SOME])
        plain, lga = partial(self._plain, batches), partial(self._lga, batches)
        seconds, _ = self.in_turns({"plain": plain, "lga": lga}, TURNS, warm_up=1)
        largest = max(batches, key=_tokens)
        peak = self._peak(partial(self._lga, [largest]))
        rows, length = largest.input_ids_BT.shape
        case = Case(self.shape, length + 1, precision=PRECISION)  # the last token of a row is not run
        beside = passes.attribution(case, AttributionOptions(), rows // 2)
        tokens = sum(map(_tokens, batches))
        return {
            "requests a second": len(self.records[SOME]) / seconds["lga"],
            "tokens a second": tokens / seconds["lga"],
            "time over a plain pass": seconds["lga"] / seconds["plain"],
            "peak memory in GB": peak / 1e9,
            "planned memory over measured": (weight_bytes(self.shape, "auto", 1) + beside) / peak,
        } | self._utilisation(4 * self._weights(0) * tokens / seconds["lga"])

    def finetuning(self) -> Figures:
        """Optimiser steps on some records at one block, whitening aside: that needs key statistics first."""
        chosen = FinetuneOptions(epochs=EPOCHS, learnt=0.0, whiten=0.0)
        options = EditOptions(method="finetune", finetune=chosen)
        layer = min(LAYER, len(self.llm.blocks) - 1)
        module = TimedFineTune(self.llm, [layer], options)
        with self.llm.frozen():
            peak = self._peak(lambda: module.run(self.records[SOME], Runtime(self.trainer)))
        case = Case(self.shape, module.longest, layer, PRECISION)
        beside = edits.training(case, options, chosen.batch_size)
        trained = sum(self.llm.model.get_parameter(name).numel() for name in module.weight_names)
        flops = (4 * self._weights(layer) + 2 * trained) * module.tokens
        return {
            "requests a second": EPOCHS * len(self.records[SOME]) / module.seconds,
            "tokens a second": module.tokens / module.seconds,
            "peak memory in GB": peak / 1e9,
            "planned memory over measured": (weight_bytes(self.shape, "auto", 1) + beside) / peak,
        } | self._utilisation(flops / module.seconds)

    def _weights(self, layer: int) -> int:
        """How many weights the linear maps of block `layer` and those above hold."""
        return sum(
            inputs * outputs
            for block in self.llm.blocks[layer:]
            for inputs, outputs in map(sizes, block.projections("block").values())
        )

    def _utilisation(self, flops: float) -> Figures:
        """FLOP a second as a share of what the device can do, where that is known."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        most = next((peak for part, peak in PEAKS.items() if part in name), None)
        return {"model FLOPs utilisation": flops / most} if most else {}

    def _peak(self, way: Callable[[], Any]) -> float:
        """Bytes that the weights and what `way` makes take together, at their most."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            way()
            return float(torch.cuda.max_memory_allocated() - self.elsewhere)
        return float(sum(_bytes(tensor) for tensor in _held(self.llm.model)) + most_alive(way))


class TimedFineTune(FineTune):
    """Fine-tuning that knows how long its steps took, and how many tokens they ran."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.began = self.seconds = 0.0
        self.tokens = self.longest = 0

    def on_train_start(self) -> None:
        self.began = time.perf_counter()

    def losses(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        self.tokens += _tokens(lesson.batch)
        self.longest = max(self.longest, lesson.batch.input_ids_BT.shape[1])
        return super().losses(lesson)

    def on_train_end(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.began


def _tokens(batch: TargetBatch) -> int:
    return batch.input_ids_BT.numel()


def _held(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

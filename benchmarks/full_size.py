"""A model of Llama 3 8B's shape on a GPU, in bf16: `python -m benchmarks.full_size --data DIR --output DIR`.

Its weights are random, as speed and memory do not hang on what a model knows; `--model` names the one that gives
the tokenizer. What the card can do is measured in the same run, by one large product of matrices.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.attribution import against_plain
from benchmarks.bench import Bench, Figures, both_answers, peak_bytes, run
from pipeline import LLM, EditOptions, EditRequest, StatisticsOptions, TrainerOptions, UserError, edit
from pipeline.attribution.find import score_requests
from pipeline.model.fingerprints import sample
from pipeline.options.attribution import AttributionOptions
from pipeline.options.commands import PlanCommand
from pipeline.planning.plan import plan_memory

ATTRIBUTED, EDITED, LAYER = 256, 32, 3
EXPERT: dict[str, dict[str, Any]] = {
    "memit": {},
    "finetune": {"epochs": 4, "learnt": 0.0},  # every row in every epoch
    "lora": {"epochs": 4, "learnt": 0.0},
    "auto": {"tuning": {"epochs": 4, "learnt": 0.0}},
}
LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
TOGETHER = (16, 128)  # requests
SIDE, PRODUCTS = 8192, 20


def main(words: Sequence[str] | None = None) -> None:
    if not torch.cuda.is_available():
        raise UserError("full_size: there is no GPU here")
    bench = Bench(__doc__, words, needed=ATTRIBUTED)
    on = TrainerOptions(accelerator="gpu", devices=1, precision="bf16-true")
    llm, records = random_llm(bench.llm), bench.records[:ATTRIBUTED]
    bench.measure(torch.cuda.get_device_name(), lambda: {"bf16 products, TFLOP/s": products() / 1e12})
    bench.measure("LGA", lambda: attributed(llm, records, on), most={"time": 2.5})
    for method in EXPERT:
        bench.measure(method, partial(edited, llm, records[:EDITED], method, bench.text, on))


def random_llm(llm: LLM, device: str = "cuda") -> LLM:
    """A random model of that shape, made on the device, with another model's tokenizer."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_3_8B), dtype=torch.bfloat16)
    return LLM(model.eval(), llm.tokenizer, "a random model", fingerprint=sample(model))  # all of it takes minutes


def products() -> float:
    """Operations a second of a product of large random matrices in bf16."""
    left, right = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    seconds = timed(lambda: [left @ right for _ in range(PRODUCTS)], warm_up=True)
    return 2 * SIDE**3 * PRODUCTS / seconds


def attributed(llm: LLM, requests: Sequence[EditRequest], on: TrainerOptions) -> Figures:
    """Time and memory over plain passes, and the model's operations a second, forward and back to the inputs."""
    found = against_plain(llm, requests, on) | planned(llm, "attribution", requests, on)
    rows = llm.tokens.rows(both_answers(requests))
    tokens = sum(len(row.token_ids) for row in rows)
    weights = sum(weight.numel() for weight in llm.model.parameters()) - llm.embedding.numel()
    for together in TOGETHER:
        options = AttributionOptions(batch_size=together)
        seconds = timed(lambda options=options: score_requests(llm, requests, options, on))  # type: ignore[misc]
        found[f"requests a second, {together} at once"] = len(requests) / seconds
        found[f"model TFLOP/s, {together} at once"] = 4 * weights * tokens / seconds / 1e12
    return found


def edited(llm: LLM, requests: Sequence[EditRequest], method: str, text: str | None, on: TrainerOptions) -> Figures:
    """Seconds of a first edit, its key statistics included, and of a later one; the most memory of that."""
    statistics = StatisticsOptions(text=text)
    options = EditOptions(method=method, layers=[LAYER], expert=EXPERT[method], statistics=statistics)
    once = partial(edit, llm, requests, None, options, on)
    first = timed(once)
    times: list[float] = []
    peak = peak_bytes(llm, lambda: times.append(timed(once)), on)
    (later,) = times
    return {
        "seconds of a first edit": first,
        "seconds of a later edit": later,
        "requests a second": len(requests) / later,
        "peak memory in GB": peak / 1e9,
    } | planned(llm, method, requests, on)


def planned(llm: LLM, stage: str, requests: Sequence[EditRequest], on: TrainerOptions) -> Figures:
    """What `run.py plan` says of the stage, in GB, for rows as long as the requests' longest."""
    length = max(len(row.token_ids) for row in llm.tokens.answered(requests))
    with tempfile.TemporaryDirectory() as folder:
        llm.model.config.save_pretrained(folder)
        asked = PlanCommand(model=folder, layer=LAYER, length=length, method=list(EXPERT), trainer=on)
        plan = plan_memory(asked)
    return {"planned memory in GB": next(need.total for need in plan.stages if need.stage == stage) / 1e9}


def timed(way: Callable[[], Any], warm_up: bool = False) -> float:
    """Seconds until it is done, on the GPU too."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else torch.cpu.synchronize
    if warm_up:
        way()
    wait()
    started = time.perf_counter()
    way()
    wait()
    return time.perf_counter() - started


if __name__ == "__main__":
    run(main)

"""On a GPU: the figures of a CPU, a process group of NCCL, the memory that was planned."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, edit_options, make_tiny
from lightning.pytorch import Trainer
from test_plan import in_folder, long_requests, tokens
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.bench import peak_bytes
from pipeline.attribution.find import score_requests
from pipeline.editing.editor import METHODS, edit
from pipeline.editing.statistics import key_moments
from pipeline.evaluation.evaluator import evaluate
from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.options.commands import PlanCommand
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.options.shared import EvaluationOptions, TrainerOptions
from pipeline.planning.plan import plan_memory
from pipeline.requests.readers import load_requests
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
CPU, GPU = (TrainerOptions(accelerator=accelerator, devices=1) for accelerator in ("cpu", "gpu"))
ROOT = Path(__file__).parent.parent
QUICK: dict[str, dict[str, Any]] = {"finetune": {"epochs": 3}, "lora": {"epochs": 3}}
LIBRARIES = 100e6  # bytes that CUDA's own libraries work in, taken anew by each stage
WIDE = {"hidden_size": 768, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 12}


@pytest.fixture(autouse=True)
def back_on_the_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test leaves on the GPU is taken away, the shared model too."""
    yield
    if "smollm2" in request.fixturenames:
        request.getfixturevalue("smollm2").model.cpu()
    torch.cuda.empty_cache()


TEXT = StatisticsOptions(text=str(ROOT / "pipeline" / "evaluation" / "ordinary_text.txt"), tokens=3_500)


def alike(found: np.ndarray, expected: np.ndarray) -> None:
    """Means over requests within a thousandth of the largest, ranked alike."""
    found_L, expected_L = found.mean(0), expected.mean(0)
    assert np.abs(found_L - expected_L).max() < 1e-3 * np.abs(expected_L).max()
    assert np.argsort(-np.abs(found_L)).tolist() == np.argsort(-np.abs(expected_L)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lga", "gradient_norm_subject", "causal_tracing"])
def test_scores_are_those_of_a_cpu(
    family: str, method: str, tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest]
) -> None:
    llm, options = make_tiny(family, tokenizer), AttributionOptions(method=method)
    expected = score_requests(llm, requests, options, CPU).values
    alike(score_requests(llm, requests, options, GPU).values, expected)


@pytest.mark.real_model
def test_scores_of_a_real_model_are_those_of_a_cpu(smollm2: LLM) -> None:
    requests = load_requests("demo")
    expected = score_requests(smollm2, requests, trainer=CPU).values
    alike(score_requests(smollm2, requests, trainer=GPU).values, expected)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_command_runs_under_nccl(
    strategy: str, tiny_folder: Path, request_file: Path, requests: list[EditRequest], tmp_path: Path
) -> None:
    found = []
    for name, accelerator, asked in (("gpu", "gpu", strategy), ("cpu", "cpu", "auto")):
        words = [sys.executable, ROOT / "run.py", "attribute", "--model", tiny_folder, "--requests", request_file]
        words += ["--trainer.accelerator", accelerator, "--trainer.strategy", asked, "--trainer.devices", "1"]
        told = subprocess.run([*words, "--output", tmp_path / name], capture_output=True, text=True, timeout=300)
        assert told.returncode == 0, told.stderr
        profile = json.loads((tmp_path / name / "golden_profile.json").read_text())
        found.append(np.array(profile["scores"])[None])
    alike(*found)


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_is_that_of_a_cpu(method: str, tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    options = edit_options(tmp_path, method, 1_000, **QUICK.get(method, {}))
    expected, found = (edit(tiny_llm, requests, None, options, trainer) for trainer in (CPU, GPU))
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        base = tiny_llm.model.get_parameter(name).detach().cpu()
        assert (found.tensors[name] - tensor).norm() < 0.02 * (tensor - base).norm(), name


@pytest.mark.real_model
@pytest.mark.parametrize("method", ["memit", "finetune", "lora"])
def test_figures_of_an_edit_are_those_of_a_cpu(method: str, smollm2: LLM) -> None:
    requests = load_requests("demo", limit=64)  # one that falls on the other side is less than .02
    expert = {"steps": 10} if method == "memit" else {"epochs": 8}
    options = EditOptions(method=method, layers=[3], expert=expert, statistics=TEXT)
    figures = []
    for trainer in (CPU, GPU):
        update = edit(smollm2, requests, None, options, trainer)
        assert next(smollm2.model.parameters()).device.type == ("cpu" if trainer is CPU else "cuda")
        report = evaluate(smollm2, requests, update, EvaluationOptions(generation="all"), trainer)
        figures.append({name: metric.mean for name, metric in report.after.metrics.items()})
    for name, mean in figures[0].items():
        assert figures[1][name] == pytest.approx(mean, abs=0.02, rel=0.01), name


def test_statistics_in_bf16_are_sound(tokenizer: PreTrainedTokenizerFast) -> None:
    llm = make_tiny("llama", tokenizer)
    names = list(llm.blocks[1].projections("down"))
    (expected_II,) = key_moments(llm, names, TEXT, Runtime(CPU)).values()
    llm.model.to(torch.bfloat16)
    again = LLM(llm.model, tokenizer, "in bf16")  # its own fingerprint: nothing of the other is read
    (found_II,) = key_moments(again, names, TEXT, Runtime(replace(GPU, precision="bf16-true"))).values()
    assert (found_II - expected_II).norm() < 0.02 * expected_II.norm()
    assert torch.linalg.eigvalsh(found_II.double()).min() > -1e-6 * found_II.trace()


@pytest.mark.real_model
@pytest.mark.usefixtures("few_lessons")
def test_memory_is_what_was_planned(smollm2: LLM, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vocabulary = len(smollm2.tokenizer)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, **WIDE))
    llm = LLM(model.cuda(), smollm2.tokenizer, "wide")
    requests, editing = long_requests(llm, 32), EditOptions(statistics=TEXT, layers=[1])
    folder = in_folder(tmp_path / "model", vocabulary, **WIDE)
    options = PlanCommand(model=folder, length=tokens(llm, requests), layer=1, edit=editing, trainer=GPU, batch=8)
    planned = {need.stage: need.total for need in plan_memory(options).stages}
    ways: dict[str, Callable[[], Any]] = {
        "attribution": partial(score_requests, llm, requests, AttributionOptions(batch_size=8), GPU),
    }
    for method in ("memit", "finetune", "lora"):
        expert = {"steps": 2} if method == "memit" else {"epochs": 1, "contexts": 0}
        own = replace(editing, method=method, expert=expert | {"batch_size": 8})
        ways[method] = partial(edit, llm, requests[:8], None, own, GPU)
    measured = {}
    for name, way in ways.items():
        way()  # key statistics are kept, and libraries take what they need
        measured[name] = peak_bytes(llm, way, GPU)
    for name, peak in measured.items():
        assert 0.9 * planned[name] < peak < 1.1 * planned[name] + LIBRARIES, (name, peak, planned[name])


def test_a_trainer_of_ones_own(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    expected = score_requests(tiny_llm, requests, trainer=CPU).values
    trainer = Trainer(accelerator="gpu", devices=1, logger=False, enable_checkpointing=False)
    alike(score_requests(tiny_llm, requests, trainer=trainer).values, expected)

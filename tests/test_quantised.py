"""A base model in 4 bits: scored and edited as the checkpoint is, and its updates are the checkpoint's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conftest import edit_options, refusal, tiny_gpt2, tiny_llama
from torch import nn
from transformers import PreTrainedTokenizerFast

from benchmarks.bench import most_alive
from pipeline.attribution.find import score_requests
from pipeline.cli import main
from pipeline.editing.editor import edit
from pipeline.editing.export import export_merged
from pipeline.editing.update import WeightUpdate
from pipeline.errors import UserError
from pipeline.evaluation.evaluator import evaluate
from pipeline.model.llm import LLM
from pipeline.model.loading import load_model
from pipeline.model.quantised import NF4_BYTES
from pipeline.options.attribution import AttributionOptions
from pipeline.options.commands import PlanCommand
from pipeline.options.shared import EvaluationOptions, TrainerOptions
from pipeline.planning.plan import plan_memory
from pipeline.requests.readers import load_requests
from pipeline.requests.schema import EditRequest

CPU = torch.device("cpu")
NF4 = TrainerOptions(accelerator="cpu", devices=1, precision="nf4")
HALF = TrainerOptions(accelerator="cpu", devices=1, precision="bf16-true")
SETTINGS: dict[str, dict[str, Any]] = {
    "memit": {"steps": 2},
    "finetune": {"epochs": 2, "contexts": 0},
    "lora": {"epochs": 2, "contexts": 0, "rank": 2},
    "auto": {"steps": 2, "depths": [0.6], "tuning": {"epochs": 2, "contexts": 0}},
}


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama's checkpoint."""
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("llama")
    tiny_llama(len(tokenizer)).bfloat16().save_pretrained(made)
    tokenizer.save_pretrained(made)
    return str(made)


@pytest.fixture
def llm(folder: str) -> LLM:
    return load_model(folder, torch.bfloat16, nf4=CPU)


@pytest.fixture(scope="module")
def some() -> list[EditRequest]:
    return load_requests("demo")[:4]


def packed(llm: LLM) -> list[str]:
    """The maps that are in 4 bits."""
    named = llm.model.named_modules()
    return [name for name, one in named if isinstance(one, nn.Linear) and not one.weight.is_floating_point()]


def test_scores_are_those_of_what_the_blocks_hold(folder: str, llm: LLM, some: list[EditRequest]) -> None:
    plain = load_model(folder, torch.bfloat16)
    assert llm.fingerprint == plain.fingerprint and llm.sample != plain.sample
    assert len(packed(llm)) == 4 * 7 and all(".layers." in name for name in packed(llm))
    for name in packed(llm):
        weight: Any = llm.model.get_submodule(name).weight
        held, meant = dequantize_4bit(weight.data, weight.quant_state), plain.model.get_submodule(name).weight
        assert 0.01 < (held - meant).norm() / meant.norm() < 0.5  # 0.09 for maps that are not tiny
        meant.data.copy_(held)
    found = score_requests(llm, some, AttributionOptions(), NF4)
    expected = score_requests(plain, some, AttributionOptions(), HALF)
    torch.testing.assert_close(found.values, expected.values, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("method", [*SETTINGS])
def test_an_edit_changes_the_checkpoints_own_weights(
    method: str, folder: str, llm: LLM, some: list[EditRequest], tmp_path: Path
) -> None:
    plain = load_model(folder, torch.bfloat16)
    options = edit_options(tmp_path, method, 200, **SETTINGS[method])
    update = edit(llm, some, None, options, NF4)
    assert not {name.removesuffix(".weight") for name in update.tensors} & {*packed(llm)}
    below = 7 if method in ("memit", "auto") else 0  # whose keys are the checkpoint's
    assert len(packed(llm)) == 4 * 7 - len(update.tensors) - below
    for name, tensor in update.tensors.items():
        before = plain.model.get_parameter(name)
        assert torch.equal(llm.model.get_parameter(name), before)
        assert not torch.equal(tensor.to(before.dtype), before)
    update.check_fits(plain)
    export_merged(plain, update, tmp_path / "merged")
    edited = load_model(tmp_path / "merged", torch.bfloat16).model.state_dict()
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(edited[name], update.tensors.get(name, weight).to(weight.dtype)), name


def test_before_and_after_are_measured_with_the_same_plain_weights(
    folder: str, some: list[EditRequest], tmp_path: Path
) -> None:
    plain = load_model(folder, torch.bfloat16)
    options = edit_options(tmp_path, "finetune", 200, **SETTINGS["finetune"])
    update = edit(plain, some, None, options, HALF)
    nothing = WeightUpdate(**{**vars(update), "tensors": {n: plain.model.get_parameter(n) for n in update.tensors}})
    quick = EvaluationOptions(generation="none", fluency=0)
    again = load_model(folder, torch.bfloat16, nf4=CPU)
    found = evaluate(again, some, nothing, quick, NF4)
    assert found.after
    assert {name: found.after.metrics[name] for name in found.before.metrics} == found.before.metrics
    assert found.after.metrics["text_kl"].mean == 0


def test_commands_go_from_the_layer_to_the_answer(folder: str, tmp_path: Path) -> None:
    asked = ["--model", folder, "--limit", "2", "--trainer.accelerator", "cpu", "--trainer.precision", "nf4"]
    own = ["--edit.method", "finetune", "--edit.expert", '{"epochs": 1, "whiten": 0, "sparing": 0}']
    out = str(tmp_path / "out")
    quick = ["--evaluation.generation", "none", "--evaluation.fluency", "0", "--trainer.devices", "1"]
    assert main(["run", *asked, *own, *quick, "--output", out]) == 0
    quick = [word.replace("evaluation.", "") for word in quick]
    assert main(["evaluate", *asked[:4], *quick, "--update", out, "--output", str(tmp_path / "plain")]) == 0


def test_the_plan_counts_what_is_held_and_what_is_unpacked(folder: str, some: list[EditRequest]) -> None:
    llm = load_model(folder, torch.bfloat16, nf4=CPU)
    maps = [llm.model.get_submodule(name).weight for name in packed(llm)]
    held = sum(one.nbytes for one in llm.model.parameters())
    stages = {
        precision: plan_memory(
            PlanCommand(
                model=folder,
                memory=1.0,
                method=["finetune"],
                trainer=TrainerOptions(accelerator="cpu", devices=1, precision=precision),
            )
        ).stages
        for precision in ("nf4", "bf16-true")
    }
    half, quarter = (stages[precision][0] for precision in ("bf16-true", "nf4"))
    weights = sum(one.nbytes * 2 for one in maps)  # two to a byte
    assert quarter.weights == pytest.approx(held + weights * (NF4_BYTES - 0.5), rel=0.01)
    assert quarter.weights == pytest.approx(half.weights - weights * (2 - NF4_BYTES), rel=0.001)
    assert quarter.beside - half.beside == 2 * 32 * 48  # the largest map
    finetuned = next(one for one in stages["nf4"] if one.stage == "finetune")
    assert finetuned.weights - quarter.weights == pytest.approx(3 * 32 * 48 * (2 - NF4_BYTES), abs=10)
    measured = most_alive(lambda: score_requests(llm, some, AttributionOptions(), NF4))
    assert measured > quarter.beside / 20  # rows are shorter than planned


def test_what_does_not_come_in_4_bits(
    folder: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_gpt2(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "is a Conv1D; expected linear maps" in refusal(lambda: load_model(tmp_path, nf4=CPU))
    asked = TrainerOptions(accelerator="cpu", strategy="fsdp2", precision="nf4")
    plan = PlanCommand(model=folder, memory=1.0, trainer=asked, devices=2)
    assert "needs the whole model on each device" in refusal(lambda: plan_memory(plan))
    known = load_model(folder, torch.bfloat16, nf4=CPU)
    stranger = LLM(known.model, known.tokenizer)
    with pytest.raises(UserError, match="no plain weights of it are known"):
        edit(stranger, load_requests("demo")[:1], None, edit_options(tmp_path, "finetune", 200), NF4)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "nf4 needs bitsandbytes" in refusal(lambda: load_model(folder, nf4=CPU))

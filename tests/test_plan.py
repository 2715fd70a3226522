"""The plan of a device's memory: what it says is what is then measured, of any family, from a config alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refusal
from families import ENDS, FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from benchmarks.bench import most_alive
from pipeline.attribution.find import score_requests
from pipeline.cli import main
from pipeline.editing.auto import AFTER_MANY
from pipeline.editing.editor import METHODS
from pipeline.editing.statistics import give_moments
from pipeline.evaluation.evaluator import evaluate
from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.options.commands import PlanCommand
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.options.shared import EvaluationOptions, TrainerOptions
from pipeline.planning import stages
from pipeline.planning.plan import Need, longest_batch, plan_memory, weight_bytes
from pipeline.planning.shape import Case, shape_of
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime

CPU = TrainerOptions(accelerator="cpu", devices=1)
LAYER = 1
FINETUNE = EditOptions(method="finetune", expert={"whiten": 0, "sparing": 0})
SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def long_requests(llm: LLM, count: int) -> list[EditRequest]:
    """Requests alike, their subject in the middle of some thirty words."""
    words = "in the old town by the river where people meet and speak of"
    return [
        EditRequest(
            id=f"long-{number}",
            prompt=f"it is said {words} {1800 + number} Norway and its capital that {words} the city of",
            subject=f"{1800 + number} Norway",
            new_answer="Oslo in the north",
            old_answer="Rome in the south",
        )
        for number in range(count)
    ]


def tokens(llm: LLM, requests: Sequence[EditRequest]) -> int:
    return len(llm.tokens.rows([(requests[0].prompt, requests[0].new_answer)])[0].token_ids)


@pytest.fixture(scope="module")
def medium(smollm2: LLM) -> LLM:
    """Large enough that what is kept of requests is little beside what is worked with; a real tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(smollm2.tokenizer), **SHAPE)
    return LLM(LlamaForCausalLM(config), smollm2.tokenizer, "medium")


def in_folder(folder: Path, vocabulary: int, **settings: Any) -> str:
    """A folder with a config and nothing else."""
    LlamaConfig(vocab_size=vocabulary, **SHAPE | settings).save_pretrained(folder)
    return str(folder)


def weights_of(llm: LLM) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in llm.model.parameters())


def give(llm: LLM, options: EditOptions) -> None:
    """Statistics, which are a stage of their own: found once, and read by the edit."""
    give_moments(METHODS[options.method].make(llm, [LAYER], options), llm, options.statistics, Runtime(CPU))


def run_edit(llm: LLM, requests: Sequence[EditRequest], options: EditOptions) -> None:
    with llm.frozen():
        method = METHODS[options.method].make(llm, [LAYER], options)
        give_moments(method, llm, options.statistics, Runtime(CPU))
        method.run(requests, Runtime(CPU), ())


@pytest.fixture
def editing(tmp_path: Path) -> EditOptions:
    """Every way to edit, for as many steps as reach the most memory."""
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    return EditOptions(statistics=StatisticsOptions(text=str(text), tokens=2_000), expert=FEW_FORMS)


FEW_FORMS = {"forms": 1}  # of memit
SHORT: dict[str, dict[str, Any]] = {
    "finetune": {"epochs": 1, "contexts": 0},
    "lora": {"epochs": 1, "contexts": 0},
    "memit": {"steps": 1, "neighbours": 2, **FEW_FORMS},
    "auto": {
        "steps": 1,
        "neighbours": 2,
        **FEW_FORMS,
        "tuning": {"epochs": 1, "contexts": 0, "kept": AFTER_MANY["kept"]},
    },
}


@pytest.mark.real_model
def test_what_is_planned_is_what_is_measured(
    medium: LLM, editing: EditOptions, tmp_path: Path, few_lessons: None
) -> None:
    requests = long_requests(medium, 32)
    options = PlanCommand(
        model=in_folder(tmp_path / "model", len(medium.tokenizer)),
        length=tokens(medium, requests),
        layer=LAYER,
        edit=editing,
        trainer=CPU,
    )
    planned = {need.stage: need for need in plan_memory(options).stages}
    measuring = EvaluationOptions(generation="prompts", max_new_tokens=1, fluency=0)  # answers take less than texts
    ways: dict[str, Callable[[], Any]] = {
        "attribution": lambda: score_requests(medium, requests, AttributionOptions(), CPU),
        "evaluation": lambda: evaluate(medium, requests, None, measuring, CPU),
    }
    ways["slopes of text"] = partial(give, medium, replace(editing, method="memit"))
    for method in options.method:  # what training keeps of requests lies in the same memory here: few of them
        some = requests[:16] if method == "memit" else requests[:8]
        ways[method] = partial(run_edit, medium, some, replace(editing, method=method, expert=SHORT[method]))
    for name, way in ways.items():
        weights, beside = weights_of(medium), most_alive(way)
        assert planned[name].weights == pytest.approx(weights, rel=0.01)
        assert planned[name].beside == pytest.approx(beside, rel=0.2), name
        assert planned[name].total == pytest.approx(weights + beside, rel=0.2), name


@pytest.mark.slow
@pytest.mark.real_model
def test_the_bundled_model_takes_what_was_planned(smollm2: LLM) -> None:
    requests = long_requests(smollm2, 2)
    options = PlanCommand(length=tokens(smollm2, requests), batch=2, method=["memit"], trainer=CPU)
    need = plan_memory(options).stages[0]
    assert need.stage == "attribution"
    measured = most_alive(lambda: score_requests(smollm2, requests, AttributionOptions(batch_size=2), CPU))
    assert need.beside == pytest.approx(measured, rel=0.1)
    assert need.weights == pytest.approx(weights_of(smollm2), rel=0.01)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "falcon, ALiBi"])
def test_every_family_is_gone_through(family: str) -> None:
    make, settings = FAMILIES[family]
    shape = shape_of(make(vocab_size=100, **ENDS | settings), family, torch.float32)
    case = Case(shape, 12, 1)
    beside = {
        "attribution": stages.attribution(case, AttributionOptions(), 2),
        "lora": stages.editing(case, EditOptions(method="lora", expert={"rank": 4}), 2),
        "memit": stages.editing(case, EditOptions(method="memit", expert=FEW_FORMS), 1),
        "evaluation": stages.evaluation(case, 2),
    }
    assert all(1e4 < size < 1e7 for size in beside.values())


def a_case(length: int = 24, dtype: torch.dtype = torch.float32, **given: Any) -> Case:
    return Case(shape_of(LlamaConfig(vocab_size=500, **SHAPE), "a shape", dtype), length, **given)


def test_strategies_and_precisions() -> None:
    block = 4 * (2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 768 + 2 * 192)
    ends = 4 * (2 * 500 * 192 + 192)
    case = a_case()
    for strategy, devices, expected in (
        ("auto", 1, ends + 4 * block),
        ("ddp", 2, ends + 4 * block),
        ("fsdp2", 1, ends + 4 * block),
        ("fsdp", 3, ends + 4 * block / 3 + 2 * block),  # an own part, and the block at work and the next
    ):
        assert weight_bytes(case.shape, strategy, devices) == pytest.approx(expected, rel=0.001)
    mixed = stages.editing(replace(case, precision="bf16-mixed"), FINETUNE, 4)
    half = stages.editing(a_case(dtype=torch.bfloat16, precision="bf16-true"), FINETUNE, 4)
    assert half < stages.editing(case, FINETUNE, 4) * 0.6
    assert half < mixed  # which makes a copy of every weight
    shared = stages.editing(replace(case, devices=2, sharded=True), FINETUNE, 8)
    assert shared == stages.editing(case, FINETUNE, 4)
    assert stages.editing(replace(case, devices=2), FINETUNE, 8) == shared + 4 * 3 * 192 * 768
    solved = stages.editing(case, EditOptions(method="finetune"), 1)
    assert solved > 4.5 * 8 * 768**2  # three second moments, and their system and its solution in float64


def test_ddp_sends_from_buffers_of_its_own(tmp_path: Path) -> None:
    model = in_folder(tmp_path, 500, num_hidden_layers=1)

    def lora(strategy: str) -> Need:
        trainer = TrainerOptions(accelerator="cpu", strategy=strategy)
        asked = PlanCommand(
            model=model, memory=1e-6, length=12, method=["lora"], devices=2, trainer=trainer, batch=2
        )
        return next(need for need in plan_memory(asked).stages if need.stage == "lora")

    assert lora("ddp").beside - lora("fsdp2").beside == 4 * 3 * 16 * (192 + 768)


def test_the_longest_batch_just_fits() -> None:
    case, room = a_case(), 30_000_000
    longest = longest_batch(partial(stages.editing, case, FINETUNE), 4, room)
    assert stages.editing(case, FINETUNE, longest) <= room
    assert stages.editing(case, FINETUNE, longest + 1) > room


def test_attribution_stops_where_it_would_take_too_much(tmp_path: Path) -> None:
    asked = PlanCommand(
        model=in_folder(tmp_path, 500), memory=1, length=100, batch=1000, method=["memit"], trainer=CPU
    )
    attribution, *_, evaluation = plan_memory(asked).stages
    for need in (attribution, evaluation):
        assert 1 < need.batch < 20
        assert need.longest_batch is None


@pytest.mark.parametrize("fitting", [0, 1, 7, 64, 900])
@pytest.mark.parametrize("most", [None, 100])
def test_a_line_tells_what_fits(fitting: int, most: int | None) -> None:
    longest = longest_batch(lambda batch: 1000 + 10 * batch, 16, 1000 + 10 * fitting + 5, most)
    assert longest == min(fitting, most or fitting)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = in_folder(tmp_path / "model", 500, num_hidden_layers=2), tmp_path / "out"
    words = ["plan", "--model", model, "--devices", "2", "--memory", "0.5", "--method", "memit"]
    assert main([*words, "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "rows of 64 tokens" in shown and "longest batch in 0.5 GB" in shown
    assert "note: " not in shown
    assert main([*words[:-3], "0.0001", *words[-2:]]) == 0
    assert "--trainer.precision nf4" in capsys.readouterr().out
    plan = json.loads((out / "plan.json").read_text())
    assert (plan["devices"], plan["memory"], plan["blocks"]) == (2, 500_000_000, 2)
    assert [stage["stage"] for stage in plan["stages"]] == [
        "attribution",
        "key statistics",
        "slopes of text",
        "memit",
        "evaluation",
    ]
    for need in (Need(**stage) for stage in plan["stages"]):
        assert need.total == need.weights + need.beside
        assert f"{need.stage} " in shown


def test_what_cannot_be_planned_for(tmp_path: Path) -> None:
    model = in_folder(tmp_path / "model", 500, num_hidden_layers=2)
    (tmp_path / "empty").mkdir()

    def refused(**given: Any) -> str:
        return refusal(lambda: plan_memory(PlanCommand(**{"model": model, "memory": 1.0} | given)))

    assert "no such folder" in refused(model=str(tmp_path / "none"))
    assert "holds no config.json" in refused(model=str(tmp_path / "empty"))
    assert "there is" in refused(method=["sft"]) and "memit" in refused(method=["sft"])
    assert "there is auto, ddp, fsdp, fsdp2" in refusal(lambda: TrainerOptions(strategy="deepspeed"))
    assert "it has 0 to 1" in refused(layer=2)
    assert "the context of" in refused(length=513)
    assert "give a device's with --memory" in refused(memory=None, trainer=TrainerOptions(accelerator="tpu"))
    for given in ({"devices": 0}, {"batch": 0}, {"length": 2}, {"memory": 0.0}, {"method": ["lora", "lora"]}):
        assert next(iter(given)) in refused(**given)
    config = json.loads((Path(model) / "config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "quantised (gptq)" in refused(model=str(broken))
    (broken / "config.json").write_text(json.dumps({"model_type": "jetmoe", "num_hidden_layers": 2}))
    assert "not run as the library runs them" in refused(model=str(broken))
    (broken / "config.json").write_text(json.dumps(config | {"num_attention_heads": 7}))
    assert "not a multiple of the number of attention heads" in refused(model=str(broken))
    (broken / "config.json").write_text(json.dumps(config | {"pad_token_id": 5000}))
    assert "no decoder can be made of its config" in refused(model=str(broken))
    (broken / "config.json").write_text("{")
    assert "the config of" in refused(model=str(broken))


MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}


def test_experts_that_a_token_does_not_meet_are_not_active(tmp_path: Path) -> None:
    MixtralConfig(vocab_size=500, **SHAPE | MIXTURE).save_pretrained(tmp_path)
    plan = plan_memory(PlanCommand(model=str(tmp_path), memory=1.0, method=["memit"]))
    of_an_expert = 3 * SHAPE["hidden_size"] * SHAPE["intermediate_size"]
    assert plan.parameters - plan.active == SHAPE["num_hidden_layers"] * (4 - 2) * of_an_expert


@pytest.mark.real_model
def test_mixtures_take_what_was_planned(
    smollm2: LLM, editing: EditOptions, tmp_path: Path, few_lessons: None
) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=len(smollm2.tokenizer), **SHAPE | MIXTURE)
    config.save_pretrained(tmp_path / "model")
    mixture = LLM(MixtralForCausalLM(config), smollm2.tokenizer, "mixture")
    requests = long_requests(mixture, 16)
    options = PlanCommand(
        model=str(tmp_path / "model"), length=tokens(mixture, requests), layer=LAYER, edit=editing, trainer=CPU
    )
    options = replace(options, method=["finetune", "memit"], batch=8)
    planned = {need.stage: need for need in plan_memory(options).stages}
    ways: dict[str, Callable[[], Any]] = {
        "attribution": lambda: score_requests(mixture, requests, AttributionOptions(batch_size=8), CPU)
    }
    for method in options.method:
        give(mixture, replace(editing, method=method, expert=SHORT[method]))
        ways[method] = partial(
            run_edit, mixture, requests[:8], replace(editing, method=method, expert=SHORT[method])
        )
    for name, way in ways.items():
        assert planned[name].beside == pytest.approx(most_alive(way), rel=0.2), name

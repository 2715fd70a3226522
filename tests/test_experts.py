"""Mixtures of experts: two wide linear maps that come to what the library's experts do, and edits of them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refusal
from families import family_llm, family_model
from gguf import GGUFReader
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.attribution.find import find_golden_layer
from pipeline.editing.editor import edit
from pipeline.editing.export import export_adapter
from pipeline.editing.gguf_export import export_gguf_adapter
from pipeline.editing.statistics import KeyMoments
from pipeline.model.activations import Activations
from pipeline.model.blocks import as_matrix, as_stored, find_blocks, sizes
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.requests.readers import load_requests
from pipeline.requests.rows import Row
from pipeline.requests.schema import EditRequest
from pipeline.running.stage import run

KINDS = ["qwen3_moe", "gpt_oss", "qwen2_moe"]  # gated; interleaved, transposed and with biases; with a shared MLP
IDS = torch.tensor([[7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25]])


@pytest.fixture(params=KINDS)
def llm(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> LLM:
    """A mixture of each kind."""
    return family_llm(request.param, tokenizer)


@pytest.fixture
def statistics(tmp_path: Path) -> StatisticsOptions:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{r.prompt} {r.old_answer}." for r in load_requests("demo")))
    return StatisticsOptions(text=str(text), tokens=512)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hooked", [True, False])
def test_the_maps_come_to_what_the_library_does(kind: str, hooked: bool) -> None:
    plain = family_model(kind, 60)
    mapped = deepcopy(plain)
    names = [name for block in find_blocks(mapped) for name in block.scopes["experts"]]
    assert len(names) == 2 * plain.config.num_hidden_layers
    seen: list[Any] = []
    for name in names if hooked else []:
        mapped.get_submodule(name).register_forward_hook(lambda *passed: seen.append(passed))
    logits = {model: model(input_ids=IDS).logits for model in (plain, mapped)}
    torch.testing.assert_close(logits[mapped], logits[plain], rtol=1e-4, atol=1e-5)
    assert len(seen) == (len(names) if hooked else 0)
    for model in (plain, mapped):
        logits[model].square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), mapped.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_a_map_is_its_matrix(llm: LLM) -> None:
    for name, stacked in llm.blocks[1].scopes["experts"].items():
        with Activations(llm).entering(name) as entered, Activations(llm).leaving(name) as left, torch.no_grad():
            llm.model(input_ids=IDS)
        matrix_OI = as_matrix(stacked, stacked.weight)
        assert matrix_OI.shape == sizes(stacked)[::-1] and torch.equal(
            as_stored(stacked, matrix_OI), stacked.weight
        )
        whole = entered[name] @ matrix_OI.T
        reached = left[name] != 0  # what goes up into experts that a token does not reach is left out
        torch.testing.assert_close(left[name][reached], whole[reached], rtol=1e-4, atol=1e-5)
        assert reached.all() if name.endswith("down") else reached.float().mean() == 0.5


def test_statistics_of_keys_are_those_of_each_expert(llm: LLM) -> None:
    (down,) = llm.blocks[1].down
    experts: Any = llm.model.get_submodule(down.rpartition(".")[0])
    passed: list[tuple[Tensor, ...]] = []
    with experts.register_forward_pre_hook(lambda _, args: passed.append(args)), torch.no_grad():
        llm.model(input_ids=IDS[:1])
    hidden_TD, index_TK, weight_TK = passed[0]
    inputs = sizes(llm.model.get_submodule(down))[0] // experts.num_experts  # type: ignore[arg-type]
    expected = torch.zeros(experts.num_experts, inputs, inputs)
    for token, (hidden_D, index_K, weight_K) in enumerate(zip(hidden_TD, index_TK, weight_TK, strict=True)):
        assert token < IDS.shape[1]
        for expert, gate in zip(index_K.tolist(), weight_K, strict=True):
            up = experts.gate_up_proj[expert]
            inner = hidden_D @ up if experts.is_transposed else up @ hidden_D
            inner = inner + experts.gate_up_proj_bias[expert] if experts.has_bias else inner
            key = gate * experts._apply_gate(inner[None])[0]
            expected[expert] += torch.outer(key, key) / IDS.shape[1]
    stage = KeyMoments(llm, [down])
    with llm.frozen():
        run(stage, [Row(IDS[0].tolist(), IDS.shape[1])])
    torch.testing.assert_close(stage.moments()[down], expected, rtol=1e-4, atol=1e-6)


def test_an_edit_puts_the_found_value_out(
    llm: LLM, requests: list[EditRequest], statistics: StatisticsOptions
) -> None:
    expert = {"steps": 4, "forms": 0}
    options = EditOptions(method="emmet", layers=[1], expert=expert, statistics=statistics)
    update = edit(llm, requests[:1], options=options)
    (down,) = llm.blocks[1].down
    ids, end = llm.tokens.prompts([requests[0].prompt])[0], requests[0].prompt.index(requests[0].subject or "")
    place = llm.tokens.place(requests[0].prompt, end + len(requests[0].subject or ""))

    def leaving() -> Tensor:
        with Activations(llm).leaving(down) as seen, torch.no_grad():
            llm.model(input_ids=torch.tensor([ids]))
        return seen[down][place]

    before = leaving()
    with update.applied(llm):
        change = leaving() - before
    wanted = update.state["locate.1.change_On"][:, 0]
    assert wanted.norm() > 0.01
    torch.testing.assert_close(change, wanted, rtol=1e-2, atol=1e-2 * wanted.norm().item())


def test_lora_on_experts_is_an_adapter_that_peft_reads(
    llm: LLM, requests: list[EditRequest], statistics: StatisticsOptions, tmp_path: Path
) -> None:
    expert = {"epochs": 2, "contexts": 0, "rank": 2, "learning_rate": 0.1}
    options = EditOptions(method="lora", layers=[1], expert=expert, statistics=statistics)
    update = edit(llm, requests[:2], options=options)
    plain = deepcopy(llm.model)
    with torch.no_grad():
        base = llm.model(input_ids=IDS).logits
        with update.applied(llm):
            expected = llm.model(input_ids=IDS).logits
        assert (expected - base).abs().max() > 1e-2
        export_adapter(llm, update, tmp_path)
        found = PeftModel.from_pretrained(plain, tmp_path).eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_other_changes_of_experts_are_exported_merged_alone(
    llm: LLM, requests: list[EditRequest], statistics: StatisticsOptions, tmp_path: Path
) -> None:
    options = EditOptions(method="memit", layers=[1], expert={"steps": 2}, statistics=statistics)
    update = edit(llm, requests[:1], options=options)
    message = refusal(lambda: export_adapter(llm, update, tmp_path))
    (down,) = llm.blocks[1].weight_names("down")
    assert f"{down} is of experts" in message and "merged" in message


def test_a_shared_mlp_is_an_adapter_for_llama_cpp(
    tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest], statistics: StatisticsOptions, tmp_path: Path
) -> None:
    mixture = family_llm("qwen2_moe", tokenizer)
    expert = {"epochs": 1, "contexts": 0, "learning_rate": 0.1, "scope": "shared"}
    options = EditOptions(method="finetune", layers=[1], expert=expert, statistics=statistics)
    update = edit(mixture, requests[:2], options=options)
    export_gguf_adapter(mixture, update, tmp_path)
    names = {tensor.name for tensor in GGUFReader(next(tmp_path.glob("*.gguf"))).tensors}
    assert names == {
        f"blk.1.ffn_{part}_shexp.weight.lora_{side}" for part in ("gate", "up", "down") for side in "ab"
    }


def test_what_leads_into_experts_is_no_mlp_beside_them(tokenizer: PreTrainedTokenizerFast) -> None:
    """Nemotron-H may send a narrower state to its experts; the maps there and back look like an MLP."""
    block = family_llm("nemotron_h, experts", tokenizer).blocks[1]
    assert [name.rpartition("mixer.")[2] for name in block.mlp] == [
        *("shared_experts.up_proj", "shared_experts.down_proj"),
        *("experts.routed_up", "experts.routed_down"),
    ]


def test_scopes_of_a_mixture(tokenizer: PreTrainedTokenizerFast) -> None:
    shared, routed = family_llm("qwen2_moe", tokenizer).blocks[0], family_llm("qwen3_moe", tokenizer).blocks[0]
    experts = [f"{routed.name}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    assert routed.weight_names("mlp") == routed.weight_names("experts") == experts
    assert [name.rpartition("mlp.")[2] for name in shared.scopes["shared"]] == [
        f"shared_expert.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert shared.weight_names("mlp") == shared.weight_names("shared") + shared.weight_names("experts")
    assert "block 0 has no weights of scope 'shared'; it has mlp, down" in refusal(
        lambda: routed.projections("shared")
    )


def test_blocks_without_an_mlp_are_not_chosen(
    tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest]
) -> None:
    hybrid = family_llm("nemotron_h", tokenizer)
    assert hybrid.editable == [1]
    profile = find_golden_layer(hybrid, requests)
    assert profile.scores[0] == profile.scores[2] == 0 and profile.scores[1]
    assert profile.golden_layers == profile.ranking == [1] and profile.excluded == [0, 2]
    message = refusal(lambda: edit(hybrid, requests, options=EditOptions(method="finetune", layers=[0])))
    assert message == "layers: block 0 of tiny-nemotron_h has no MLP; these have one: 1"

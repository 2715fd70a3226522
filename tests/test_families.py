"""Every family: recognised, scored, run in parts, edited, undone and exported like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, family_llm
from test_attribution import autograd_scores
from test_suffix import ROWS, plain_logits
from transformers import PreTrainedTokenizerFast

from pipeline.attribution.find import find_golden_layer
from pipeline.editing.editor import edit
from pipeline.editing.export import export_merged
from pipeline.model.activations import Activations, target_logits
from pipeline.model.blocks import sizes
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.model.suffix import Suffixes, parts_of
from pipeline.options.attribution import AttributionOptions
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.options.shared import TrainerOptions
from pipeline.requests.readers import load_requests
from pipeline.requests.rows import collate
from pipeline.requests.schema import EditRequest

LAYER = 1
LOCATE = {"steps": 2, "neighbours": 1}
WHOLE = {"gemma3n", "gemma4, keys shared"}  # several streams; keys and values of lower blocks
QUICK: dict[str, dict[str, Any]] = {
    "finetune": {"epochs": 1, "contexts": 0, "learning_rate": 0.1},
    "lora": {"epochs": 1, "contexts": 0, "rank": 2, "learning_rate": 0.1},
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> str:
    """A family's name."""
    return request.param


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> StatisticsOptions:
    """Key statistics of a text that need not be written first."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n".join(f"{r.prompt} {r.old_answer}." for r in load_requests("demo")))
    return StatisticsOptions(text=str(text), tokens=512)


@pytest.fixture(scope="module")
def llm(family: str, tokenizer: PreTrainedTokenizerFast) -> LLM:
    """A model of the family; tests leave it as they found it, which one of them checks."""
    return family_llm(family, tokenizer)


def snapshot(llm: LLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}


def test_attribution_is_autograds(llm: LLM, requests: list[EditRequest]) -> None:
    """In float64: products of a block may nearly cancel, and what is left of them in float32 is rounding."""
    few = requests[1:3]
    llm.model.double()
    try:
        for scope in ("mlp", "block"):
            expected = autograd_scores(llm, few, scope)
            double = TrainerOptions(precision="64-true")
            profile = find_golden_layer(llm, few, AttributionOptions(scope=scope), double)
            scores = torch.tensor(profile.scores, dtype=torch.float64)
            assert ((scores - expected).abs() / expected.abs().clamp(min=1e-30)).max() < 1e-5
    finally:
        llm.model.float()


def test_upper_blocks_alone_give_the_same_logits(family: str, llm: LLM, requests: list[EditRequest]) -> None:
    assert parts_of(llm).blocks == (family not in WHOLE)
    if family in WHOLE:
        return
    batch = collate(llm.tokens.rows([(r.prompt, r.new_answer) for r in requests]))
    activations = Activations(llm)
    with llm.frozen(), torch.no_grad():
        expected_NV = target_logits(llm.model, batch)
        enter_BTD = activations.enter(batch.input_ids_BT, LAYER)
        with activations.from_block(LAYER, enter_BTD):
            found_NV = target_logits(llm.model, batch)
        with activations.from_block(LAYER, torch.zeros_like(enter_BTD)):
            other_NV = target_logits(llm.model, batch)
    torch.testing.assert_close(found_NV, expected_NV, rtol=1e-5, atol=1e-5)
    assert (other_NV - expected_NV).abs().max() > 1e-2, "lower blocks did not run"


@pytest.mark.parametrize("layer", [0, -1])
def test_suffixes_equal_the_whole(llm: LLM, layer: int) -> None:
    layer = llm.editable[layer]
    ((_, outputs),) = map(sizes, llm.blocks[layer].down.values())
    torch.manual_seed(0)
    change_B1O = torch.randn(4, 1, outputs)
    with llm.frozen(), torch.no_grad():
        rows = Suffixes(llm, [layer], ROWS)
        changed_NV = rows.run(change_B1O)
        expected_base = torch.cat([plain_logits(llm, row, {}) for row in ROWS])
        changes = [{layer: change_O} for (change_O,) in change_B1O]
        expected = torch.cat([plain_logits(llm, row, own) for row, own in zip(ROWS, changes, strict=True)])
    torch.testing.assert_close(rows.base_NV, expected_base, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changed_NV, expected, rtol=1e-4, atol=1e-4)
    assert (expected - expected_base).abs().max() > 1e-2, "the change must matter for this test to say anything"


def test_batches_answer_as_single_prompts_do(llm: LLM, requests: list[EditRequest]) -> None:
    prompts = [prompt for r in requests[:2] for prompt in (r.prompt, *r.rephrases)]
    alone = [generate(llm, [prompt], max_new_tokens=4)[0] for prompt in prompts]
    assert generate(llm, prompts, max_new_tokens=4) == alone
    assert len(set(alone)) > 1
    pairs = [(r.prompt, r.new_answer) for r in requests]
    with llm.frozen(), torch.no_grad():
        single = torch.cat([target_logits(llm.model, collate(llm.tokens.rows([pair]))) for pair in pairs])
        together = target_logits(llm.model, collate(llm.tokens.rows(pairs)))
    assert torch.equal(single.argmax(-1), together.argmax(-1))


@pytest.mark.parametrize(
    "method",
    ["finetune", "lora", "memit"]  # others solve for the same values as memit does
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("emmet", "rome", "alphaedit")],
)
def test_an_edit_changes_its_weights_alone_and_is_undone(
    llm: LLM, requests: list[EditRequest], method: str, statistics: StatisticsOptions
) -> None:
    base, expert = snapshot(llm), QUICK.get(method, LOCATE)
    layer = LAYER if method in QUICK or LAYER in parts_of(llm).heard else parts_of(llm).heard[0]
    options = EditOptions(method=method, layers=[layer], expert=expert, statistics=statistics)
    update = edit(llm, requests[:3], options=options)
    assert all(torch.equal(base[name], tensor) for name, tensor in llm.model.state_dict().items()), "edit restores"
    scope = "mlp" if method in ("finetune", "lora") else "down"
    assert list(update.tensors) == llm.blocks[layer].weight_names(scope)
    undo = update.apply(llm)
    edited = snapshot(llm)
    undo.apply(llm)
    changed = {name for name, tensor in edited.items() if not torch.equal(base[name], tensor)}
    assert changed == set(update.tensors)
    assert all(torch.equal(edited[name], tensor) for name, tensor in update.tensors.items())
    assert all(torch.equal(base[name], tensor) for name, tensor in llm.model.state_dict().items()), "undone"


@torch.no_grad()
def test_an_export_is_the_edited_model(llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    options = EditOptions(method="finetune", layers=[LAYER], expert=QUICK["finetune"] | {"whiten": 0, "sparing": 0})
    update = edit(llm, requests[:3], options=options)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    base = llm.model(input_ids=ids).logits
    with update.applied(llm):
        expected = llm.model(input_ids=ids).logits
    export_merged(llm, update, tmp_path)
    loaded = type(llm.model).from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-5 if llm.has_experts else 0)
    assert not torch.equal(base, expected)

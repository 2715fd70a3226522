"""An edit changes the golden layer only, is kept whole, and is applied and undone bit for bit."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny, mean_loss
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pipeline import UserError
from pipeline.attribution import GoldenProfile, find_golden_layer
from pipeline.editing import WeightUpdate, edit, export_adapter, export_merged
from pipeline.model import LLM
from pipeline.options import EditOptions, FinetuneOptions
from pipeline.requests import EditRequest

FEW = FinetuneOptions(epochs=30, batch_size=4, learning_rate=0.2, last_step=1.0, learnt=0.0, whiten=0.0)


def weights(llm: LLM) -> dict[str, Tensor]:
    """A copy of every tensor of the model, buffers included."""
    return {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}


@pytest.mark.parametrize("scope", ["mlp", "down"])
def test_only_the_golden_layer_changes_and_learns(tiny: LLM, requests: list[EditRequest], scope: str) -> None:
    base, before = weights(tiny), mean_loss(tiny, requests)
    options = EditOptions(method="finetune", layers=[2], finetune=FinetuneOptions(**{**vars(FEW), "scope": scope}))
    update = edit(tiny, requests, options=options)
    assert set(update.tensors) == set(tiny.blocks[2].weight_names(scope))
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(tiny).items()), "edit left its mark"
    with update.applied(tiny):
        edited = weights(tiny)
        assert mean_loss(tiny, requests) < 0.8 * before
    changed = {name for name in base if not torch.equal(base[name], edited[name])}
    assert set(update.tensors) <= changed
    # a tied head shares storage with no MLP weight, so nothing else may differ
    assert changed == set(update.tensors)


def test_undo_is_exact(tiny: LLM, requests: list[EditRequest]) -> None:
    base = weights(tiny)
    update = edit(tiny, requests, options=EditOptions(method="finetune", layers=[0, 3], finetune=FEW))
    undo = update.apply(tiny)
    undo.apply(tiny)
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(tiny).items())


def test_a_saved_update_gives_the_measured_model(tiny: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    update = edit(tiny, requests, options=EditOptions(method="finetune", layers=[1], finetune=FEW))
    update.save(tmp_path)
    loaded = WeightUpdate.load(tmp_path)
    assert (loaded.method, loaded.layers, loaded.requests) == ("finetune", [1], requests)
    with update.applied(tiny):
        measured = weights(tiny)
    with loaded.applied(tiny):
        assert all(torch.equal(tensor, measured[name]) for name, tensor in weights(tiny).items())


def test_the_same_seed_gives_the_same_edit(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    options = EditOptions(method="finetune", layers=[1], finetune=FEW)
    first, again, other = (edit(tiny_llm, requests, options=options, seed=seed).tensors for seed in (1, 1, 2))
    name = next(iter(first))
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_training_ends_when_every_loss_is_low(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    bare = FinetuneOptions(epochs=60, batch_size=7, learning_rate=0.1, contexts=0, kl=0, whiten=0.0)
    losses = []
    for learnt in (0.0, 4.2):
        options = EditOptions(method="finetune", layers=[1], finetune=replace(bare, learnt=learnt))
        with edit(tiny_llm, requests, options=options).applied(tiny_llm):
            losses.append([mean_loss(tiny_llm, [request]) for request in requests])
    to_the_end, when_learnt = losses
    assert sum(to_the_end) < sum(when_learnt)
    assert 4.0 < max(when_learnt) < 4.22, "the last request is learnt as well, and no further"


def test_a_loss_that_is_not_a_number_names_the_requests(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    base = weights(tiny_llm)
    wild = FinetuneOptions(epochs=5, batch_size=7, learning_rate=1e30, whiten=0.0)
    with pytest.raises(UserError, match=r"not a number.*capital-0"):
        edit(tiny_llm, requests, options=EditOptions(method="finetune", layers=[1], finetune=wild))
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(tiny_llm).items())
    assert not any(p.grad is not None for p in tiny_llm.model.parameters())


def test_the_profile_says_where(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    profile = find_golden_layer(tiny_llm, requests).model_copy(update={"golden_layers": [2]})
    assert edit(tiny_llm, requests, profile, EditOptions(method="finetune", finetune=FEW)).layers == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EditOptions(), "give --profile"),
        (EditOptions(layers=[4]), "4 is not a block of tiny-llama; it has 0 to 3"),
        (EditOptions(method="magic", layers=[0]), "'magic' does not exist.*finetune"),
    ],
)
def test_bad_choices(tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        edit(tiny_llm, requests, options=options)


def test_another_models_profile_and_update_are_refused(
    tiny_llm: LLM, tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest]
) -> None:
    other = make_tiny("llama", tokenizer, seed=1)
    profile: GoldenProfile = find_golden_layer(other, requests)
    with pytest.raises(UserError, match="profile: made for model"):
        edit(tiny_llm, requests, profile)
    update = edit(other, requests, options=EditOptions(method="finetune", layers=[0], finetune=FEW))
    with pytest.raises(UserError, match="update: made for model"):
        update.apply(tiny_llm)


def test_a_damaged_update_is_found(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    edit(tiny_llm, requests, options=EditOptions(method="finetune", layers=[0], finetune=FEW)).save(tmp_path)
    file = tmp_path / "update.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"update.safetensors: changed since it was written"):
        WeightUpdate.load(tmp_path)
    (tmp_path / "update.json").write_text(json.dumps({"model": "x"}))
    with pytest.raises(UserError, match="damaged"):
        WeightUpdate.load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"holds no update.safetensors"):
        WeightUpdate.load(tmp_path)


def test_an_export_is_a_plain_model(tiny: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    update = edit(tiny, requests, options=EditOptions(method="finetune", layers=[1], finetune=FEW))
    export_merged(tiny, update, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)(requests[0].prompt).input_ids])
    with update.applied(tiny), tiny.frozen(), torch.no_grad():
        assert torch.equal(plain(ids).logits, tiny.model(ids).logits)


def test_an_adapter_of_any_update_is_the_update(tiny: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    update = edit(tiny, requests, options=EditOptions(method="finetune", layers=[1], finetune=FEW))
    export_adapter(tiny, update, tmp_path)
    adapted = PeftModel.from_pretrained(deepcopy(tiny.model), tmp_path).eval()
    ids = torch.tensor([tiny.tokenizer(requests[0].prompt).input_ids])
    with tiny.frozen(), torch.no_grad():
        base = tiny.model(ids).logits
        with update.applied(tiny):
            edited = tiny.model(ids).logits
        torch.testing.assert_close(adapted(ids).logits, edited, rtol=1e-3, atol=2e-3)
    assert not torch.allclose(base, edited, atol=0.1)


def test_an_update_that_changes_nothing_is_no_adapter(tiny_llm: LLM, tmp_path: Path) -> None:
    nothing = WeightUpdate(tiny_llm.name, tiny_llm.fingerprint, "memit", [1], {})
    with pytest.raises(UserError, match="changes nothing"):
        export_adapter(tiny_llm, nothing, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()

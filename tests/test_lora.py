"""LoRA: a standard adapter at the golden layer alone, which plain PEFT loads, and the same change merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny, mean_loss, refusal
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from pipeline.editing.editor import edit
from pipeline.editing.export import export_adapter
from pipeline.editing.update import WeightUpdate
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.requests.schema import EditRequest

FEW = {"rank": 4, "epochs": 12, "batch_size": 4, "learning_rate": 0.05, "learnt": 0.0, "whiten": 0.0}


def lora(layers: list[int], **settings: Any) -> EditOptions:
    return EditOptions(method="lora", layers=layers, expert=FEW | settings)


@pytest.mark.parametrize("scope", ["mlp", "down"])
def test_plain_peft_loads_the_adapter(
    scope: str, tiny: LLM, tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest], tmp_path: Path
) -> None:
    base = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    before = mean_loss(tiny, requests)
    options = lora([1, 2], scope=scope, epochs=60)
    update = edit(tiny, requests, options=options)
    assert {n: t for n, t in tiny.model.state_dict().items() if not torch.equal(t, base[n])} == {}, "left its mark"
    assert list(tiny.model.state_dict()) == list(base), "no adapter stays in the model"
    update.save(tmp_path)
    plain = make_tiny(tiny.name.removeprefix("tiny-"), tokenizer).model
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    ids = torch.tensor([tokenizer(requests[0].prompt).input_ids])
    with WeightUpdate.load(tmp_path).applied(tiny), tiny.frozen(), torch.no_grad():
        assert mean_loss(tiny, requests) < 0.95 * before
        merged = tiny.model(ids).logits
        torch.testing.assert_close(adapted(ids).logits, merged, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), adapted.disable_adapter():
        assert (adapted(ids).logits - merged).abs().max() > 1e-2, "the adapter must matter for this to say anything"


def test_the_change_is_of_low_rank(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    base = {name: tensor.clone() for name, tensor in tiny_llm.model.state_dict().items()}
    update = edit(tiny_llm, requests, options=lora([1]))
    for name, tensor in update.tensors.items():
        singular = torch.linalg.svdvals(tensor - base[name])
        assert singular[3] > 1e-3 > singular[4], name


def test_an_adapter_on_an_adapter_is_exported_as_one(
    tiny: LLM, tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest], tmp_path: Path
) -> None:
    first = edit(tiny, requests[:3], options=lora([1]))
    both = edit(tiny, requests[3:], options=lora([1], rank=3), after=first)
    export_adapter(tiny, both, tmp_path / "adapter")
    plain = make_tiny(tiny.name.removeprefix("tiny-"), tokenizer).model
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    ids = torch.tensor([tokenizer(requests[0].prompt).input_ids])
    with both.applied(tiny), tiny.frozen(), torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, tiny.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_another_kind_of_edit_is_not_passed_off_as_the_whole(
    tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path
) -> None:
    first = edit(
        tiny_llm,
        requests[:3],
        options=EditOptions(method="finetune", layers=[1], expert={"whiten": 0.0, "sparing": 0.0}),
    )
    second = edit(tiny_llm, requests[3:], options=lora([1]), after=first)
    second.save(tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_bad_ranks(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    wide = lora([1], rank=33)
    assert "lora.rank: 33; expected 1 to 32" in refusal(lambda: edit(tiny_llm, requests, options=wide))

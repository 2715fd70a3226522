"""An edit changes the golden layer only, is kept whole, and is applied and undone bit for bit."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_options, make_tiny, mean_loss, refusal
from lightning.pytorch import Callback, Trainer
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pipeline.attribution.profile import GoldenProfile
from pipeline.editing.editor import METHODS, edit
from pipeline.editing.export import export_adapter, export_merged
from pipeline.editing.finetune import FineTune
from pipeline.editing.method import register, settings_of
from pipeline.editing.update import WeightUpdate
from pipeline.errors import UserError
from pipeline.model.llm import LLM
from pipeline.options.editing import NAMES, EditOptions
from pipeline.options.shared import TrainerOptions
from pipeline.requests.data import EditRequests
from pipeline.requests.schema import EditRequest

FEW = {"epochs": 6, "batch_size": 4, "learning_rate": 0.2, "last_step": 1.0, "learnt": 0.0}
FEW |= {"whiten": 0.0, "sparing": 0.0}  # and so no text is read


def finetune(layers: list[int], **settings: Any) -> EditOptions:
    return EditOptions(method="finetune", layers=layers, expert=FEW | settings)


def profile_of(llm: LLM, requests: list[EditRequest], layer: int) -> GoldenProfile:
    """A profile whose golden layer is this one."""
    blocks = list(range(len(llm.blocks)))
    return GoldenProfile(
        model=llm.name,
        fingerprint=llm.fingerprint,
        method="middle",
        scope="",
        scores=[0.0] * len(blocks),
        fences=None,
        excluded=[],
        ranking=blocks,
        raw_ranking=blocks,
        golden_layers=[layer],
        request_set="",
        requests=len(requests),
        seconds=0.0,
    )


def weights(llm: LLM) -> dict[str, Tensor]:
    """A copy of every tensor of the model, buffers included."""
    return {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}


@pytest.mark.parametrize("scope", ["mlp", "down"])
def test_only_the_golden_layer_changes_and_learns(
    tiny: LLM, requests: list[EditRequest], scope: str, tmp_path: Path
) -> None:
    base, before = weights(tiny), mean_loss(tiny, requests)
    options = edit_options(tmp_path, "finetune", 512, **FEW | {"scope": scope, "epochs": 60, "sparing": 0.15})
    options.layers = [2]
    update = edit(tiny, requests, options=options)
    assert set(update.tensors) == set(tiny.blocks[2].weight_names(scope))
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(tiny).items()), "edit left its mark"
    with update.applied(tiny):
        edited = weights(tiny)
        assert mean_loss(tiny, requests) < 0.85 * before
    changed = {name for name in base if not torch.equal(base[name], edited[name])}
    assert set(update.tensors) <= changed
    # a tied head shares storage with no MLP weight, so nothing else may differ
    assert changed == set(update.tensors)


def test_undo_is_exact(tiny: LLM, requests: list[EditRequest]) -> None:
    base = weights(tiny)
    update = edit(tiny, requests, options=finetune([0, 3]))
    undo = update.apply(tiny)
    undo.apply(tiny)
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(tiny).items())


def test_a_saved_update_gives_the_measured_model(tiny: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    update = edit(tiny, requests, options=finetune([1]))
    update.save(tmp_path)
    loaded = WeightUpdate.load(tmp_path)
    assert (loaded.method, loaded.layers, loaded.requests) == ("finetune", [1], requests)
    with update.applied(tiny):
        measured = weights(tiny)
    with loaded.applied(tiny):
        assert all(torch.equal(tensor, measured[name]) for name, tensor in weights(tiny).items())


def test_the_same_seed_gives_the_same_edit(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    options = finetune([1])
    first, again, other = (edit(tiny_llm, requests, options=options, seed=seed).tensors for seed in (1, 1, 2))
    name = next(iter(first))
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_training_ends_when_every_loss_is_low(
    tiny_llm: LLM, requests: list[EditRequest], few_lessons: None
) -> None:
    bare = {"epochs": 60, "batch_size": 7, "learning_rate": 0.1, "contexts": 0, "kl": 0}
    losses = []
    for learnt in (0.0, 4.2):
        options = finetune([1], **bare, learnt=learnt)
        with edit(tiny_llm, requests, options=options).applied(tiny_llm):
            losses.append([mean_loss(tiny_llm, [request], ended=True) for request in requests])
    to_the_end, when_learnt = losses
    assert sum(to_the_end) < sum(when_learnt)
    assert 4.0 < max(when_learnt) < 4.22, "the last request is learnt as well, and no further"


def test_a_loss_that_is_not_a_number_names_the_requests(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    base = weights(tiny_llm)
    wild = finetune([1], epochs=5, batch_size=7, learning_rate=1e30)
    with pytest.raises(UserError, match=r"not a number.*capital-0"):
        edit(tiny_llm, requests, options=wild)
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(tiny_llm).items())
    assert not any(p.grad is not None for p in tiny_llm.model.parameters())


def test_the_profile_says_where(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    profile = profile_of(tiny_llm, requests, 2)
    assert edit(tiny_llm, requests, profile, EditOptions(method="finetune", expert=FEW)).layers == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EditOptions(), "give a profile"),
        (EditOptions(layers=[4]), "4 is not a block of tiny-llama; it has 0 to 3"),
    ],
)
def test_bad_choices(tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        edit(tiny_llm, requests, options=options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "memt"}, "method: 'memt' does not exist.*'memit'"),
        ({"layers": 3}, "layers: expected a list of whole numbers.*found 3"),
        ({"statistics": "wiki.txt"}, "statistics: expected StatisticsOptions, found 'wiki.txt'"),
        ({"expert": [1]}, "expert: expected a mapping"),
    ],
)
def test_wrong_options_fail_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EditOptions(**given)


def test_a_registered_method_may_be_named() -> None:
    register("mine", object)  # type: ignore[arg-type]
    try:
        assert EditOptions(method="mine").method == "mine"
    finally:
        METHODS.pop("mine")
        NAMES.remove("mine")
    assert METHODS.keys() <= NAMES


def test_another_models_profile_and_update_are_refused(
    tiny_llm: LLM, tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest]
) -> None:
    other = make_tiny("llama", tokenizer, seed=1)
    profile = profile_of(other, requests, 2)
    with pytest.raises(UserError, match="profile: made for model"):
        edit(tiny_llm, requests, profile)
    update = edit(other, requests, options=finetune([0]))
    with pytest.raises(UserError, match="update: made for model"):
        update.apply(tiny_llm)


def test_a_damaged_update_is_found(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    edit(tiny_llm, requests, options=finetune([0])).save(tmp_path)
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
    update = edit(tiny, requests, options=finetune([1]))
    export_merged(tiny, update, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)(requests[0].prompt).input_ids])
    with update.applied(tiny), tiny.frozen(), torch.no_grad():
        assert torch.equal(plain(ids).logits, tiny.model(ids).logits)


def test_an_adapter_of_any_update_is_the_update(tiny: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    update = edit(tiny, requests, options=finetune([1]))
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


def test_training_in_ones_own_trainer(tiny_llm: LLM, requests: list[EditRequest], request_file: Path) -> None:
    """The module is an ordinary one: plain batches, any Trainer."""
    base, before = weights(tiny_llm), mean_loss(tiny_llm, requests)
    trainer = Trainer(
        max_epochs=3, accumulate_grad_batches=2, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(FineTune(tiny_llm, [1]), EditRequests(request_file, tiny_llm.tokenizer, batch_size=2))
    assert (trainer.current_epoch, trainer.global_step) == (3, 6)
    assert 0 < trainer.callback_metrics["edit/unlearnt"] <= 1
    changed = {name for name, tensor in weights(tiny_llm).items() if not torch.equal(tensor, base[name])}
    assert changed == set(tiny_llm.blocks[1].weight_names("mlp"))
    assert mean_loss(tiny_llm, requests) < before


class Seen(Callback):
    """What a user's own callback sees."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


def test_an_edit_in_ones_own_trainer(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    """Its callbacks see every stage, and a second edit in it begins anew."""
    few = FEW | {"epochs": 3, "kl": 0.5, "sparing": 0.15}
    options, seen = edit_options(tmp_path, "finetune", 512, **few), Seen()
    plain = edit(tiny_llm, requests, options=options)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[seen])
    for turn in (1, 2):
        own = edit(tiny_llm, requests, options=options, trainer=trainer)
        assert seen.steps == turn * 6
        for name, tensor in plain.tensors.items():
            torch.testing.assert_close(own.tensors[name], tensor)
    assert trainer.callbacks.count(seen) == 1


def test_micro_batches_make_the_same_steps(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    options = finetune([1], epochs=3, kl=0.5)
    whole = edit(tiny_llm, requests, options=options)
    parts = edit(tiny_llm, requests, options=options, trainer=TrainerOptions(micro_batch=1, accelerator="cpu"))
    for name, tensor in whole.tensors.items():
        base = tiny_llm.model.get_parameter(name).detach()
        assert (parts.tensors[name] - tensor).norm() < 1e-2 * (tensor - base).norm()


def test_a_kind_of_edit_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'memit' is registered already"):
        register("memit", METHODS["memit"].make)
    with pytest.raises(ValueError, match="'one step' is no identifier"):
        register("one step", METHODS["memit"].make)


@pytest.mark.parametrize(
    ("method", "expert", "line"),
    [
        (
            "memit",
            {"step_size": 1},
            "'step_size' is no setting of memit (did you mean steps?); there is batch_size",
        ),
        ("finetune", {"epochs": "many"}, "edit.expert.epochs: expected a whole number, found many"),
        ("finetune", {"epochs": True}, "edit.expert.epochs: expected a whole number, found True"),
        ("memit", {"bound": "far"}, "edit.expert.bound: expected a number, found far"),
        ("lora", {"rank": 0}, "edit.expert.rank: 0 is too small"),
    ],
)
def test_bad_settings(
    tiny_llm: LLM, requests: list[EditRequest], method: str, expert: dict[str, Any], line: str
) -> None:
    options = EditOptions(method=method, layers=[1], expert=expert)
    assert line in refusal(lambda: edit(tiny_llm, requests, options=options))


def test_a_setting_of_nothing_is_its_default() -> None:
    """So it stands in updates that were made when a default hung on the requests."""
    assert settings_of(EditOptions(method="memit", expert={"steps": None})) == settings_of(
        EditOptions(method="memit")
    )

"""An export holds the edit: an adapter of one rank, exact or the nearest of a lower rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.editing.editor import edit
from pipeline.editing.export import AdapterInfo, export_adapter
from pipeline.editing.update import WeightUpdate
from pipeline.errors import Note
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.requests.schema import EditRequest

DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"


@pytest.fixture
def update(tiny_llm: LLM) -> WeightUpdate:
    """A change of rank 6 in one projection, and of rank 2 in another."""
    torch.manual_seed(1)
    tensors = {}
    for name, rank in ((DOWN, 6), (UP, 2)):
        weight = tiny_llm.model.get_parameter(f"{name}.weight").detach()
        change = torch.randn(len(weight), rank) @ torch.randn(rank, weight.shape[1])
        tensors[f"{name}.weight"] = weight + 0.1 * change
    return WeightUpdate(tiny_llm.name, tiny_llm.fingerprint, "finetune", [1], tensors)


def change(llm: LLM, update: WeightUpdate, name: str) -> Tensor:
    return (update.tensors[f"{name}.weight"] - llm.model.get_parameter(f"{name}.weight")).detach()


def factors(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) of an adapter on the disk."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"]


def config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())  # type: ignore[no-any-return]


def test_an_adapter_has_one_rank_and_alpha_is_the_rank(tiny_llm: LLM, update: WeightUpdate, tmp_path: Path) -> None:
    assert export_adapter(tiny_llm, update, tmp_path) == AdapterInfo(6, 6, 0.0)
    written = config(tmp_path)
    assert (written["r"], written["lora_alpha"]) == (6, 6)
    assert not written["rank_pattern"] and not written["alpha_pattern"]
    for name in (DOWN, UP):
        A, B = factors(tmp_path, name)
        assert (A.shape[0], B.shape[1]) == (6, 6)
        torch.testing.assert_close(B @ A, change(tiny_llm, update, name), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_its_own_has_its_scale_in_the_factors(
    tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path
) -> None:
    how = {"epochs": 2, "rank": 3, "alpha": 7.5, "whiten": 0.0, "sparing": 0.0, "kl": 0.0}
    update = edit(tiny_llm, requests[:2], options=EditOptions(method="lora", layers=[1], expert=how))
    for folder, rank in ((tmp_path / "a", None), (tmp_path / "b", 3)):
        assert export_adapter(tiny_llm, update, folder, rank) == AdapterInfo(3, 3, 0.0)
        assert (config(folder)["r"], config(folder)["lora_alpha"]) == (3, 3)
        A, B = factors(folder, DOWN)
        torch.testing.assert_close(B @ A, change(tiny_llm, update, DOWN), rtol=1e-4, atol=1e-6)
    with pytest.warns(Note, match="rank 1 of 3 loses"):
        assert export_adapter(tiny_llm, update, tmp_path / "c", 1).rank == 1


@pytest.mark.parametrize("kept", [True, False])
def test_a_lower_rank_is_the_nearest_by_what_facts_send_in(
    kept: bool, tiny_llm: LLM, update: WeightUpdate, requests: list[EditRequest], tmp_path: Path
) -> None:
    """Against the plain way there: the singular value decomposition of the change times all keys as columns."""
    asked = replace(update, requests=requests if kept else [])
    with pytest.warns(Note, match="by what its facts send in" if kept else "in the plain norm"):
        info = export_adapter(tiny_llm, asked, tmp_path, 3)
    roots = {}
    for name in (DOWN, UP):
        module = tiny_llm.model.get_submodule(name)
        keys: list[Tensor] = [] if kept else [torch.eye(change(tiny_llm, update, name).shape[1])]
        with module.register_forward_hook(lambda _m, args, _o, keys=keys: keys.append(args[0][0].detach())):
            for row in tiny_llm.tokens.answered(asked.requests):  # the last token predicts nothing
                tiny_llm.model(input_ids=torch.tensor([row.token_ids[:-1]]))
        roots[name] = torch.cat(keys).T / sum(map(len, keys)) ** 0.5 if kept else keys[0]
    lost = whole = 0.0
    for name, root in roots.items():
        A, B = factors(tmp_path, name)
        exact = change(tiny_llm, update, name)
        values = torch.linalg.svdvals((exact @ root).double())
        lost, whole = lost + values[3:].square().sum().item(), whole + values.square().sum().item()
        left_out = ((exact - B @ A) @ root).double().square().sum().item()
        assert left_out == pytest.approx(values[3:].square().sum().item(), rel=1e-3, abs=1e-5 * whole)
    assert (info.rank, info.full_rank) == (3, 6)
    assert info.lost == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def test_a_rank_that_is_enough_loses_nothing(
    tiny_llm: LLM, update: WeightUpdate, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    assert export_adapter(tiny_llm, update, tmp_path, 8) == AdapterInfo(6, 6, 0.0)
    assert not [one for one in recwarn if one.category is Note]


def test_a_weight_that_did_not_change_is_not_in_the_adapter(
    tiny_llm: LLM, update: WeightUpdate, tmp_path: Path
) -> None:
    same = tiny_llm.model.get_parameter(f"{UP}.weight").detach().clone()
    export_adapter(tiny_llm, replace(update, tensors=update.tensors | {f"{UP}.weight": same}), tmp_path)
    assert config(tmp_path)["target_modules"] == [DOWN]

"""A fingerprint is of all that a model computes with, as its checkpoint holds it: no more, and no less."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_options, make_tiny, refusal
from safetensors.torch import load_file, save_file
from test_editing import profile_of
from transformers import PreTrainedTokenizerFast

from pipeline.editing.editor import edit
from pipeline.editing.export import export_merged
from pipeline.model import loading
from pipeline.model.fingerprints import fingerprint, sample
from pipeline.model.llm import LLM
from pipeline.model.loading import load_model
from pipeline.requests.schema import EditRequest


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a model, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def reconfigured(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def between_samples(tensors: dict[str, torch.Tensor]) -> None:
    """All values of the head but 1,024 evenly spaced ones."""
    head = tensors["lm_head.weight"].reshape(-1)
    keep = torch.zeros(len(head), dtype=torch.bool)
    keep[:: max(1, len(head) // 1024)] = True
    head[~keep] += 1


CHANGES: dict[str, Callable[[Path], Any]] = {
    "activation": lambda folder: reconfigured(folder, hidden_act="relu"),
    "norm": lambda folder: reconfigured(folder, rms_norm_eps=1e-2),
    "positions": lambda folder: reconfigured(folder, rope_parameters={"rope_type": "default", "rope_theta": 5.0}),
    "the head between samples": lambda folder: rewritten(folder, between_samples),
    "one value": lambda folder: rewritten(folder, lambda tensors: tensors["model.norm.weight"][3].add_(1e-6)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_cases_of_another_model(change: Callable[[Path], Any], folder: Path) -> None:
    before = load_model(str(folder)).fingerprint
    change(folder)
    assert load_model(str(folder)).fingerprint != before


SAME: dict[str, dict[str, Any]] = {
    "a version": {"transformers_version": "4.0.0"},
    "the cache of keys": {"use_cache": False},
    "initialisation": {"initializer_range": 0.5},
}


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
def test_cases_of_the_same_model(changes: dict[str, Any], folder: Path) -> None:
    before = load_model(str(folder)).fingerprint
    reconfigured(folder, **changes)
    assert load_model(str(folder)).fingerprint == before


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_cases_of_precisions(stored: torch.dtype, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A checkpoint has one fingerprint in whatever precision it is loaded, and the loaded objects too."""
    model = make_tiny("llama", tokenizer).model.to(stored)
    model.save_pretrained(folder)
    loaded = {dtype: load_model(str(folder), dtype) for dtype in (stored, torch.float64, torch.float32)}
    found = {llm.fingerprint for llm in loaded.values()}
    (folder.parent / "cache").rename(folder.parent / "old")
    narrow = [load_model(str(folder), dtype) for dtype in (torch.bfloat16, torch.float16)]
    assert {llm.fingerprint for llm in narrow} == found and len(found) == 1
    assert LLM(loaded[stored].model, tokenizer).fingerprint == found.pop()
    assert [llm.model.dtype for llm in narrow] == [torch.bfloat16, torch.float16]


def test_cases_of_profile_and_update_between_precisions(
    folder: Path, requests: list[EditRequest], tmp_path: Path
) -> None:
    """Found in one precision, edited in another, exported in a third."""
    wide, narrow = load_model(str(folder)), load_model(str(folder), torch.bfloat16)
    options = edit_options(tmp_path, "finetune", 512, epochs=1)
    options.layers = None
    update = edit(narrow, requests, profile_of(wide, requests, 2), options)
    export_merged(wide, update, tmp_path / "out")
    assert load_model(str(tmp_path / "out")).fingerprint not in (wide.fingerprint, narrow.fingerprint)
    with update.applied(wide):
        assert sample(wide.model) != wide.sample
    assert sample(wide.model) == wide.sample


def test_a_fingerprint_is_taken_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same files; size, time and inode tell."""
    taken: list[int] = []
    monkeypatch.setattr(loading, "tensors_digest", lambda model: taken.append(1) or "of all")
    for _ in range(3):
        load_model(str(folder))
    assert len(taken) == 1
    weights = folder / "model.safetensors"
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    load_model(str(folder))
    assert len(taken) == 2
    shutil.copy2(weights, folder / "copy")
    (folder / "copy").replace(weights)
    load_model(str(folder))
    assert len(taken) == 3, "another inode"


def test_cases_of_loaded_objects(tiny: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """They have one too, of config and all values."""
    again = LLM(tiny.model, tokenizer, "of another name")
    assert again.fingerprint == tiny.fingerprint == fingerprint(tiny.model)
    before = sample(tiny.model)
    with torch.no_grad():
        tiny.model.get_input_embeddings().weight.view(-1)[1] += 1
    assert fingerprint(tiny.model) != tiny.fingerprint and sample(tiny.model) != before


def test_cases_of_an_index_that_leaves_its_folder(folder: Path) -> None:
    (folder / "model.safetensors").replace(folder / "model-00001-of-00001.safetensors")
    file = folder / "model.safetensors.index.json"

    def refused(content: str) -> str:
        file.write_text(content)
        return refusal(lambda: load_model(str(folder)))

    for place in ("../model.safetensors", "/etc/passwd", "missing.safetensors", ".."):
        line = refused(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": place}}))
        assert f"names {place!r}; expected files of its own folder" in line and str(file) in line
    for content in ("{}", "[]", "[" * 20_000, '{"weight_map": 3}', "\x00"):
        assert "no index of weights" in refused(content)
    names = load_file(folder / "model-00001-of-00001.safetensors")
    file.write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")})
    )
    assert len(load_model(str(folder)).blocks) == 4

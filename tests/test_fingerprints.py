"""A fingerprint is of all that a model computes with, as its checkpoint holds it: no more, and no less."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
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


def tiny_gguf(file: Path, name: str = "tiny", change: float = 0.0, eps: float = 1e-5, context: int = 64) -> Path:
    """A Llama of random weights, one of which is changed."""
    chance, writer = np.random.default_rng(0), gguf.GGUFWriter(file, "llama")
    writer.add_name(name)
    writer.add_context_length(context)
    writer.add_embedding_length(32)
    writer.add_block_count(4)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(
        ["<end>", "ab", *(chr(place if 33 <= place < 127 else 256 + place) for place in range(254))]
    )
    writer.add_token_types([3] + [1] * 255)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    block = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    block |= {"attn_output": (32, 32), "ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    shapes = {"token_embd": (256, 32), "output_norm": (32,), "output": (256, 32)}
    shapes |= {f"blk.{number}.{part}": shape for number in range(4) for part, shape in block.items()}
    for part, shape in shapes.items():
        values = chance.standard_normal(shape).astype(np.float32)
        values.reshape(-1)[5] += change if part == "blk.2.ffn_down" else 0.0
        writer.add_tensor(f"{part}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_cases_of_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its content alone counts: not where it lies, what it calls itself, or the precision that it is loaded in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def found(dtype: torch.dtype = torch.float32, **made: Any) -> str:
        file = tiny_gguf(tmp_path / "model.gguf", **made)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{file.stat().st_mtime_ns}"))
        return load_model(str(file), dtype).fingerprint

    before = found()
    shutil.copy(tmp_path / "model.gguf", tmp_path / "copy.gguf")
    assert load_model(str(tmp_path / "copy.gguf")).fingerprint == before
    assert found(torch.bfloat16) == found(name="another name") == before
    assert len({before, found(change=1e-6), found(eps=1e-2)}) == 3

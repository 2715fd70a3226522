"""A model is loaded by any name that a user gives, or refused in one line that says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from conftest import make_tiny, refusal
from test_targets import ANSWERS, plain_logits
from transformers import (
    JetMoeConfig,
    PreTrainedTokenizerFast,
)

from pipeline.model.loading import load_model

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_folder_is_loaded_as_it_was_saved(tiny_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    loaded, saved = load_model(str(tiny_folder)), make_tiny("llama", tokenizer)
    assert loaded.name == str(tiny_folder) and len(loaded.blocks) == 4
    assert loaded.fingerprint == saved.fingerprint
    rows = saved.tokens.rows(ANSWERS)
    assert loaded.tokens.rows(ANSWERS) == rows
    assert all(
        torch.equal(a, b) for a, b in zip(plain_logits(loaded, rows), plain_logits(saved, rows), strict=True)
    )


def test_weights_are_loaded_in_the_dtype_asked_for(tiny_folder: Path) -> None:
    assert load_model(str(tiny_folder), torch.float64).model.dtype == torch.float64


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub refuses every connection, and whoever waits to ask it again fails."""
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waits for the hub"))


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("name", ["smollm9", "nobody/nothing", "no such: model?"])
def test_an_unknown_name_is_refused_at_once(
    name: str, offline: bool, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    message = refusal(lambda: load_model(name))
    assert message.startswith(f"model: {name!r} cannot be loaded") and "'smollm2'" in message
    assert ("Repo id" if " " in name else "(the hub cannot be reached") in message


def test_a_model_in_the_cache_needs_no_network(
    tiny_folder: Path, tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--somebody--tiny"
    shutil.copytree(tiny_folder, cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    assert load_model("somebody/tiny").fingerprint == load_model(str(tiny_folder)).fingerprint


@pytest.mark.parametrize("status", [200, 401, 404, 503])
def test_a_hub_that_answers_is_asked_for_the_model(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

    def from_pretrained(source: str, **_: Any) -> None:
        raise OSError(f"{source} was asked for")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        url = f"http://127.0.0.1:{server.server_port}/{{repo_id}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        Thread(target=server.handle_request, daemon=True).start()
        assert "(somebody/model was asked for)" in refusal(lambda: load_model("somebody/model"))


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "not/a/model"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.model.loading._reachable", lambda _: pytest.fail("asks the hub"))
    assert refusal(lambda: load_model(name)) == f"model: {name}: no such folder"


def test_a_file_that_is_no_gguf_is_refused(tiny_folder: Path) -> None:
    assert "a file; expected a folder" in refusal(lambda: load_model(str(tiny_folder / "model.safetensors")))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    message = refusal(lambda: load_model(str(tmp_path)))
    assert str(tmp_path) in message and "holds no config.json" in message


def test_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "missing.gguf")
    assert refusal(lambda: load_model(file)) == f"model: {file}: no such file"


def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    assert f"model: {str(file)!r} cannot be loaded" in refusal(lambda: load_model(str(file)))


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def reconfigure(**changes: Any) -> Callable[[Path], None]:
    """A change of the folder's config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def make_mixture(folder: Path) -> None:
    """Another family's config, and no weights: none are read before it is refused."""
    JetMoeConfig(**SMALL, num_key_value_heads=2, kv_channels=8, num_local_experts=4).save_pretrained(folder)
    (folder / "model.safetensors").unlink()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("token*")], "tokenizer"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "encoder-decoder": (reconfigure(model_type="t5"), "T5Config"),
    "quantised": (reconfigure(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised (gptq)"),
    "experts of its own": (make_mixture, "experts that are not run as the library runs them"),
    "cut weights": (cut_weights, "cannot be loaded"),
    "other sizes": (
        reconfigure(intermediate_size=64),
        "(32, 48); its config asks for (32, 64) (and so in 11 more)",
    ),
    "heads that do not fit": (reconfigure(num_attention_heads=5), "not a multiple of the number of attention"),
    "no heads": (reconfigure(num_key_value_heads=0), "no decoder can be made of its config (ZeroDivisionError"),
    "a padding token that is not there": (reconfigure(pad_token_id=5000), "Padding_idx must be within"),
    "a number that is none": (reconfigure(hidden_size="32"), "'hidden_size' expected int, got str"),
    "no such type": (reconfigure(dtype="float3"), "no attribute 'float3'"),
    "missing weights": (reconfigure(num_hidden_layers=5), "model.layers.4"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused(
    tiny_folder: Path, tmp_path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "damaged"))
    damage(folder)
    message = refusal(lambda: load_model(str(folder)))
    assert f"model: {str(folder)!r}" in message and words in message

"""A GGUF export is the edited model: read again here, and asked in a real llama.cpp server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import gguf
import numpy as np
import pytest
import torch
from conftest import refusal
from test_fingerprints import tiny_gguf

from pipeline.cli import main
from pipeline.editing.gguf_export import export_gguf, export_gguf_adapter
from pipeline.editing.update import WeightUpdate
from pipeline.errors import Note
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.model.loading import load_model
from pipeline.requests.answers import first_statement
from pipeline.requests.readers import load_requests
from pipeline.requests.schema import EditRequest

DOWN, UP, QUERY = (f"model.layers.2.{name}.weight" for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"))
LETTERS = "bcdefghijklm"
SERVER = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server") or ""


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return load_model(str(tiny_gguf(tmp_path / "tiny.gguf")))


def changed(llm: LLM, *names: str, layer: int = 2, size: float = 0.05) -> WeightUpdate:
    """Each of these weights changed by a product of two columns."""
    torch.manual_seed(0)
    tensors = {}
    for name in names:
        weight = llm.model.get_parameter(name).detach()
        tensors[name] = weight + size * torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
    return WeightUpdate(llm.name, llm.fingerprint, "finetune", [layer], tensors)


def test_a_gguf_file_holds_the_edit_and_all_else_as_it_was(llm: LLM, tmp_path: Path) -> None:
    update = changed(llm, DOWN, UP)
    export_gguf(llm, update, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.gguf"]
    again = load_model(str(tmp_path / "out" / "model.gguf"))
    with update.applied(llm):
        for name, tensor in llm.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor), name
    assert again.tokenizer("ab and more").input_ids == llm.tokenizer("ab and more").input_ids


def test_the_command_writes_it_with_a_card(llm: LLM, tmp_path: Path, elsewhere: Path) -> None:
    changed(llm, DOWN).save(tmp_path / "edit")
    given = ["export", "--model", llm.name, "--update", str(tmp_path / "edit"), "--output"]
    for kind, file in (("gguf", "model.gguf"), ("gguf-adapter", "adapter.gguf")):
        assert main([*given, kind, "--kind", kind]) == 0
        written = {one.name for one in (elsewhere / kind).iterdir()}
        assert written == {file, "README.md", "update.json", "options.yaml"}
        assert "llama-server" in (elsewhere / kind / "README.md").read_text()


def quantised(folder: Path) -> LLM:
    """The tiny model with its matrices in Q8_0, but for those in F32 whose rows the blocks of that do not fill."""
    source = gguf.GGUFReader(folder / "tiny.gguf")
    writer = gguf.GGUFWriter(folder / "small.gguf", "llama")
    for field in source.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in source.tensors:
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.data.shape[-1] == 32 and tensor.data.ndim == 2 else None
        data = gguf.quantize(tensor.data, kind) if kind else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_model(str(folder / "small.gguf"))


def test_quantised_weights_become_f16(llm: LLM, tmp_path: Path) -> None:
    small = quantised(tmp_path)
    update = changed(small, UP)
    export_gguf(small, update, tmp_path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.2.ffn_up.weight"] == kinds["token_embd.weight"] == "F16"
    assert kinds["blk.2.attn_norm.weight"] == kinds["blk.2.ffn_down.weight"] == "F32"
    again = load_model(str(tmp_path / "model.gguf"))
    with update.applied(small):
        for name, tensor in small.model.state_dict().items():
            torch.testing.assert_close(again.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_a_quantised_file(llm: LLM, tmp_path: Path, kind: str) -> None:
    """Matrices whose rows its blocks fill are quantised, the changed ones too; vectors and other rows are plain."""
    update = changed(llm, DOWN, UP)
    with pytest.warns(Note, match=f"4 of 39 tensors stay in F16: the blocks of {kind}"):
        export_gguf(llm, update, tmp_path / "out", kind)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.2.ffn_up.weight"] == kinds["blk.0.attn_q.weight"] == kind.upper()
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.2.ffn_down.weight"] == "F16" and kinds["blk.2.attn_norm.weight"] == "F32"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    again = load_model(tmp_path / "out" / "model.gguf")
    with update.applied(llm):
        for name, tensor in llm.model.state_dict().items():
            off = (again.model.state_dict()[name] - tensor).abs().max()
            assert off <= 2 / 2 ** int(kind[1]) * tensor.abs().max(), name
            assert (off > 0) == (tensor.ndim > 1), name


def test_what_a_file_keeps_in_f32_stays_so_when_it_is_quantised(llm: LLM, tmp_path: Path) -> None:
    """As a mixture's router does in the files that llama.cpp converts."""
    small = quantised(tmp_path)
    export_gguf(small, changed(small, UP), tmp_path, "q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.2.ffn_up.weight"] == "Q4_0" and kinds["blk.2.ffn_down.weight"] == "F32"


def spelling(file: Path) -> LLM:
    """A model that says one capital or another after each of twelve letters, by a hair, and ends its statement."""
    place, chance = {chr(number): 2 + number for number in range(127)}, np.random.default_rng(2)
    held = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tiny_gguf(file), "r+").tensors}
    for name, values in held.items():
        values *= 0.003 if "attn_output" in name or "ffn_down" in name else 1.0
    embedding, head = held["token_embd.weight"], held["output.weight"]
    held["output_norm.weight"][:] = 1.0
    head[place["\n"]] = embedding[place["N"]]
    for letter, other in zip(LETTERS, "NOPQRSTUVWXY", strict=True):
        embedding[[place[letter.upper()], place[other]]] = embedding[place["N"]]
        own, rival = embedding[place[letter]], chance.standard_normal(32)
        head[place[letter.upper()]] = own
        head[place[other]] = own + rival - rival @ own / (own @ own) * own  # so what the blocks add tells
    return load_model(file)


def test_facts_that_a_quantised_file_has_lost_are_named(
    tmp_path: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = spelling(tmp_path / "spelling.gguf")
    update, prompts = changed(llm, UP), [f"the letter {letter}" for letter in LETTERS]
    with update.applied(llm):
        answers = [first_statement(said) for said in generate(llm, prompts, 2)]
    update.requests = [
        EditRequest(id=letter, prompt=prompt, new_answer=answer)
        for letter, prompt, answer in zip(LETTERS, prompts, answers, strict=True)
    ]
    update.save(tmp_path / "edit")
    given = ["export", "--model", llm.name, "--update", str(tmp_path / "edit"), "--kind", "gguf", "--quantise"]
    assert main([*given, "q4_0", "--output", "small"]) == 0
    told = capsys.readouterr().out
    said = [first_statement(one) for one in generate(load_model(elsewhere / "small" / "model.gguf"), prompts, 2)]
    lost = [n for n, (before, now) in enumerate(zip(answers, said, strict=True)) if before != now]
    assert 0 < len(lost) < 6, "so many are all shown"
    counts = f"facts that the file gives: {12 - len(lost)} of 12 (12 of 12 before quantising)"
    named = [f"does not hold: {LETTERS[n]}: {prompts[n]} -> {said[n]!r}" for n in lost]
    assert [line for line in told.splitlines() if "of 12" in line or "hold" in line] == [counts, *named]
    assert f"Quantised to q4_0 after the figures were measured; {counts}." in Path("small/README.md").read_text()
    monkeypatch.setattr("pipeline.evaluation.survival.MOST_FACTS", 3)
    assert main([*given, "q8_0", "--output", "part"]) == 0
    assert "of 3 (3 of 3 before quantising; 3 of 12 facts were asked)" in capsys.readouterr().out


def test_without_facts_nothing_is_said_of_them(
    llm: LLM, tmp_path: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(llm, UP).save(tmp_path / "edit")
    given = ["export", "--model", llm.name, "--update", str(tmp_path / "edit"), "--output", "out"]
    assert main([*given, "--kind", "gguf", "--quantise", "q5_0"]) == 0
    assert "facts" not in capsys.readouterr().out
    assert load_model(elsewhere / "out" / "model.gguf").fingerprint != llm.fingerprint


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "--kind gguf --quantise q4_k_m",
            "quantise: 'q4_k_m' does not exist (did you mean 'q4_1'?); there is q4_0, q4_1, q5_0, q5_1, q8_0",
        ),
        ("--quantise q4_0", "quantise: q4_0: --kind merged is not quantised; give --kind gguf"),
    ],
)
def test_cases_of_a_wrong_quantise(refused: Callable[..., str], words: str, line: str, tmp_path: Path) -> None:
    assert line in refused("export", "--update", str(tmp_path), "--output", "out", *words.split())
    assert not Path("out").exists()


def test_a_gguf_adapter_is_the_change(llm: LLM, tmp_path: Path) -> None:
    update = changed(llm, DOWN, UP)
    info = export_gguf_adapter(llm, update, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["adapter.gguf"]
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert (said["general.type"], said["general.architecture"], said["adapter.type"]) == (
        "adapter",
        "llama",
        "lora",
    )
    assert said["adapter.lora.alpha"] == info.rank == 2
    held = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    for ours, theirs in ((DOWN, "ffn_down"), (UP, "ffn_up")):
        product = held[f"blk.2.{theirs}.weight.lora_b"] @ held[f"blk.2.{theirs}.weight.lora_a"]
        torch.testing.assert_close(
            product, update.tensors[ours] - llm.model.get_parameter(ours), rtol=1e-3, atol=1e-5
        )


def test_cases_of_what_gguf_cannot_hold(llm: LLM, tiny_llm: LLM, tmp_path: Path) -> None:
    of_attention = changed(llm, QUERY)
    for export in (export_gguf, export_gguf_adapter):
        line = refusal(lambda export=export: export(llm, of_attention, tmp_path / "out"))
        assert QUERY in line and "expected an MLP's weight" in line
    of_folder = changed(tiny_llm, "model.layers.1.mlp.down_proj.weight", layer=1)
    line = refusal(lambda: export_gguf(tiny_llm, of_folder, tmp_path / "out"))
    assert "is of no GGUF file" in line and "convert_hf_to_gguf.py" in line and "--kind merged" in line
    tiny_gguf(tmp_path / "tiny.gguf", change=1.0)  # another file by now
    assert "holds model.layers.2.mlp.down_proj" in refusal(lambda: export_gguf(llm, changed(llm, DOWN), tmp_path))
    assert not (tmp_path / "model.gguf").exists()


@contextmanager
def llama_server(*words: str) -> Iterator[str]:
    """A llama.cpp server's address, while it runs."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [SERVER, "--host", "127.0.0.1", "--port", str(port), "-t", "1", "-c", "512", "-np", "1", *words]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                assert server.poll() is None, "the server stopped"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def completed(url: str, prompt: str) -> str:
    """The greedy answer of 16 tokens."""
    body: dict[str, Any] = {"prompt": prompt, "n_predict": 16, "temperature": 0, "cache_prompt": False}
    asked = Request(f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(asked, timeout=60) as answer:
        return str(json.load(answer)["content"])


@pytest.mark.serving
@pytest.mark.skipif(not SERVER, reason="no llama-server on the PATH or in LLAMA_SERVER")
def test_llama_cpp_answers_as_the_edited_model_does(tmp_path: Path) -> None:
    """A model and an adapter on the base, in F16, give the texts that float32 gives; see docs/export.md."""
    llm = load_model("smollm2")
    update = changed(llm, "model.layers.12.mlp.down_proj.weight", layer=12, size=0.02)
    prompts = [request.prompt for request in load_requests("demo", 50)]
    base = generate(llm, prompts, max_new_tokens=16)
    with update.applied(llm):
        edited = generate(llm, prompts, max_new_tokens=16)
    assert sum(one == other for one, other in zip(base, edited, strict=True)) < 40
    export_gguf(llm, update, tmp_path / "edited")
    export_gguf(llm, WeightUpdate(llm.name, llm.fingerprint, "finetune", [12], {}), tmp_path / "base")
    export_gguf_adapter(llm, update, tmp_path / "adapter")
    adapted = ["-m", f"{tmp_path}/base/model.gguf", "--lora", f"{tmp_path}/adapter/adapter.gguf"]
    for words in (["-m", f"{tmp_path}/edited/model.gguf"], adapted):
        with llama_server(*words) as url:
            answers = [completed(url, prompt) for prompt in prompts]
        same = sum(one.strip() == other.strip() for one, other in zip(answers, edited, strict=True))
        assert same >= 45, same

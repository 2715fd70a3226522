"""What is kept in the cache folder is believed only as far as its own seal goes, and is never in the way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny, refusal
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.editing.editor import edit
from pipeline.editing.statistics import key_moments
from pipeline.errors import Note
from pipeline.files import write_sealed
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.requests.schema import EditRequest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "golden-layers"


@pytest.fixture
def statistics(text_file: Path) -> StatisticsOptions:
    return StatisticsOptions(text=str(text_file), tokens=512)


def moments(llm: LLM, layers: list[int], statistics: StatisticsOptions) -> list[Tensor]:
    """Moments of the keys of some blocks' down-projections."""
    names = [name for layer in layers for name in llm.blocks[layer].down]
    found = key_moments(llm, names, statistics)
    return [found[name] for name in names]


def planted(moment_II: Tensor) -> bytes:
    return save({"moment": moment_II})


WRONG: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a bit": (lambda whole: whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "damaged"),
    "a bit of its seal": (lambda whole: whole.replace(b"float32", b"float16", 1), "damaged"),
    "cut": (lambda whole: whole[:-100], "damaged"),
    "no seal": (lambda whole: whole.partition(b"\n")[2], "damaged"),
    "deep": (lambda _: b"[" * 20_000 + b"\n", "damaged"),
    "empty": (lambda _: b"", "damaged"),
}
PLANTED: dict[str, tuple[bytes, str]] = {  # with a seal that holds
    "negative": (planted(-torch.eye(48)), "not positive"),
    "indefinite": (planted(torch.ones(48, 48) - 0.5 * torch.eye(48)), "not positive"),
    "nothing": (planted(torch.zeros(48, 48)), "not positive"),
    "not symmetric": (planted(torch.eye(48) + torch.eye(48).roll(1)), "not symmetric"),
    "nan": (planted(torch.full((48, 48), torch.nan)), "not finite"),
    "3 by 3": (planted(torch.eye(3)), "of shape (3, 3)"),
    "in bf16": (planted(torch.eye(48).bfloat16()), "torch.bfloat16"),
    "another name": (save({"other": torch.eye(48)}), "no statistics"),
    "no tensors": (b"nothing", "no statistics"),
}


@pytest.mark.parametrize(("damage", "words"), WRONG.values(), ids=WRONG)
def test_cases_of_damaged_statistics(
    damage: Callable[[bytes], bytes], words: str, tiny_llm: LLM, statistics: StatisticsOptions, cache: Path
) -> None:
    """Told of in a line that names the file, and found anew."""
    (first,) = moments(tiny_llm, [1], statistics)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with pytest.warns(Note, match=f"{file}.*{words}"):
        assert torch.equal(moments(tiny_llm, [1], statistics)[0], first)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(("content", "words"), PLANTED.values(), ids=PLANTED)
def test_cases_of_planted_statistics(
    content: bytes, words: str, tiny_llm: LLM, statistics: StatisticsOptions, cache: Path
) -> None:
    (first,) = moments(tiny_llm, [1], statistics)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    about = {name: value for name, value in json.loads(whole.partition(b"\n")[0]).items() if name != "sha256"}
    write_sealed(file, about, content)
    with pytest.warns(Note, match=re.escape(words)):
        assert torch.equal(moments(tiny_llm, [1], statistics)[0], first)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("other", ["model", "projection", "precision", "text"])
def test_cases_of_statistics_of_something_else(
    other: str, tiny_llm: LLM, tokenizer: PreTrainedTokenizerFast, statistics: StatisticsOptions, cache: Path
) -> None:
    """A file of another model, projection, precision or text under a name that is looked for."""
    (first,) = moments(tiny_llm, [1], statistics)
    (file,) = cache.iterdir()
    llm, layer, how = tiny_llm, 1, statistics
    if other == "model":
        llm = make_tiny("llama", tokenizer, seed=1)
    if other == "projection":
        layer = 2
    if other == "precision":
        llm = LLM(make_tiny("llama", tokenizer).model.bfloat16(), tokenizer, fingerprint=tiny_llm.fingerprint)
    if other == "text":
        how = StatisticsOptions(text=statistics.text, tokens=256)
    moments(llm, [layer], how)
    (another,) = {*cache.iterdir()} - {file}
    another.replace(file)
    with pytest.warns(Note, match="of something else"):
        assert torch.equal(moments(tiny_llm, [1], statistics)[0], first)


def test_cases_of_broken_statistics_of_a_model(tiny_llm: LLM, statistics: StatisticsOptions, cache: Path) -> None:
    with torch.no_grad():
        tiny_llm.model.get_parameter("model.layers.1.mlp.up_proj.weight").fill_(torch.inf)
    assert "are not finite" in refusal(lambda: moments(tiny_llm, [1], statistics))
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize("home", ["", "relative", "a file", "not writable"])
def test_cases_of_a_cache_folder_that_is_none(
    home: str, tiny_llm: LLM, statistics: StatisticsOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written into the working folder; what cannot be kept is told, and found nevertheless."""
    (first,) = moments(tiny_llm, [1], statistics)
    (tmp_path / "a file").touch()
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    named = {"a file": str(tmp_path / "a file"), "not writable": "/proc/none"}.get(home, home)
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    with pytest.warns(Note, match="cannot be used") if named[:1] == "/" else nullcontext():
        assert torch.equal(moments(tiny_llm, [1], statistics)[0], first)
    assert not list(working.iterdir())
    assert (tmp_path / "home" / ".cache" / "golden-layers").is_dir() == (named[:1] != "/")


@pytest.mark.parametrize("named", [True, False])
def test_cases_of_a_user_without_home(
    named: bool, tiny_llm: LLM, statistics: StatisticsOptions, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    if not named:
        monkeypatch.delenv("XDG_CACHE_HOME")
    with nullcontext() if named else pytest.warns(Note, match="XDG_CACHE_HOME can name a folder"):
        assert len(moments(tiny_llm, [1], statistics)) == 1
    assert cache.is_dir() == named


def test_statistics_are_of_the_model_before_any_edit(
    tiny_llm: LLM,
    requests: list[EditRequest],
    statistics: StatisticsOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever an edit goes on from, and whatever it does before it looks at them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    large = {"steps": 5, "step": 1.0, "bound": 20.0, "strength": 0.01}
    options = EditOptions(layers=[1], method="memit", statistics=statistics, expert=large)
    first = edit(tiny_llm, requests[:2], options=options)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    options = replace(options, method="auto", expert=large | {"depths": [0.7], "tuning": {"epochs": 1}})
    second = edit(tiny_llm, requests[2:], options=options, after=first)
    read = {file.name: file.read_bytes() for file in (tmp_path / "second" / "golden-layers").glob("moment-*")}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    names = [name.removesuffix(".weight") for name in second.tensors]
    key_moments(tiny_llm, names, statistics)
    fresh = {file.name: file.read_bytes() for file in (tmp_path / "third" / "golden-layers").glob("moment-*")}
    assert len(fresh) > 3 and fresh == {name: read[name] for name in fresh}

"""What the project brings for its bundled model: its own text, and key statistics that an edit finds ready."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import bundled as making
from pipeline.editing import bundled, statistics
from pipeline.editing.bundled import bundled_moment, bundled_text, write_bundled
from pipeline.editing.editor import METHODS
from pipeline.editing.ordinary_text import ordinary_text
from pipeline.editing.statistics import give_moments, key_moments, slope_moments
from pipeline.errors import Note
from pipeline.model.llm import LLM
from pipeline.model.loading import load_model
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.running.trainer import Runtime

WANTED = [(method, 3) for method in ("auto", "memit", "finetune")]


def no_pass(*_: object, **__: object) -> None:
    raise AssertionError("texts were run")


def test_moments_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "FILE", tmp_path / "kept.safetensors")
    with pytest.warns(Note, match="No such file"):
        assert bundled_text("a", 10) is bundled_moment("one") is None
    keys_NI = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 40)
    keys_NI[:, 7] = 0
    moment_II = keys_NI.T @ keys_NI / len(keys_NI)
    write_bundled(bundled.FILE, "a", 100, ["It is."], {"one": moment_II})
    found_II = bundled_moment("one")
    assert found_II is not None and torch.equal(found_II, found_II.T)
    scale_I = moment_II.diagonal().clamp(min=1e-12).sqrt()
    assert ((found_II - moment_II) / scale_I / scale_I[:, None]).abs().max() < 2e-3
    assert torch.linalg.eigvalsh(found_II.double()).min() > 0
    assert bundled_text("a", 100) == ["It is."]
    assert bundled_text("a", 101) is bundled_text("b", 100) is bundled_moment("two") is None


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"\x08" + 15 * b"\0"])
def test_a_damaged_file_brings_nothing(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "FILE", tmp_path / "kept.safetensors")
    bundled.FILE.write_bytes(content)
    with pytest.warns(Note, match=r"kept.safetensors: cannot be read .*; what it brings is made anew"):
        assert bundled_text("a", 10) is bundled_moment("one") is None


def test_another_models_are_made_alike(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.safetensors"
    making.main([str(file), "--model", str(tiny_folder), "--layer", "1", "--tokens", "2048"])
    assert "statistics, " in capsys.readouterr().out
    monkeypatch.setattr(bundled, "FILE", file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    llm, options = load_model(str(tiny_folder)), StatisticsOptions(tokens=2048)
    names = METHODS["memit"].make(llm, [1], EditOptions(method="memit")).moments_of  # type: ignore[attr-defined]
    assert len(ordinary_text(llm, options, Runtime())) > 8
    for moments in (key_moments, slope_moments):
        with monkeypatch.context() as patched:
            patched.setattr(statistics, "run", no_pass)
            kept = moments(llm, names, options)
        with monkeypatch.context() as patched:
            patched.setattr(statistics, "bundled_moment", lambda _: None)
            found = moments(llm, names, options)
        for name in names:
            assert (kept[name] - found[name]).norm() < 1e-3 * found[name].norm()


@pytest.mark.real_model
@pytest.mark.parametrize(("method", "layer"), WANTED)
def test_the_bundled_models_first_edit_starts_at_once(
    method: str, layer: int, smollm2: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(statistics, "run", no_pass)
    give_moments(
        METHODS[method].make(smollm2, [layer], EditOptions(method=method)), smollm2, StatisticsOptions(), Runtime()
    )
    assert sum(map(len, ordinary_text(smollm2, StatisticsOptions(), Runtime()))) >= 34_000
    assert not [*tmp_path.rglob("moment*")]


@pytest.mark.slow
@pytest.mark.real_model
def test_the_bundled_statistics_are_those_of_the_bundled_text(
    smollm2: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (name,) = METHODS["memit"].make(smollm2, [3], EditOptions(method="memit")).moments_of  # type: ignore[attr-defined]
    kept = key_moments(smollm2, [name], StatisticsOptions())[name]
    monkeypatch.setattr(statistics, "bundled_moment", lambda _: None)
    found = key_moments(smollm2, [name], StatisticsOptions())[name]
    assert (kept - found).norm() < 1e-3 * found.norm()

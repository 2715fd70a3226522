"""What `pip install .` brings: a wheel with all that a command reads; `--config` finds shipped ones anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import refusal

from pipeline import __version__, shipped
from pipeline.cli import main
from pipeline.shipped import find_config, program, shipped_configs

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-W", "ignore"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel of a clean copy of the project was unpacked into."""
    clean, place = tmp_path_factory.mktemp("clean"), tmp_path_factory.mktemp("installed")
    for name in ("pipeline", "configs"):
        shutil.copytree(ROOT / name, clean / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "run.py"):
        shutil.copy(ROOT / name, clean)
    build = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    subprocess.run([*PYTHON, "-c", build, str(place)], cwd=clean, check=True, capture_output=True, timeout=120)
    (wheel,) = place.glob("*.whl")
    assert wheel.name == f"golden_layers-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(place)
    wheel.unlink()
    return place


def test_the_wheel_holds_every_file_of_the_project(installed: Path) -> None:
    there = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    code = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "pipeline").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    configs = {f"pipeline/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    assert {name for name in there if not name.startswith("golden_layers-")} == code | configs
    (points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "golden-layers = pipeline.cli:main" in points.read_text()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--version"], [f"golden-layers {__version__} (Python 3.", "torch ", "lightning ", "transformers "]),
        (["--print_config"], ["order: magnitude", "proxy_fraction: 0.9"]),  # those of default.yaml
        (["run", "--config", "debug", "--print_config"], ["steps: 15", "limit: 16"]),
        (["requests"], ["160"]),  # the demo's
    ],
    ids=" ".join,
)
def test_the_wheel_works_from_any_folder(
    words: list[str], parts: list[str], installed: Path, tmp_path: Path
) -> None:
    start = "import sys; sys.argv[0] = '/bin/golden-layers'; from pipeline.cli import main; sys.exit(main())"
    told = subprocess.run(
        [*PYTHON, "-c", start, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode == 0, told.stderr
    assert [part for part in parts if part not in told.stdout] == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("named", ["memit", "memit.yaml", "configs/memit.yaml", "configs/memit"])
def test_a_shipped_config_is_found_from_any_folder(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert yaml.safe_load(find_config(named).read_text())["edit"] == {"method": "memit"}


def test_a_config_of_the_users_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memit.yaml").write_text("limit: 3")
    assert find_config("memit.yaml").read_text() == "limit: 3"
    (tmp_path / "lora").mkdir()  # a folder of that name hides nothing
    assert find_config("lora") == shipped_configs()["lora"]


@pytest.mark.parametrize(
    ("named", "parts"),
    [
        ("mimit.yaml", ["no such file", "did you mean memit?"]),
        ("../memit.yaml", ["no such file"]),
        ("elsewhere/memit.yaml", ["no such file"]),
        (".", ["is no plain file"]),
    ],
)
def test_a_config_that_is_not_there(
    named: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(lambda: find_config(named))
    assert [part for part in [f"config: {named}", *parts, *shipped_configs()] if part not in line] == []


@pytest.mark.parametrize(
    ("started", "shown"),
    [("/bin/golden-layers", "golden-layers"), ("run.py", "python run.py"), ("-c", "python run.py")],
)
def test_help_names_the_program_as_it_was_started(
    started: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shipped.sys, "argv", [started])
    assert program() == shown
    assert main(["--help"]) == 0
    assert f"usage: {shown} [COMMAND]" in capsys.readouterr().out

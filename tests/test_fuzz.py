"""Five hundred damaged folders, caches, profiles and databases: a line says so, or nothing is changed by it.

pytest -n 0 -m slow tests/test_fuzz.py
"""

from __future__ import annotations

import gc
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from plain_loop import TEXT
from teams import Team

from pipeline.attribution.profile import GoldenProfile
from pipeline.cli import main, user_line
from pipeline.editing.editor import choose_layers, edit
from pipeline.editing.statistics import key_moments
from pipeline.editing.update import Described, WeightUpdate
from pipeline.errors import Note, UserError, terminal_text
from pipeline.evaluation.evaluator import evaluate
from pipeline.model.fingerprints import sample
from pipeline.model.llm import LLM
from pipeline.model.loading import load_model
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.options.shared import EvaluationOptions
from pipeline.requests.schema import EditRequest
from pipeline.updates import version_folder

pytestmark = pytest.mark.slow

STRANGE = [
    0,
    -1,
    1e308,
    2**70,
    "",
    "\x1b[2J",
    "../../etc/passwd",
    None,
    [],
    {},
    True,
    [[[[]]]],
    "model.norm.weight",
]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file's bytes with one thing wrong: bits, a cut, a piece gone, doubled, moved, or of nothing."""
    at, length = rng.randrange(len(content)), rng.randrange(1, 1 + len(content) // 4)
    piece = content[at : at + length]
    return rng.choice(
        [
            lambda: content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
            lambda: content[:at],
            lambda: content[:at] + content[at + length :],
            lambda: content[:at] + piece + content[at:],
            lambda: content[:at] + bytes(len(piece)) + content[at + length :],
            lambda: content[:at] + rng.randbytes(len(piece)) + content[at + length :],
            lambda: b"",
            lambda: b"[" * 20_000,
        ]
    )()


def strange(value: Any, rng: random.Random) -> Any:
    """JSON in which one value is another, or gone."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        keys = [*value] if isinstance(value, dict) else [*range(len(value))]
        key = rng.choice(keys)
        changed: Any = dict(value) if isinstance(value, dict) else list(value)
        if rng.random() < 0.1:
            del changed[key]
        else:
            changed[key] = strange(value[key], rng)
        return changed
    return rng.choice(STRANGE)


def told(call: Callable[[], Any]) -> str | None:
    """The line with which a call ends; None where it does not."""
    try:
        call()
    except UserError as error:
        line = terminal_text(user_line(error) or "")
        assert line.isprintable() and 0 < len(line) < 3000
        return line
    return None


@pytest.fixture
def team(
    tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Team]:
    """A store of two versions, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "team").mkdir()
    made = Team(tiny_llm, tmp_path / "team")
    for part in (requests[:2], requests[2:4]):
        made.submit(part)
        made.update()
    yield made


@pytest.mark.parametrize("seed", range(4))
def test_update_folders(seed: int, team: Team, requests: list[EditRequest], tmp_path: Path) -> None:
    """What is not exactly what was written is refused; what is sealed anew reaches no foreign weight."""
    llm, whole = team.llm, version_folder(team.store.folder, 2)
    expected, base = WeightUpdate.load(whole), sample(llm.model)
    refused = 0
    for number in range(50):
        rng = random.Random(f"{seed} {number}")
        copy = tmp_path / f"{seed}-{number}"
        folder = Path(shutil.copytree(whole, copy / "versions" / "0002"))
        shutil.copytree(team.store.folder / "learnt", copy / "learnt")
        sealed = number % 2 == 0
        if sealed:
            file = folder / "update.json"
            said = strange(json.loads(file.read_text()), rng)
            with suppress(ValueError, TypeError, KeyError):
                said["sha256"]["update.json"] = Described.model_validate(said).digest
            file.write_text(json.dumps(said))
        else:
            learnt = [str(path) for path in sorted((copy / "learnt").iterdir())]
            file = folder / rng.choice(["update.json", "update.safetensors", "state.safetensors", *learnt])
            file.write_bytes(damaged(file.read_bytes(), rng))

        def use(folder: Path = folder, sealed: bool = sealed) -> None:
            update = WeightUpdate.load(folder)
            if not sealed:
                assert repr(update) == repr(expected), "silent"
            with update.applied(llm):
                pass
            edit(llm, requests[4:5], None, team.options.edit, after=update, trainer=team.options.trainer)

        refused += told(use) is not None
        assert sample(llm.model) == base
        shutil.rmtree(copy)
    assert refused > 25


@pytest.mark.parametrize("kind", ["moment", "base", "text", "fingerprint"])
def test_caches(
    kind: str, tiny_folder: Path, requests: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found is always the same, and a file that is not what was written is told of."""
    cache = tmp_path / "cache" / "golden-layers"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    text = str(tmp_path / "text.txt")
    llm = load_model(str(tiny_folder))
    (name,) = llm.blocks[1].down
    finds: dict[str, Callable[[], Any]] = {
        "moment": lambda: key_moments(llm, [name], StatisticsOptions(text=text, tokens=512))[name].tolist(),
        "text": lambda: key_moments(llm, [name], StatisticsOptions(tokens=2048))[name].tolist(),
        "base": lambda: evaluate(llm, requests[:2], None, EvaluationOptions(text=text, max_new_tokens=2)).before,
        "fingerprint": lambda: load_model(str(tiny_folder)).fingerprint,
    }
    expected = finds[kind]()
    for number in range(30):
        rng = random.Random(f"{kind} {number}")
        there = [one for one in cache.rglob("*") if one.is_file() and str(one.relative_to(cache)).startswith(kind)]
        file = rng.choice(sorted(there))
        whole = file.read_bytes()
        content = damaged(whole, rng)
        if kind == "text":  # else what was made of it is found
            for moment in cache.glob("moment-*"):
                moment.unlink()
        file.write_bytes(content)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            assert finds[kind]() == expected
        assert content == whole or [
            note for note in notes if note.category is Note and file.name in str(note.message)
        ]
    assert finds[kind]() == expected


def test_profiles(team: Team, tmp_path: Path) -> None:
    """A profile is one of blocks that have scores, or it is refused; what it names is checked against the model."""
    profile = GoldenProfile.load(version_folder(team.store.folder, 2))
    file, refused = profile.save(tmp_path), 0
    whole = file.read_bytes()
    for number in range(80):
        rng = random.Random(f"profile {number}")
        if number % 2:
            file.write_bytes(damaged(whole, rng))
        else:
            file.write_text(json.dumps(strange(json.loads(whole), rng)))

        def use() -> None:
            found = GoldenProfile.load(file)
            assert found.certainty is not None
            for layer in choose_layers(team.llm, found, EditOptions()):
                assert 0 <= layer < len(team.llm.blocks)

        refused += told(use) is not None
    assert refused > 40


def test_databases(
    team: Team, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands on a damaged database end in a line, or do what they do; `verify` tells of a changed version."""
    team.store.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    team.store.close()
    monkeypatch.setattr("pipeline.updates.disk.PATIENCE", 1)
    for number in range(100):
        rng = random.Random(f"database {number}")
        store = Path(shutil.copytree(team.store.folder, tmp_path / str(number), symlinks=True))
        for beside in store.glob("store.db-*"):
            beside.unlink()
        file = store / "store.db"
        file.write_bytes(damaged(file.read_bytes(), rng))
        for words in (
            ["history"],
            ["show", "--version", "2"],
            ["verify"],
            ["submit", str(team.folder / "in.jsonl")],
        ):
            gc.collect()  # a command's own process would have let go of the database
            code = main([*words, "--store", str(store)])
            out = capsys.readouterr()
            assert "Traceback" not in out.err
            assert code == 0 or out.err.splitlines()[-1].startswith("error: ")
        shutil.rmtree(store)

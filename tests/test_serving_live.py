"""Versions on disk and in a live model: checked before they are loaded, swapped in place, seen whole."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_tiny, refusal
from teams import Team
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.model.fingerprints import fingerprint
from pipeline.model.generation import QuestionBatch, Saying, generate
from pipeline.options.shared import TrainerOptions
from pipeline.requests.schema import EditRequest
from pipeline.serving import LiveModel
from pipeline.updates import Store, load_version, rollback, verify, version_folder
from pipeline.updates.disk import DATABASE, LAYOUT, connect, learnt_file


@pytest.fixture
def team(two_versions: Team) -> Iterator[Team]:
    yield two_versions
    rollback(two_versions.store, 2)


def test_the_live_model_follows(team: Team, tokenizer: PreTrainedTokenizerFast) -> None:
    serving = make_tiny("llama", tokenizer)
    base = fingerprint(serving.model)
    live = LiveModel(team.store.folder, serving)
    for version in (2, 1, 0, 2):
        rollback(team.store, version)
        assert live.follow() == live.version == version
        for name, tensor in (team.weights(version) if version else {}).items():
            assert torch.equal(serving.model.get_parameter(name), tensor)
        assert (fingerprint(serving.model) == base) == (version == 0)
    texts, version = live.generate(["The capital of Spain is"], max_new_tokens=2)
    assert (len(texts), version) == (1, 2)


def test_a_generation_sees_one_version(
    team: Team, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveModel(team.store.folder, make_tiny("llama", tokenizer))
    name = next(iter(team.weights(2)))
    seen: list[bool] = []

    def slow(stage: Saying, batch: QuestionBatch) -> list[str]:
        weight = live.llm.model.get_parameter(name)
        before = weight.detach().clone()
        rollback(team.store, 1)
        threads.append(threading.Thread(target=live.follow))
        threads[0].start()
        time.sleep(0.2)
        seen.append(torch.equal(before, weight))
        return ["said"]

    threads: list[threading.Thread] = []
    monkeypatch.setattr(Saying, "step", slow)
    assert live.generate(["The capital of Spain is"]) == (["said"], 2)
    threads[0].join(timeout=10)
    assert seen == [True], "swapped under a generation"
    assert live.version == 1


def test_a_swap_that_fails_leaves_what_was_there(
    team: Team, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollback(team.store, 1)
    live = LiveModel(team.store.folder, make_tiny("llama", tokenizer))
    before = fingerprint(live.llm.model)
    rollback(team.store, 2)

    def failing(weight: Tensor, tensor: Tensor) -> None:
        weight[: len(weight) // 2] = 0
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("pipeline.editing.update.put", failing)
        live.follow()
    assert fingerprint(live.llm.model) == before and live.version == 1
    assert live.follow() == 2
    rollback(team.store, 0)
    assert live.follow() == 0 and fingerprint(live.llm.model) == live.llm.fingerprint


def test_versions_of_different_layers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """What one version changes and the next one does not is the base's own again."""
    made = Team(make_tiny("llama", tokenizer), tmp_path)
    for layer, country in enumerate(("Spain", "Norway")):
        made.options.edit.layers = [layer]
        made.options.edit.expert["spread"] = 1
        made.submit([EditRequest(id=country, prompt=f"{country} is", subject=country, new_answer="Lima")])
        made.update()
        rollback(made.store, 0)
    serving = make_tiny("llama", tokenizer)
    base = {name: weight.clone() for name, weight in serving.model.state_dict().items()}
    live = LiveModel(made.store.folder, serving)
    for version in (1, 2, 1, 0, 2, 0):
        rollback(made.store, version)
        live.follow()
        expected = base | (made.weights(version) if version else {})
        assert all(torch.equal(weight, expected[name]) for name, weight in serving.model.state_dict().items())
    assert live.swaps == 6 and len(made.weights(1).keys() ^ made.weights(2).keys()) == 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_live_model_needs_no_trainer(
    precision: str,
    team: Team,
    tokenizer: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says what `generate` says, without a Trainer, a word of one, or a move of the model."""
    options = TrainerOptions(accelerator="cpu", precision=precision)
    live = LiveModel(team.store.folder, make_tiny("llama", tokenizer), options)
    prompts = ["The capital of Spain is", "Peru", "Oslo is"]
    expected = generate(live.llm, prompts, 8, trainer=options)
    capfd.readouterr()
    monkeypatch.setattr("pipeline.running.trainer.Trainer", None)
    live.llm.model.train()
    assert live.generate(prompts, 8, batch_size=2) == (expected, 2)
    assert live.generate([], 8) == ([], 2)
    assert live.llm.model.training
    assert capfd.readouterr() == ("", "")


def test_another_base_is_refused(team: Team, tokenizer: PreTrainedTokenizerFast) -> None:
    other = make_tiny("llama", tokenizer, seed=1)
    assert "made for model 'tiny-llama'" in refusal(lambda: LiveModel(team.store.folder, other))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_changed_byte_is_found_before_it_is_loaded(team: Team, tokenizer: PreTrainedTokenizerFast) -> None:
    """In every file of a version, and of what it goes on from; the live model, which reads weights alone, stays."""
    rollback(team.store, 1)
    live = LiveModel(team.store.folder, make_tiny("llama", tokenizer))
    rollback(team.store, 2)
    folder = version_folder(team.store.folder, 2)
    there = files(folder)
    assert there == [
        "golden_profile.json", "metrics.json", "state.safetensors", "update.json", "update.safetensors",
    ]  # fmt: skip
    learnt = [learnt_file(team.store.folder, number) for number in (1, 2)]
    for file in [*(folder / name for name in there), *learnt]:
        whole = file.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 7)):
            broken = bytearray(whole)
            broken[place] ^= 1
            file.write_bytes(broken)
            assert file.name in refusal(lambda: load_version(team.store, 2))
            assert file not in learnt or file.name in dict(verify(team.store))[2]
            if file.name == "update.safetensors":
                assert file.name in refusal(live.follow)
                assert live.version == 1
        file.write_bytes(whole)
    assert live.follow() == 2


def test_verify_names_what_is_wrong(team: Team) -> None:
    assert list(verify(team.store)) == [(0, ""), (1, ""), (2, "")]
    file = version_folder(team.store.folder, 1) / "state.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    problems = dict(verify(team.store))
    assert "state.safetensors: changed since it was written" in problems[1]
    assert not problems[0] and not problems[2]
    assert "state.safetensors" in refusal(lambda: rollback(team.store, 1)), "not gone back to"
    file.write_bytes(whole)
    strange = version_folder(team.store.folder, 1) / "extra.bin"
    strange.touch()
    assert "extra.bin: not of this version" in dict(verify(team.store))[1]
    strange.unlink()


@pytest.mark.parametrize("target", ["../../elsewhere", "/tmp", "versions/../x", "versions/1", "versions/0001/.."])
def test_a_link_out_of_the_store(target: str, team: Team, tokenizer: PreTrainedTokenizerFast) -> None:
    link = team.store.folder / "current"
    link.unlink()
    link.symlink_to(target)
    serving = make_tiny("llama", tokenizer)
    assert "expected a version of this store" in refusal(lambda: LiveModel(team.store.folder, serving))
    Store(team.store.folder).close()
    assert link.readlink() == Path("versions/0002"), "opening the store mends it"


def test_a_server_needs_no_right_to_write(team: Team, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Nothing but the link and the version's folder is read."""
    folder = tmp_path / "mounted"
    (folder / "versions").mkdir(parents=True)
    (folder / "versions" / "0002").symlink_to(version_folder(team.store.folder, 2))
    (folder / "current").symlink_to("versions/0002")
    assert LiveModel(folder, make_tiny("llama", tokenizer)).version == 2


# stores that are none


def test_what_is_no_store(tmp_path: Path, team: Team) -> None:
    file, other, empty = tmp_path / "file", tmp_path / "other", tmp_path / "new"
    file.touch()
    other.mkdir()
    (other / "thesis.txt").touch()
    assert "a file; expected a store's folder" in refusal(lambda: Store(file))
    assert "no store: it holds other things" in refusal(lambda: Store(other, "m", make=True))
    assert "no such store" in refusal(lambda: Store(empty))
    assert "name the model that it is for" in refusal(lambda: Store(empty, make=True))
    assert not empty.exists()
    (other / DATABASE).write_bytes(b"no database at all, but long enough to be looked at" * 99)
    assert "cannot be read as a store's database" in refusal(lambda: Store(other))
    (other / DATABASE).unlink()
    foreign = __import__("sqlite3").connect(other / DATABASE)
    foreign.execute("CREATE TABLE songs (name)")
    foreign.commit()
    assert "a database of another program" in refusal(lambda: Store(other))


def test_a_store_of_another_layout(tmp_path: Path) -> None:
    with Store(tmp_path / "store", "m", make=True) as store:
        store.database.execute(f"PRAGMA user_version = {LAYOUT + 1}")
    line = refusal(lambda: Store(tmp_path / "store"))
    assert f"layout {LAYOUT + 1}; this program knows layout {LAYOUT}" in line


def test_a_store_whose_making_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    (folder / "versions" / ".0000.partial").mkdir(parents=True)
    connect(folder / DATABASE).close()
    with Store(folder, "m", make=True) as store:
        assert (store.model, store.current) == ("m", 0)


def test_what_is_submitted_is_never_code(team: Team, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Texts that would break out of a statement are texts."""
    (tmp_path / "own").mkdir()
    own = Team(make_tiny("llama", tokenizer), tmp_path / "own")
    evil = "'); DROP TABLE requests; --"
    request = EditRequest(id=evil, prompt=f"{evil} is", subject=evil, new_answer=evil, source=evil)
    own.submit([request], source=evil)
    assert own.retract(evil).version is None
    assert own.states() == ["retracted"]
    described = json.loads(own.store.database.execute("SELECT content FROM requests").fetchone()[0])
    assert described["new_answer"] == evil

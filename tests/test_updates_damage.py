"""What is damaged, foreign or half done in a store is told, or mended; never believed, and never a traceback."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny, refusal
from teams import Team, write
from transformers import PreTrainedTokenizerFast

from pipeline.attribution.profile import PROFILE_FILE
from pipeline.cli import main
from pipeline.editing.update import WeightUpdate
from pipeline.errors import Note, UserError
from pipeline.model.fingerprints import fingerprint
from pipeline.model.llm import LLM
from pipeline.requests.schema import EditRequest
from pipeline.running.sharding import put
from pipeline.serving import LiveModel
from pipeline.updates import Store, load_version, prune, rollback, story, verify, version_folder
from pipeline.updates.disk import DATABASE, transaction
from pipeline.updates.history import events, request_row
from pipeline.updates.queue import take


@pytest.fixture
def team(two_versions: Team) -> Iterator[Team]:
    yield two_versions
    rollback(two_versions.store, 2)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def bare(folder: Path) -> sqlite3.Connection:
    """A store's database, as somebody without this program opens it."""
    return sqlite3.connect(folder / DATABASE, isolation_level=None)


@pytest.mark.parametrize(("place", "what"), [(3, "a letter"), (40, "another"), (-3, "a sign")])
def test_cases_of_a_bit_in_a_requests_text(
    place: int, what: str, tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path
) -> None:
    """It is not edited, and told; the same file mends it."""
    team = Team(tiny_llm, tmp_path)
    team.submit(requests[:3])
    raw = bare(team.store.folder)
    (content,) = raw.execute("SELECT content FROM requests WHERE number = 2").fetchone()
    changed = bytearray(content.encode())
    changed[place] ^= 1
    raw.execute("UPDATE requests SET content = ? WHERE number = 2", (changed.decode(errors="replace"),))
    line = "request: #2: changed in store.db since it was submitted (its digest differs)"
    assert line in refusal(lambda: list(verify(team.store)))
    assert line in refusal(lambda: request_row(team.store, 2))
    with pytest.warns(Note, match=re.escape(line)):
        assert len(team.update()[0].applied) == 2
    assert team.states() == ["applied", "held back", "applied"]
    assert line in story(team.store, 2)[-1][1]
    team.submit(requests[:3], again=True)
    assert request_row(team.store, 2)["new_answer"] == requests[1].new_answer
    assert len(team.update()[0].applied) == 1


@pytest.mark.parametrize(
    "text",
    [b"c-Norway", b"The capital of Egypt", b"superseded", b"metrics.json", b"applied in", b"published version 2"],
)
def test_cases_of_a_bit_wherever_a_text_stands(text: bytes, team: Team, tmp_path: Path) -> None:
    """In a table, in an index, in what SQLite knows of the tables: `verify` sees it."""
    copy, whole = tmp_path / "store", tmp_path / "whole.db"
    shutil.copytree(team.store.folder, copy, symlinks=True)
    for name in ("-wal", "-shm"):
        (copy / f"{DATABASE}{name}").unlink(missing_ok=True)
    team.store.database.execute("VACUUM INTO ?", (str(whole),))
    content, place = whole.read_bytes(), -1
    rows = [one for one in range(len(content)) if content.startswith(text, one)]
    assert rows
    for place in rows:
        broken = bytearray(content)
        broken[place + 2] ^= 1
        (copy / DATABASE).write_bytes(broken)
        assert main(["verify", "--store", str(copy)]) == 1, place


def test_cases_of_a_bit_wherever_a_number_stands(team: Team, tmp_path: Path) -> None:
    """What a version was made on, when, with what: whatever one bit changes in the tables, `verify` sees it."""
    copy, chance, seen = tmp_path / "store", random.Random(0), 0
    shutil.copytree(team.store.folder, copy, symlinks=True)
    for name in ("", "-wal", "-shm"):
        (copy / f"{DATABASE}{name}").unlink(missing_ok=True)
    team.store.database.execute("VACUUM INTO ?", (str(copy / DATABASE),))
    whole, content = (copy / DATABASE).read_bytes(), held_in(copy)
    places = [place for place, byte in enumerate(whole) if byte]
    for _ in range(500):
        broken = bytearray(whole)
        broken[chance.choice(places)] ^= 1 << chance.randrange(8)
        (copy / DATABASE).write_bytes(broken)
        try:
            with Store(copy, reading=True) as store:
                sound = not any(problem for _, problem in verify(store))
        except (UserError, sqlite3.DatabaseError):
            sound = False
        seen += not sound
        assert not sound or held_in(copy) == content
    assert seen > 250


def held_in(folder: Path) -> list[Any]:
    """All rows of a store's tables."""
    with closing(bare(folder)) as raw:
        tables = ("about", "versions", "requests", "changes", "events")
        return [raw.execute(f"SELECT * FROM {table}").fetchall() for table in tables]


@pytest.mark.parametrize("name", ["learnt/0001.safetensors", "versions/0001/metrics.json", "versions/0001/more"])
def test_cases_of_a_pipe_in_place_of_a_file(name: str, team: Team, tmp_path: Path) -> None:
    """It is told, and not waited for."""
    copy = tmp_path / "store"
    shutil.copytree(team.store.folder, copy, symlinks=True)
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    with Store(copy, reading=True) as store:
        assert str(copy / name) in dict(verify(store))[1]


@pytest.mark.parametrize("size", [0, 10, 4096])
def test_cases_of_a_database_that_was_cut_off(size: int, team: Team, tmp_path: Path) -> None:
    """No store without a model's name comes of it, whatever is beside it."""
    copy = tmp_path / "store"
    shutil.copytree(team.store.folder, copy, symlinks=True)
    for name in ("-wal", "-shm"):
        (copy / f"{DATABASE}{name}").unlink(missing_ok=True)
    with (copy / DATABASE).open("r+b") as file:
        file.truncate(size)
    for how in ({}, {"reading": True}):
        assert str(copy) in refusal(lambda how=how: Store(copy, **how))
    assert main(["history", "--store", str(copy)]) == 1


def test_cases_of_a_store_of_an_earlier_program(team: Team, tmp_path: Path) -> None:
    """With a profile that is no link: read as it is, mended by a write."""
    copy = tmp_path / "store"
    shutil.copytree(team.store.folder, copy)  # links become what they lead to
    shutil.rmtree(copy / "current")
    (copy / "current").symlink_to("versions/0002")
    with Store(copy, reading=True) as store:
        assert dict(verify(store)) == {0: "", 1: "", 2: ""}
    with Store(copy) as store:
        assert (copy / PROFILE_FILE).is_symlink()
        assert dict(verify(store)) == {0: "", 1: "", 2: ""}


def test_cases_of_a_changed_profile(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    team = Team(tiny_llm, tmp_path)
    team.submit(requests[:2])
    team.update()
    file = team.store.folder / PROFILE_FILE
    assert file.is_symlink() and list(verify(team.store)) == [(0, ""), (1, "")]
    content = file.read_text()
    team.submit(requests[2:3])
    for changed in (content.replace("1", "2", 1), "", content + " "):
        file.unlink()
        file.write_text(changed)
        for team.options.dry_run in (True, False):
            assert f"{file}: changed (SHA-256 differs)" in refusal(team.update)
        for work in (lambda: list(verify(team.store)), lambda: team.retract("#1")):
            assert f"{file}: changed (SHA-256 differs)" in refusal(work)
    assert team.states()[2] == "queued"
    file.unlink()
    assert len(team.update()[0].applied) == 1
    assert file.read_text() == content


def test_cases_of_a_newest_version_that_is_lost(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    """After going back the store is of use again: what is pruned needs no profile, and an update takes another."""
    team = Team(tiny_llm, tmp_path)
    for part in (requests[:2], requests[2:4]):
        team.submit(part)
        team.update()
    shutil.rmtree(version_folder(team.store.folder, 2))
    rollback(team.store, 1)
    team.submit(requests[4:5])
    assert "`update --profile` takes another" in refusal(team.update)
    assert prune(team.store) == []
    team.options.profile = str(version_folder(team.store.folder, 1))
    assert team.update()[0].version == 3
    assert {number for number, problem in verify(team.store) if problem} == {2}
    team.options.profile = None
    team.submit(requests[5:6])
    assert team.update()[0].version == 4


def test_cases_of_a_link_to_what_is_not_known(team: Team, tmp_path: Path) -> None:
    """Whole as the version is, the database that was put back never heard of it."""
    copy = tmp_path / "store"
    shutil.copytree(team.store.folder, copy, symlinks=True)
    (copy / "versions" / "0002").rename(copy / "versions" / "0007")
    for target in ("versions/0007", "versions/0009", "learnt", "current"):
        (copy / "current").unlink()
        (copy / "current").symlink_to(target)
        with Store(copy, reading=True) as store:
            assert "current: leads to no version" in refusal(lambda store=store: list(verify(store)))
    assert "holds no update.json" in refusal(lambda: WeightUpdate.load(copy / "current"))  # which leads to itself


@pytest.mark.parametrize("times", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_cases_of_a_damaged_database(times: int, team: Team, requests: list[EditRequest], tmp_path: Path) -> None:
    """One line, whatever bits: never a traceback, nor a version that is not what it was."""
    copy, whole = tmp_path / "store", tmp_path / "whole.db"
    shutil.copytree(team.store.folder, copy, symlinks=True)
    team.store.database.execute("VACUUM INTO ?", (str(whole),))
    file = write(tmp_path / "more.jsonl", requests[6:])
    commands = [["history"], ["show", "2"], ["diff", "1", "2"], ["verify"], ["history", "--request", "c-Spain"]]
    commands += [["submit", str(file)], ["rollback", "1"]]
    chance, refusals = random.Random(times), 0
    for _ in range(times):
        broken = bytearray(whole.read_bytes())
        for _ in range(chance.choice((1, 8, 200))):
            broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
        for name in ("-wal", "-shm"):
            (copy / f"{DATABASE}{name}").unlink(missing_ok=True)
        (copy / DATABASE).write_bytes(broken)
        refusals += sum(main([*command, "--store", str(copy)]) for command in commands)
        with suppress(UserError, sqlite3.Error), Store(copy) as store, store.updating():
            take(store, 9)
    assert refusals > times
    assert files_of(copy / "versions" / "0002") == files_of(version_folder(team.store.folder, 2))


def test_cases_of_reading_what_cannot_be_written(team: Team, tmp_path: Path) -> None:
    """No lock, no log, no link: a disk that is mounted read-only serves every command that reads."""
    copy = tmp_path / "mounted"
    (copy / "versions").mkdir(parents=True)
    team.store.database.execute("VACUUM INTO ?", (str(copy / DATABASE),))
    for name in ("0000", "0001", "0002"):
        shutil.copytree(version_folder(team.store.folder, int(name)), copy / "versions" / name)
    shutil.copytree(team.store.folder / "learnt", copy / "learnt")
    (copy / "current").symlink_to("versions/0001")  # behind, as after a kill
    (copy / PROFILE_FILE).symlink_to("versions/0002/golden_profile.json")
    before = looks_of(copy)
    with Store(copy, reading=True) as store:
        assert store.current == 2 and list(verify(store)) == [(0, ""), (1, ""), (2, "")]
        with pytest.raises(UserError, match="readonly"), transaction(store.database) as database:
            database.execute("DELETE FROM about")
    for command in (["history"], ["show", "2"], ["diff", "1", "2"], ["verify"]):
        assert main([*command, "--store", str(copy)]) == 0
    assert looks_of(copy) == before


def looks_of(folder: Path) -> dict[Path, int]:
    """When what is in a folder was written, but for what SQLite puts beside a database where it can."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if "store.db-" not in path.name}


def test_cases_of_versions_that_the_database_does_not_know(
    tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path
) -> None:
    """An older database is put back: what it does not know is kept, told, and its number not given again."""
    team = Team(tiny_llm, tmp_path)
    team.submit(requests[:2])
    team.update()
    older = tmp_path / "older.db"
    team.store.database.execute("VACUUM INTO ?", (str(older),))
    for part in (requests[2:3], requests[3:4]):
        team.submit(part)
        team.update()
    kept = {number: files_of(version_folder(team.store.folder, number)) for number in (2, 3)}
    team.store.close()
    for name in ("-wal", "-shm"):
        (team.store.folder / f"{DATABASE}{name}").unlink(missing_ok=True)
    older.replace(team.store.folder / DATABASE)
    (version_folder(team.store.folder, 7)).mkdir()  # nothing in it: what an update was writing
    team.store = Store(team.store.folder)
    team.submit(requests[4:5])
    with pytest.warns(Note) as notes:
        assert team.update()[0].version == 4
    told = [str(one.message) for one in notes if "is whole" in str(one.message)]
    for number, content in kept.items():
        assert files_of(team.store.folder / "lost+found" / f"{number:04d}") == content
        assert f"version {number:04d} is whole, but store.db does not know it" in told[number - 2]
    assert not version_folder(team.store.folder, 7).exists()
    assert any("lost+found/0003" in what for _, what in events(team.store, 9))
    assert [number for number, _ in verify(team.store)] == [0, 1, 4]


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("version", [1, 0])
def test_cases_of_an_error_in_the_middle_of_a_swap(
    at: int, version: int, team: Team, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is at the version it says, whatever copy failed."""
    rollback(team.store, 2)
    live = LiveModel(team.store.folder, make_tiny("llama", tokenizer))
    before, calls = fingerprint(live.llm.model), []
    rollback(team.store, version)

    def fail(weight: Any, tensor: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            weight.zero_()
            raise KeyboardInterrupt
        put(weight, tensor)

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.editing.update.put", fail)
        if at == 1:  # of the one tensor that versions change here
            with pytest.raises(KeyboardInterrupt):
                live.follow()
            assert (live.version, fingerprint(live.llm.model)) == (2, before)
    assert live.follow() == version
    rollback(team.store, 2)
    assert live.follow() == 2 and fingerprint(live.llm.model) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_cases_of_weights_that_are_no_numbers(
    value: float, team: Team, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never served, be it that only this model's precision cannot hold them."""
    rollback(team.store, 1)
    serving = make_tiny("llama", tokenizer)
    live = LiveModel(team.store.folder, serving)
    serving.model.half()
    before = fingerprint(serving.model)
    rollback(team.store, 2)
    bad = load_version(team.store, 2)
    next(iter(bad.tensors.values()))[0, 0] = value
    monkeypatch.setattr("pipeline.serving.live.WeightUpdate.load", lambda *_, **__: bad)
    monkeypatch.setattr(LLM, "check_made_for", lambda *_: None)
    assert "finite" in refusal(live.follow)
    assert (live.version, fingerprint(serving.model)) == (1, before)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_cases_of_a_disk_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", none)
    line = refusal(lambda: Store(tmp_path / "store", "m", make=True))
    assert "this disk cannot lock files" in line and "opening.lock" in line


@pytest.mark.parametrize(("asked", "expected"), [(None, 0o700), (0o750, 0o750), (0o755, 0o755)])
def test_cases_of_who_may_read(
    asked: int | None, expected: int, tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path
) -> None:
    """The owner alone, unless the store's folder lets others in."""
    team = Team(tiny_llm, tmp_path)
    if asked:
        team.store.folder.chmod(asked)
    team.submit(requests[:1])
    team.update()
    folder = team.store.folder
    assert folder.stat().st_mode & 0o777 == expected
    for path in version_folder(folder, 1).rglob("*"):
        assert path.stat().st_mode & 0o777 == expected & (0o777 if path.is_dir() else 0o666)
    for name in (DATABASE, f"{DATABASE}-wal", "opening.lock"):
        assert (folder / name).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("closed", [["stdout"], ["stdout", "stderr"], ["stdin", "stdout", "stderr"]])
def test_cases_of_streams_that_are_closed(closed: list[str], team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `>&-` does: the command is done, and says so to nobody."""
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    assert main(["history", "--store", str(team.store.folder)]) == 0
    assert main(["history", "--store", str(team.store.folder / "none")]) == 1


@pytest.mark.parametrize("command", [["history"], ["verify"], ["update"]])
def test_cases_of_a_working_folder_that_is_gone(
    command: list[str], refused: Callable[..., str], team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "the working folder is gone" in refused(*command, "--store", str(team.store.folder))

"""Output folders: what fails, fills the disk or is interrupted leaves nothing half-written, and resumes."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commanding import FINETUNE, PROFILE_FILES, RUN_FINETUNE, names_in
from programs import RUN, Program, ran, small_files, wait_for
from test_cli import one_line

from pipeline import commands
from pipeline.attribution.profile import GoldenProfile
from pipeline.cli import main
from pipeline.editing.finetune import FineTune
from pipeline.editing.update import WeightUpdate
from pipeline.reporting.run_log import RunLog
from pipeline.running.interrupts import Interrupted

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_an_output_folder_that_holds_something(
    asked: list[str], elsewhere: Path, refused: Callable[..., str]
) -> None:
    (elsewhere / "out").mkdir()
    (elsewhere / "out" / "thesis.txt").write_text("years of work")
    assert "out" in (line := refused("attribute", *asked, "--output", "out")) and "--overwrite" in line
    assert "not written by" in refused("attribute", *asked, "--output", "out", "--overwrite")


def test_overwrite_replaces_what_we_wrote(asked: list[str], elsewhere: Path) -> None:
    assert main(["attribute", *asked, "--output", "out", "--limit", "3"]) == 0
    (elsewhere / "out" / "leftover").touch()
    assert main(["attribute", *asked, "--output", "out", "--overwrite"]) == 0
    assert GoldenProfile.load(elsewhere / "out").requests == 7
    assert names_in(elsewhere / "out") == PROFILE_FILES
    assert [path.name for path in elsewhere.iterdir()] == ["out"]


@pytest.mark.parametrize("failure", [["--top_k", "9"], ["--model", "./nothing"], ["--requests", "nothing"]])
def test_a_failed_overwrite_leaves_the_old_content(
    failure: list[str], asked: list[str], refused: Callable[..., str]
) -> None:
    assert main(["attribute", *asked, "--output", "out"]) == 0
    refused("attribute", *asked, *failure, "--output", "out", "--overwrite")


def test_an_output_path_that_is_a_file(asked: list[str], elsewhere: Path, refused: Callable[..., str]) -> None:
    (elsewhere / "file").write_text("x")
    assert "file" in refused("attribute", *asked, "--output", "file")
    assert "file" in refused("attribute", *asked, "--output", "file", "--overwrite")


def test_an_output_path_below_a_file(asked: list[str], elsewhere: Path, refused: Callable[..., str]) -> None:
    (elsewhere / "file").write_text("x")
    assert "file" in refused("attribute", *asked, "--output", "file/out")


def test_parents_made_for_an_output_folder_go_with_it(asked: list[str], refused: Callable[..., str]) -> None:
    refused("attribute", *asked, "--output", "new/deep/out", "--top_k", "9")


def test_an_empty_output_folder_stays(asked: list[str], elsewhere: Path, refused: Callable[..., str]) -> None:
    (elsewhere / "out").mkdir()
    refused("attribute", *asked, "--output", "out", "--top_k", "9")


def test_overwriting_through_a_link(asked: list[str], elsewhere: Path) -> None:
    assert main(["attribute", *asked, "--output", "real", "--limit", "3"]) == 0
    (elsewhere / "link").symlink_to("real")
    assert main(["attribute", *asked, "--output", "link", "--overwrite"]) == 0
    assert GoldenProfile.load(elsewhere / "real").requests == 7
    assert (elsewhere / "link").is_symlink()


def test_the_working_folder_is_not_replaced(asked: list[str], refused: Callable[..., str]) -> None:
    assert main(["attribute", *asked, "--output", ".", "--limit", "3"]) == 0
    assert "output: ." in refused("attribute", *asked, "--output", ".", "--overwrite")


def test_what_a_killed_command_set_aside(asked: list[str], elsewhere: Path, refused: Callable[..., str]) -> None:
    assert main(["attribute", *asked, "--output", "out"]) == 0
    shutil.copytree(elsewhere / "out", elsewhere / ".out.replaced")
    assert ".out.replaced" in refused("attribute", *asked, "--output", "out", "--overwrite")


def test_no_room_for_the_update(
    editing: list[str], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    line = refused(*editing, "--output", "out")
    assert "out" in line and "MB" in line and "free" in line


def test_no_room_for_the_exported_model(
    model: list[str], made: SimpleNamespace, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    line = refused("export", *model, "--update", str(made.edited), "--output", "out")
    assert "out" in line and "free" in line


@pytest.mark.parametrize("command", ["edit", "export"])
def test_a_disk_that_fills_up(
    command: str, editing: list[str], model: list[str], made: SimpleNamespace, elsewhere: Path
) -> None:
    """Files of more than 12 kB cannot be written: the update's tensors are larger."""
    words = editing if command == "edit" else ["export", *model, "--update", str(made.edited)]
    told = ran(RUN, *words, "--output", "out", folder=elsewhere, before=partial(small_files, 12_000))
    assert told.returncode == 1
    assert "no room left on the disk" in one_line(told.stderr)
    assert not list(elsewhere.iterdir())


@pytest.fixture
def keeps_interrupts() -> Iterator[None]:
    """Lightning stops listening to Ctrl-C once it got one; the tests after this one should not."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("moment", ["loading", "training"])
@pytest.mark.usefixtures("keeps_interrupts")
def test_an_interrupt_leaves_nothing(
    moment: str, editing: list[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupt(*_: Any, **__: Any) -> None:
        raise Interrupted

    places: dict[str, tuple[Any, str]] = {
        "loading": (commands, "load"),
        "training": (FineTune, "training_step"),
    }
    monkeypatch.setattr(*places[moment], interrupt)
    assert main([*editing, "--output", "out"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not list(elsewhere.iterdir())


@pytest.mark.usefixtures("keeps_interrupts")
def test_an_interrupt_while_measuring_keeps_the_finished_update(
    editing: list[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(RunLog, "keep_metrics", interrupt)
    assert main([*editing, "--output", "out"]) == 130
    kept = {"options.yaml", "update.json", "update.safetensors"}
    assert names_in(elsewhere / "out") == {*kept, "events", "unfinished"}, "what was read is kept, too"
    assert WeightUpdate.load(elsewhere / "out").layers
    assert "kept in out: update.json, update.safetensors" in capsys.readouterr().out


def test_ctrl_c_in_the_middle_of_an_edit(editing: list[str], elsewhere: Path) -> None:
    words = [*editing, *FINETUNE, "1000000", "--output", "out"]
    with Program(RUN, *words, folder=elsewhere) as program:
        wait_for(lambda: list(elsewhere.glob("out/unfinished/edit/*/training.ckpt")))
        program.send_signal(signal.SIGINT)
        told = program.finished(25)
    assert told.returncode == 130
    assert told.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in told.stderr
    assert names_in(elsewhere / "out") == {"options.yaml", "events", "unfinished"}, "to go on from"


@pytest.mark.usefixtures("keeps_interrupts")
def test_an_interrupted_run_keeps_its_profile(
    asked: list[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(FineTune, "training_step", interrupt)
    assert main(["run", *asked, *RUN_FINETUNE, "1", "--output", "out"]) == 130
    assert GoldenProfile.load(elsewhere / "out").requests
    assert {"golden_profile.json", "options.yaml", "scores.png"} <= names_in(elsewhere / "out")
    assert not {"update.json", "update.safetensors", "metrics.json"} & names_in(elsewhere / "out")


@pytest.mark.usefixtures("keeps_interrupts")
@pytest.mark.parametrize("command", ["edit", "run"])
def test_resume_goes_on_where_it_stopped(
    command: str, asked: list[str], ordinary_text: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = {
        "edit": ["edit", *asked, "--layers", "1", *FINETUNE, "4"],
        "run": ["run", *asked, *RUN_FINETUNE, "4"],
    }[command] + ["--evaluation.text", ordinary_text, "--output"]
    step, left = FineTune.training_step, iter(range(2))

    @wraps(step)
    def stopping(self: FineTune, lesson: Any) -> Any:
        if next(left, None) is None:
            raise Interrupted
        return step(self, lesson)

    with monkeypatch.context() as patched:
        patched.setattr(FineTune, "training_step", stopping)
        assert main([*words, "out"]) == 130
    assert "the same command with --output out --resume goes on" in " ".join(capsys.readouterr().out.split())
    assert "unfinished" in names_in(elsewhere / "out")
    assert main([*words, "out", "--resume"]) == 0
    assert main([*words, "whole"]) == 0
    assert names_in(elsewhere / "out") == names_in(elsewhere / "whole")
    for name in ("update.safetensors", "metrics.json"):
        assert (elsewhere / "out" / name).read_bytes() == (elsewhere / "whole" / name).read_bytes()


def test_resume_needs_what_was_interrupted(
    editing: list[str], made: SimpleNamespace, elsewhere: Path, refused: Callable[..., str]
) -> None:
    assert "name the interrupted command's folder with --output" in refused(*editing, "--resume")
    (elsewhere / "foreign").mkdir()
    (elsewhere / "foreign" / "notes.txt").touch()
    assert "holds no options.yaml" in refused(*editing, "--resume", "--output", "foreign")
    shutil.copytree(made.edited, elsewhere / "other")
    message = refused(*editing, "--resume", "--output", "other")
    assert "was started with another expert, layers, limit, profile, requests" in message

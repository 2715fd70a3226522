"""Progress: a bar that fits the terminal, plain lines with signs of life in a log file, and nothing beside."""

from __future__ import annotations

import io
import sys

import pytest
import tqdm
from lightning.pytorch.utilities import rank_zero_only

from pipeline.running.progress import Shown, StageProgressBar, one_bar


class Terminal(io.StringIO):
    """An error stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


def test_a_log_file_gets_plain_lines_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = Shown("Measuring", 100)
    for _ in range(100):
        clock[0] += 1
        shown.advance(note="loss 0.5")
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "Measuring: 0/100 after 00:00, left ?",
        "Measuring: 20/100 after 00:20, left 01:20, loss 0.5",
        "Measuring: 40/100 after 00:40, left 01:00, loss 0.5",
        "Measuring: 60/100 after 01:00, left 00:40, loss 0.5",
        "Measuring: 80/100 after 01:20, left 00:20, loss 0.5",
        "Measuring: 100/100 after 01:40, left 00:00, loss 0.5",
    ]


def test_a_long_stage_does_not_fill_a_log(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = Shown("Trying blocks", 86400)
    for _ in range(86399):
        clock[0] += 1
        shown.advance()
    shown.close()
    told = capsys.readouterr().err.splitlines()
    assert 30 < len(told) < 90
    assert told[-1].startswith("Trying blocks: 86399/86400 after 23:59:59, left ")


def test_a_long_batch_shows_its_steps(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    bar = StageProgressBar("Finding values")
    bar.start(2)
    for step in range(41):
        clock[0] += 1
        bar.within(step, 50)
    bar.stop()
    assert capsys.readouterr().err.splitlines() == [
        "Finding values: 0/2 after 00:00, left ?",
        "Finding values: 0/2 after 00:20, left ?, step 19 of 50",
        "Finding values: 0/2 after 00:40, left ?, step 39 of 50",
        "Finding values: 0/2 after 00:41, left ?, step 40 of 50",
    ]


def test_steps_of_another_process_show_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    bar = StageProgressBar("Finding values")
    bar.start(2)
    bar.within(1, 50)
    bar.stop()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("width", [44, 60, 80, 120])
@pytest.mark.parametrize("title", ["Editing", "What the model knows"])
def test_a_bar_fits_its_terminal(width: int, title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(tqdm.std, "_screen_shape_wrapper", lambda: lambda _: (width, 24))
    shown = Shown(title, 160)
    shown.advance(80, "loss 0.5")
    shown.close()
    states = [state for state in screen.getvalue().replace("\r", "\n").splitlines() if state.strip()]
    assert all(len(state) <= width for state in states)
    assert states[-1].startswith(f"{title} 80/160 left ")
    assert (", loss 0.5 ###" in states[-1]) or width == 44


def test_one_bar_stands_for_the_stages_within(capsys: pytest.CaptureFixture[str]) -> None:
    with one_bar("Trying blocks", 2) as advance:
        stage = StageProgressBar("Editing")
        stage.start(5)
        stage.on_predict_batch_end()
        stage.stop()
        advance(2, "block 1")
    assert capsys.readouterr().err.splitlines() == [
        "Trying blocks: 0/2 after 00:00, left ?",
        "Trying blocks: 2/2 after 00:00, left 00:00, block 1",
    ]

"""Progress: a bar that fits the terminal, plain lines with signs of life in a log file, and nothing beside."""

from __future__ import annotations

import io
import re
import sys

import pytest
from rich.console import Console

from pipeline.running import progress
from pipeline.running.progress import Bar, Lines, StageProgressBar, one_bar, shown

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal(io.StringIO):
    """An error stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_plain_lines_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown("Measuring", 100)
    for _ in range(100):
        clock[0] += 1
        lines.advance(note="loss 0.5")
    lines.stop(finished=True)
    assert capsys.readouterr().err.splitlines() == [
        "Measuring: 20/100 after 0:00:20, left 0:01:20, loss 0.5",
        "Measuring: 40/100 after 0:00:40, left 0:01:00, loss 0.5",
        "Measuring: 60/100 after 0:01:00, left 0:00:40, loss 0.5",
        "Measuring: 80/100 after 0:01:20, left 0:00:20, loss 0.5",
        "Measuring: 100/100 in 0:01:40",
    ]


def test_a_long_stage_does_not_fill_a_log(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown("Trying blocks", 86400)
    for _ in range(86399):
        clock[0] += 1
        lines.advance()
    lines.stop(finished=False)
    told = capsys.readouterr().err.splitlines()
    assert 30 < len(told) < 90
    assert told[-1] == "Trying blocks: 86399/86400 when it stopped, after 23:59:59"


@pytest.mark.parametrize(("terminal", "kind"), [("xterm-256color", Bar), ("dumb", Lines)])
def test_a_terminal_that_moves_gets_a_bar(terminal: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", terminal)
    monkeypatch.setattr(sys, "stderr", Terminal())
    stage = shown("Editing", 3)
    stage.stop(finished=True)
    assert isinstance(stage, kind)


@pytest.mark.parametrize("width", [44, 60, 80, 120])
@pytest.mark.parametrize("title", ["Editing", "What the model knows"])
def test_a_bar_fits_its_terminal(width: int, title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    bar = Bar(title, 160, Console(file=screen, width=width, force_terminal=True))
    bar.advance(80)
    bar.stop(finished=False)
    last = ESCAPES.sub("", screen.getvalue()).replace("\r", "\n").rstrip().splitlines()[-1]
    assert len(last) <= width
    assert "…" not in last and title in last and "80/160" in last and "left " in last
    assert ("━" in last) == (width > 44)


def test_what_is_printed_beside_a_bar_reaches_its_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with one_bar("Trying blocks", 3):
        print("a result")
    assert capsys.readouterr().out == "a result\n"


def test_one_bar_stands_for_the_stages_within(capsys: pytest.CaptureFixture[str]) -> None:
    with one_bar("Trying blocks", 2) as advance:
        stage = StageProgressBar("Editing")
        stage.start(5)
        stage.on_predict_batch_end()
        stage.stop()
        advance(2, "block 1")
    assert capsys.readouterr().err == "Trying blocks: 2/2 in 0:00:00\n"

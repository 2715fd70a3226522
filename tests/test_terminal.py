"""Tables in the terminal: right in a narrow window, and whole in a log file."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.evaluation.evaluator import Evaluation, Measurement
from pipeline.evaluation.metrics import Estimate
from pipeline.reporting.tables import EXPECTED, not_measured
from pipeline.reporting.terminal import LOG_WIDTH, say, show_metrics

ROOT = Path(__file__).parent.parent


def measured(mean: float) -> Measurement:
    """Figures of a side, one with long numbers."""
    estimates = {
        "generation_exact_match": Estimate(mean, 80, mean / 2, mean * 2),
        "neighbourhood_success": Estimate(mean, 80, mean / 2, mean * 2),
        "perplexity": Estimate(mean * 1000, 3149, mean * 500, mean * 2000),
    }
    return Measurement(estimates, answers=[])


def shown(columns: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    show_metrics([], Evaluation(measured(0.25), measured(0.125)))
    *table, missing = capsys.readouterr().out.splitlines()
    asked = "generation containment, chat, rephrase containment, rewrite, rephrase"
    assert missing == f"NOT MEASURED: {asked}, the rest of the subject, locality, portability, sane texts"
    return table


def test_a_narrow_window_shows_figures_without_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(60, monkeypatch, capsys)
    assert max(map(len, lines)) <= 60
    assert lines[0].split() == ["metric", "count", "before", "after"]
    assert ["neighbourhood", "success", "80", "0.250", "0.125"] in [line.split() for line in lines]


@pytest.mark.parametrize("columns", [None, 80])
def test_a_log_file_and_a_wide_terminal_show_intervals(
    columns: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(columns, monkeypatch, capsys)
    assert [line for line in lines if "0.250 [0.125, 0.500]" in line and "0.125 [0.062, 0.250]" in line]
    assert len(lines) == 7  # no row is broken
    if columns is None:
        say("word " * 100)
        assert len(capsys.readouterr().out.splitlines()) == 1
        assert LOG_WIDTH > 100


def test_lines_break_between_words_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "30")
    say("the signed order then names the block of least reach")
    assert screen.getvalue().splitlines() == ["the signed order then names ", "the block of least reach"]


def test_a_stream_that_cannot_show_a_letter_ends_no_command(tmp_path: Path) -> None:
    (tmp_path / "ünnamed.txt").write_text("")
    told = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--config", "ünnamed.txt"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.returncode == 2
    assert told.stderr.startswith("error: config: \\xfcnnamed.txt: expected a mapping")


def test_what_was_measured_of_a_part_is_said_with_the_number_of_the_others() -> None:
    found = {name: Estimate(1, 10, 1, 1) for names in EXPECTED.values() for name in names[:1]}
    assert not_measured(found | {"sane_texts": Estimate(1, 4, 1, 1)}) == ""
    found |= {"rephrase": Estimate(1, 3, 1, 1), "made_rephrase_containment": Estimate(1, 6, 1, 1)}
    assert not_measured(found) == "NOT MEASURED: rephrase of 1, sane texts"

"""A command's TensorBoard run: what benchmarks and studies leave in it, and that resuming writes nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_figures import found, study

from pipeline.attribution.profile import PROFILE_FILE, GoldenProfile
from pipeline.reporting.run_log import run_log


def board_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "scalars": 0}).Reload()


def test_a_study_is_shown(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with run_log("study", str(out), False, {}) as log:
        log.keep_study(study(4, 3, "demo"))
    board = board_of(out)
    assert len(board.Tags()["images"]) == 2
    assert "| golden layer |" in board.Tensors("study/report/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("in_progress", [True, False])  # whose curves stay, or go
def test_a_resumed_command_shows_its_profile_once(in_progress: bool, tmp_path: Path) -> None:
    out, (profile, scores) = tmp_path / "out", found(4, 6)
    with pytest.raises(KeyboardInterrupt), run_log("run", str(out), False, {"resume": False}) as log:
        log.keep_profile(profile, scores)
        if in_progress:
            (log.work / "edit").mkdir(parents=True)
            (log.work / "edit" / "step-1.ckpt").write_text("")
        raise KeyboardInterrupt
    assert bool(list(out.glob("events.*"))) == in_progress
    with run_log("run", str(out), False, {"resume": True}) as log:
        assert log.has(PROFILE_FILE)
        again = GoldenProfile.load(out)
        assert again == profile
        log.keep_profile(again)
    board = board_of(out)
    assert not board.Tags()["scalars"], "blocks are no steps of a curve"
    assert [len(board.Images(tag)) for tag in board.Tags()["images"]] == [1, 1]
    assert (out / "stability.png").is_file()


def test_a_study_that_grows_is_shown_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for resume in (False, True):
        with run_log("study", str(out), False, {"resume": resume}) as log:
            log.going_on()
            log.keep_study(study(3, 2, "demo"))
    board = board_of(out)
    assert [len(board.Images(tag)) for tag in board.Tags()["images"]] == [1, 1]

"""Scores request by request: kept, the same on any number of batches gone before a kill, in constant memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal

from pipeline.attribution import METHODS, GoldenProfile, Scores, score_requests
from pipeline.attribution.lga import AttributionModule
from pipeline.attribution.scoring import ScoreLog
from pipeline.cli import main
from pipeline.model import LLM
from pipeline.options import AttributionOptions
from pipeline.requests import EditRequest

RUN = Path(__file__).parent.parent / "run.py"


def test_scores_come_in_the_requests_order(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    together = score_requests(tiny_llm, requests, AttributionOptions(batch_size=3))
    assert together.ids == [request.id for request in requests]
    assert together.values.shape == (7, 4)
    alone = [score_requests(tiny_llm, [request]).values[0] for request in requests]
    np.testing.assert_allclose(together.values, alone, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("done", [1, 3])
def test_interrupted_scoring_goes_on(
    done: int, tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = AttributionOptions(batch_size=2)
    expected = score_requests(tiny_llm, requests, options)
    scored = AttributionModule.scores
    calls: list[int] = []

    def stopping(self: AttributionModule, batch: object) -> object:
        calls.append(1)
        if len(calls) == done + 1:
            raise KeyboardInterrupt
        return scored(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(AttributionModule, "scores", stopping)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        score_requests(tiny_llm, requests, options, work=tmp_path)
    (log,) = tmp_path.glob("*.records")
    log.write_bytes(log.read_bytes() + b"torn")  # a write that a kill cut off
    resumed = score_requests(tiny_llm, requests, options, work=tmp_path)
    assert len(calls) == 4 + 1, "four batches, the interrupted one twice: what was kept was not scored again"
    assert resumed.values.tobytes() == expected.values.tobytes()
    assert len(ScoreLog(tmp_path, 4).read()) == len(requests)


def test_work_of_other_requests_is_refused(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    score_requests(tiny_llm, requests, work=tmp_path)
    assert "work of another attribution" in refusal(lambda: score_requests(tiny_llm, requests[1:], work=tmp_path))


def test_scores_come_back_from_their_file(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    scores = score_requests(tiny_llm, requests)
    loaded = Scores.load(scores.save(tmp_path))
    assert (loaded.method, loaded.ids) == ("lga", scores.ids)
    assert loaded.values.tobytes() == scores.values.tobytes()
    (tmp_path / "scores.safetensors").write_bytes(b"no scores")
    assert "damaged" in refusal(lambda: Scores.load(tmp_path))
    assert "no such file" in refusal(lambda: Scores.load(tmp_path / "nowhere"))


def test_scores_that_are_no_numbers(
    tiny_llm: LLM, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = np.ones((7, 4))
    broken[2, 1] = np.nan
    monkeypatch.setitem(METHODS, "lga", METHODS["lga"]._replace(score=lambda *_: broken))
    assert "capital-2" in refusal(lambda: score_requests(tiny_llm, requests))


def test_killed_and_resumed_ends_in_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["attribute", "--model", str(tiny_folder), "--requests", "demo", "--expert.batch_size", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*words, "--output", str(whole)]) == 0
    process = subprocess.Popen(
        [sys.executable, str(RUN), *words, "--output", str(killed)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    log = killed / "unfinished" / "attribution" / "scores-0.records"
    while process.poll() is None and not (log.is_file() and log.stat().st_size > 400):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    found = log.stat().st_size
    assert main([*words, "--output", str(killed), "--resume"]) == 0
    for file in ("scores.safetensors", "scores.png", "stability.png"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
    expected, resumed = (GoldenProfile.load(folder).model_dump(exclude={"seconds"}) for folder in (whole, killed))
    assert resumed == expected
    assert found < Scores.load(whole).values.size * 16, "it was killed before the end"
    assert not (killed / "unfinished").exists()
    assert main([*words, "--output", str(killed), "--resume"]) == 0, "what is finished is shown again"

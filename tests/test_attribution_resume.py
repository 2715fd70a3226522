"""Scores request by request: in the requests' order, kept batch by batch, and found again after an interrupt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal
from safetensors import safe_open

from pipeline.attribution.find import score_requests
from pipeline.attribution.lga import Attribution
from pipeline.attribution.selector import Selector
from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.requests.rows import Batch
from pipeline.requests.schema import EditRequest


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
    step, scored, most = Attribution.step, [], done

    def stopping(self: Attribution, batch: Batch) -> list[list[float]]:
        if len(scored) == most:
            raise KeyboardInterrupt
        scored.append({row.tag for row in batch.texts})
        return step(self, batch)

    monkeypatch.setattr(Attribution, "step", stopping)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        score_requests(tiny_llm, requests, options, work=tmp_path)
    (torn, *_) = tmp_path.rglob("*.pt")  # by the disk: what it held is scored again
    torn.write_bytes(torn.read_bytes()[:100])
    most = 100
    resumed = score_requests(tiny_llm, requests, options, work=tmp_path)
    np.testing.assert_allclose(resumed.values, expected.values, rtol=1e-4, atol=1e-6)
    twice = [request.id for request in requests if sum(request.id in batch for batch in scored) > 1]
    assert 0 < len(twice) <= 2, "what was kept was not scored again, but for the batch whose file is torn"


def test_kept_scores_are_of_the_same_requests_and_options(
    tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path
) -> None:
    first = score_requests(tiny_llm, requests, work=tmp_path)
    options = AttributionOptions(scope="down")
    for other, own in ((requests[1:], None), (requests, options)):
        found = score_requests(tiny_llm, other, own, work=tmp_path)
        np.testing.assert_array_equal(found.values, score_requests(tiny_llm, other, own).values)
    np.testing.assert_array_equal(score_requests(tiny_llm, requests, work=tmp_path).values, first.values)


def test_scores_come_back_from_their_file(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    scores = score_requests(tiny_llm, requests)
    with safe_open(scores.save(tmp_path), "numpy") as opened:
        assert json.loads(opened.metadata()["about"]) == {"method": "lga", "ids": scores.ids}
        assert opened.get_tensor("scores").tobytes() == scores.values.tobytes()


def test_scores_that_are_no_numbers(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    broken = np.ones((7, 4))
    broken[2, 1] = np.nan
    selectors = {"lga": Selector(lambda *_: broken)}
    assert "capital-2" in refusal(lambda: score_requests(tiny_llm, requests, selectors=selectors))

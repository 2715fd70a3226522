"""How sure a choice is, against resampling done one proxy set at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.attribution.find import choose, find_golden_layer
from pipeline.attribution.profile import GoldenProfile, Scores, judge, select
from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.requests.schema import EditRequest


def test_a_clear_choice_is_sure_and_a_coin_s_is_not() -> None:
    random = np.random.default_rng(1)
    values = random.normal(size=(64, 5))
    clear, coin = values.copy(), values.copy()
    clear[:, 3] += 5
    coin[:, 3] += 5
    coin[:, 1] = coin[::-1, 3]  # the same mean: only a resample tells them apart
    sure, unsure = judge(clear, fences=0), judge(coin, fences=0)
    assert sure.chosen[3] == 1.0
    assert 0.4 < unsure.chosen[1] < 0.6
    assert sum(unsure.chosen) == pytest.approx(1)


def test_intervals_are_the_means_own() -> None:
    values = np.random.default_rng(2).normal(3.0, 2.0, size=(400, 3))
    found = judge(values, fences=0)
    wide = 1.96 * values.std(0) / 20
    np.testing.assert_allclose(found.low, values.mean(0) - wide, atol=0.04)
    np.testing.assert_allclose(found.high, values.mean(0) + wide, atol=0.04)
    assert judge(values, fences=0) == found, "the same seed draws the same"
    assert judge(values, fences=0, seed=1) != found


def test_the_profile_says_how_sure_it_is(tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path) -> None:
    profile = find_golden_layer(tiny_llm, requests)
    assert profile.stability
    golden = profile.golden_layers[0]
    assert f": block {golden}, chosen in {profile.stability.chosen[golden]:.0%} of resamples" in profile.certainty
    file = profile.save(tmp_path)
    older = json.loads(file.read_text())
    older["stability"] |= {"sizes": [7], "agreeing": [1.0], "leading": [golden]}  # which there were once
    file.write_text(json.dumps(older))
    assert GoldenProfile.load(file) == profile
    del older["stability"]
    file.write_text(json.dumps(older))
    loaded = GoldenProfile.load(file)
    assert loaded.golden_layers == profile.golden_layers
    assert loaded.certainty == ""


def test_a_fence_beside_a_score_does_not_let_one_request_decide() -> None:
    values = np.random.default_rng(0).normal(loc=[0, 1, 0, 2, 1, 0, 3, 4.6], size=(40, 8))
    barely = [values + nudge for nudge in np.linspace(-1, 1, 400)[:, None, None] * np.eye(8)[7]]
    inside = [one for one in barely if 7 in select(one.mean(0)).ranking]
    assert 0 < len(inside) < len(barely), "some of them lie outside"
    edge = inside[-1]
    assert select(edge.mean(0)).ranking[:2] == [7, 6]
    found = choose(Scores("lga", [f"{n}" for n in range(40)], edge))
    assert found.stability and found.stability.chosen[7] < 0.5 < found.stability.chosen[6]
    assert found.ranking[:2] == [6, 7], "where it lies outside in most resamples, it is not golden"


def test_scores_of_anybody_s_can_be_chosen_from() -> None:
    values = np.tile([1.0, 2.0, 9.0, 1.5], (5, 1))
    profile = choose(Scores("causal_tracing", list("abcde"), values), AttributionOptions(top_k=2))
    assert profile.golden_layers == [2, 1], "no fences for a score that has a bound"
    assert choose(Scores("lga", list("abcde"), values)).excluded == [2]

"""The figures: drawn without a warning for the smallest, the largest and the oddest, not blank, nothing cut off."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from pipeline.attribution.profile import GoldenProfile, Race, Raced, Scores, judge, select
from pipeline.evaluation.evaluator import Evaluation
from pipeline.evaluation.metrics import Estimate
from pipeline.options.attribution import AttributionOptions
from pipeline.reporting.figures import (
    BLUE,
    GOLD,
    ROWS,
    WIDTH,
    metrics_figure,
    race_figure,
    score_figure,
    selectors_figure,
    short,
    stability_figure,
    sweep_figure,
)
from pipeline.study.grid import Grid
from pipeline.study.study import Study

LONG = "/data/models/of_a_company$with$signs/and_very_long_names-that-say-all-there-is-to-say-7B-instruct-v0.3"
SIZES = [(1, 1), (30, 80), (100, 300)]  # blocks, requests


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def look_at(figure: Figure) -> np.ndarray:
    """The figure's pixels; fails where it is blank, or where ink touches the left or right edge."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].mean(-1)
    assert (pixels < 128).mean() > 0.005, "blank"
    assert pixels[:, :2].min() > 200 and pixels[:, -2:].min() > 200, "something is cut off"
    assert figure.get_figwidth() == WIDTH, "too wide for TensorBoard's cards"
    return cast(np.ndarray, pixels)


def found(blocks: int, requests: int, model: str = "tiny", **options: Any) -> tuple[GoldenProfile, Scores]:
    """A profile with scores like real ones: of both signs, with outliers."""
    values = np.random.default_rng(0).standard_cauchy((requests, blocks)) * 10
    chosen = select(values.mean(0).tolist(), **options)
    order = options.get("order", "signed")
    profile = GoldenProfile(
        model=model, fingerprint="", method="lga", scope="mlp", order=order, scores=values.mean(0).tolist(),
        **chosen._asdict(), golden_layers=chosen.ranking[:1], request_set=model, requests=requests,
        seconds=1.0, stability=judge(values, AttributionOptions().fences, order),
    )  # fmt: skip
    return profile, Scores("lga", [str(number) for number in range(requests)], values)


@pytest.mark.parametrize("model", ["tiny", LONG])
@pytest.mark.parametrize(("blocks", "requests"), SIZES)
def test_where_to_edit(blocks: int, requests: int, model: str) -> None:
    profile, _ = found(blocks, requests, model)
    for figure in (score_figure(profile), stability_figure(profile)):
        look_at(figure)
        assert str(profile.golden_layers[0]) in figure.texts[0].get_text(), "the choice stands in the title"


def heights(figure: Figure, label: str) -> list[float]:
    """Of the bars of a label."""
    (bars,) = [bars for bars in figure.axes[0].containers if bars.get_label() == label]
    return [bar.get_height() for bar in bars]


def test_where_size_counts_it_is_what_is_drawn() -> None:
    profile, _ = found(30, 80, order="magnitude")
    figure, golden = score_figure(profile), profile.scores[profile.golden_layers[0]]
    look_at(figure)
    assert min(bar.get_height() for bars in figure.axes[0].containers for bar in bars) >= 0
    assert heights(figure, "golden") == [abs(golden)]
    other = [score for score in profile.scores if score * golden < 0]
    assert heights(figure, "of the other sign") == [abs(score) for score in other]
    signed, _ = found(30, 80)
    drawn = [bar.get_height() for bars in score_figure(signed).axes[0].containers for bar in bars]
    assert sorted(drawn) == sorted(signed.scores)


@pytest.mark.parametrize(("share", "word"), [(0.95, "steady"), (0.6, "likely"), (0.2, "in doubt")])
def test_how_sure_the_choice_is_in_a_word(share: float, word: str) -> None:
    profile, _ = found(10, 20)
    assert profile.stability and profile.excluded
    golden, aside = profile.golden_layers[0], profile.excluded[0]
    chosen = [share if block == golden else (1 - share) * (block == aside) for block in range(10)]
    profile = profile.model_copy(update={"stability": profile.stability.model_copy(update={"chosen": chosen})})
    assert score_figure(profile).texts[0].get_text() == f"Golden layer {golden} of 10 blocks: {word}"
    figure = stability_figure(profile)
    title, caption = (" ".join(text.get_text().split()) for text in figure.texts)
    assert title == f"How sure is block {golden}? {share:.0%}: {word}"
    assert (f"block {aside}, which the fences set aside, in 80%" in caption) == (word == "in doubt")
    assert max(heights(figure, "set aside")) == pytest.approx(1 - share)


@pytest.mark.parametrize(
    ("blocks", "tried", "ahead"), [(30, [3, 0, 12], 1.0), (2, [0, 1], 0.5), (80, [79, 3], 0.7)]
)
def test_a_race(blocks: int, tried: list[int], ahead: float) -> None:
    profile, _ = found(blocks, 20)
    raced = [
        Raced(block=block, requests=64 >> place, score=0.8 - 0.1 * place, behind=0.1 * place, beaten=ahead)
        for place, block in enumerate(tried)
    ]
    profile = profile.model_copy(update={"race": Race(method="memit", trials=9, seconds=1.0, blocks=raced)})
    look_at(figure := race_figure(profile))
    word = "clear" if ahead == 1 else "unclear"
    assert figure.texts[0].get_text() == f"Which block edits best? {tried[0]}: {word}"
    points = np.concatenate([drawn.get_offsets() for drawn in figure.axes[0].collections])
    assert sorted(points[:, 0]) == sorted(tried)
    for draw in (score_figure, stability_figure):
        look_at(draw(profile))


def test_what_a_profile_may_lack() -> None:
    profile, _ = found(30, 8)
    look_at(score_figure(profile.model_copy(update={"stability": None, "fences": None, "excluded": []})))
    look_at(score_figure(profile.model_copy(update={"scores": [0.0] * 30, "scope": ""})))
    look_at(score_figure(profile.model_copy(update={"golden_layers": profile.ranking[:3]})))


def evaluation(names: tuple[str, ...], after: bool = True, count: int = 80) -> Evaluation:
    """Figures of a small edit."""
    sides = [
        SimpleNamespace(metrics={name: Estimate(mean, count, mean - 0.1, mean + 0.1) for name in names})
        for mean in (0.1, 0.9)
    ]
    return cast(Evaluation, SimpleNamespace(before=sides[0], after=sides[1] if after else None))


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("names", [("rewrite", "perplexity"), tuple(name for row in ROWS.values() for name in row)])
def test_before_and_after(names: tuple[str, ...], after: bool) -> None:
    figure = metrics_figure(evaluation(names, after, count=1), "facts.jsonl, limit 16")
    look_at(figure)
    (axes,) = figure.axes
    assert [line.get_text() for line in axes.get_yticklabels() if line.get_fontweight() == "bold"] == [*ROWS]
    assert len(axes.get_yticklabels()) == len(ROWS) + len(names)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == (["before", "after"] if after else ["before"])
    assert [text.get_text() for text in axes.texts] == ["0.1, then 0.9: × 9.000" if after else "0.1"], "perplexity"
    assert "1 requests of facts.jsonl, limit 16" in figure.texts[1].get_text()


def study(blocks: int, requests: int, name: str) -> Study:
    """A study of two selectors, with a probe that some requests lack and one that all lack."""
    random = np.random.default_rng(0)
    values = {metric: random.random((2, requests, blocks)) for metric in ("rewrite", "rephrase", "locality")}
    values["rephrase"][:, 0] = np.nan
    values["locality"][:] = np.nan
    grid = Grid(list(range(blocks)), values, 60.0)
    profiles = {selector: found(blocks, 8)[0] for selector in ("lga", f"{name} without fences")}
    part = cast(Any, SimpleNamespace(name=name, tried=[None] * requests, proxy=[None] * 8))
    return Study(name, blocks, [part], {name: profiles}, {name: {"memit": grid}})


@pytest.mark.parametrize("draw", [sweep_figure, selectors_figure])
@pytest.mark.parametrize(("blocks", "requests", "name"), [(1, 2, "demo"), (30, 32, LONG), (100, 200, "demo")])
def test_a_study(draw: Callable[..., Figure], blocks: int, requests: int, name: str) -> None:
    look_at(draw(study(blocks, requests, name), name, "memit"))


def test_colours_differ_in_grey() -> None:
    grey = sorted(float(np.dot(to_rgb(color), (0.299, 0.587, 0.114))) for color in (GOLD, BLUE, "white"))
    assert min(np.diff(grey)) > 0.2


def test_long_names_keep_their_end() -> None:
    assert short(LONG).endswith("7B-instruct-v0.3") and len(short(LONG)) <= 42
    assert short("smollm2") == "smollm2"


def test_no_display_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    score_figure(found(4, 6)[0]).savefig(tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 5000

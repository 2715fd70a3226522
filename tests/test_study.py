"""The sweep keeps what it tries; the study's answers are those of its definitions; selectors find a block."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny, refusal
from transformers import PreTrainedTokenizerFast

from pipeline.attribution.find import choose, find_golden_layer, score_requests
from pipeline.attribution.profile import GoldenProfile
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.model.activations import target_losses
from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.options.commands import StudyCommand
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.requests.readers import load_requests
from pipeline.requests.rows import collate
from pipeline.requests.schema import EditRequest, Probe
from pipeline.running.trainer import Runtime
from pipeline.study import sweep
from pipeline.study.grid import Grid, carried_over, everywhere, golden_against_optimal, rank_correlation
from pipeline.study.race import race
from pipeline.study.study import RESEARCH, check_study, parted
from pipeline.study.sweep import Sweep, halved

WINNER = 0  # the block of `one_block` that does all the recalling


@pytest.fixture
def editing(text_file: Path) -> EditOptions:
    return EditOptions(statistics=StatisticsOptions(text=str(text_file), tokens=512), expert={"steps": 8})


def sweep_of(llm: LLM, editing: EditOptions, folder: Path, together: int = 3) -> Sweep:
    return Sweep(llm, editing, Runtime(), folder / "results", together)


# the sweep


def test_what_was_tried_is_not_tried_again(
    tiny_llm: LLM,
    requests: list[EditRequest],
    editing: EditOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the middle, a sweep goes on to the figures of one in a single go; other blocks add to it."""
    whole = sweep_of(tiny_llm, editing, tmp_path / "whole").run("memit", requests[:4], [0, 2])
    tried: list[tuple[int, int]] = []
    edit, most = sweep.edit, 3

    def counted(
        llm: LLM, some: list[EditRequest], profile: None, options: EditOptions, *rest: Any, **how: Any
    ) -> Any:
        if len(tried) == most:
            raise KeyboardInterrupt
        tried.extend((layer, len(some)) for layer in options.layers or [])
        return edit(llm, some, profile, options, *rest, **how)

    monkeypatch.setattr(sweep, "edit", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep_of(tiny_llm, editing, tmp_path).run("memit", requests[:4], [0, 2])
    assert tried == [(0, 3), (2, 3), (0, 1)]
    tried.clear()
    resumed = sweep_of(tiny_llm, editing, tmp_path).run("memit", requests[:4], [0, 2])
    assert tried == [(2, 1)]
    for name, values in whole.values.items():
        np.testing.assert_array_equal(resumed.values[name], values)
    tried.clear()
    more = sweep_of(tiny_llm, editing, tmp_path).run("memit", requests[:4], [0, 1, 2])
    assert {layer for layer, _ in tried} == {1}
    np.testing.assert_array_equal(more.scores[:, [0, 2]], whole.scores)


def test_other_options_are_other_trials(
    tiny_llm: LLM, requests: list[EditRequest], editing: EditOptions, tmp_path: Path
) -> None:
    first = sweep_of(tiny_llm, editing, tmp_path).run("memit", requests[:2], [1])
    editing.expert["steps"] = 1
    assert sweep_of(tiny_llm, editing, tmp_path).run("memit", requests[:2], [1]).seconds != first.seconds


# the questions


@pytest.fixture
def grid() -> Grid:
    """Three requests at blocks 0, 2 and 5: the best fixed block is 2, two of the requests have a better own one."""
    rewrite = np.array([[0.9, 0.6, 0.0], [0.0, 0.9, 0.3], [0.0, 0.6, 0.9]])
    return Grid(
        [0, 2, 5],
        {"rewrite": alike(rewrite), "locality": alike(rewrite), "portability": alike(1 - rewrite)},
        seconds=6.0,
    )


def alike(figures: Any) -> Any:
    """The same by both halves of the probes."""
    return np.stack([figures, figures])


def named(block: int) -> GoldenProfile:
    """A profile of six blocks that names one, and has the next best ones in order of depth."""
    scores, others = [0.0] * 6, [other for other in range(6) if other != block]
    return GoldenProfile(
        model="m", fingerprint="f", method="lga", scope="mlp", scores=scores, fences=None, excluded=[],
        ranking=[block, *others], raw_ranking=[block, *others], golden_layers=[block],
        request_set="", requests=1, seconds=1.0,
    )  # fmt: skip


def test_fixed_blocks_against_own_best_ones(grid: Grid) -> None:
    rows = {row["choice"]: row for row in golden_against_optimal(grid, named(5), blocks=6)}
    assert rows["each request's own best block"]["score"] == pytest.approx(0.9)
    assert rows["best fixed block"]["block"] == grid.best == 2
    assert rows["best fixed block"]["score"] == pytest.approx(0.7)
    assert rows["golden layer"]["score"] == pytest.approx(0.4)
    assert rows["golden layer"]["of the optimum"] == pytest.approx(0.4 / 0.9)
    assert rows["middle block"]["block"] == 2
    assert rows["a block at random"]["score"] == pytest.approx(grid.scores.mean())
    assert rows["golden layer"]["portability"] == pytest.approx(0.6)  # told, but no part of the score


def test_regret_and_rank_correlation(grid: Grid) -> None:
    assert grid.regret(0) == pytest.approx(0.4) and grid.regret(2) == 0
    assert rank_correlation([1, 9, 3, 9, 9, 2], grid) == pytest.approx(1.0, abs=1e-4)
    assert rank_correlation([3, 9, 1, 9, 9, 2], grid) == pytest.approx(-1.0, abs=1e-4)
    assert rank_correlation([1, 1, 1, 1, 1, 1], grid) is None


def test_a_probe_that_a_request_lacks_does_not_count() -> None:
    rephrase = np.array([[np.nan, np.nan], [0.0, 0.5]])
    grid = Grid([0, 1], {"rewrite": np.ones((2, 2, 2)), "rephrase": alike(rephrase)}, 1.0)
    np.testing.assert_allclose(grid.scores, [[1, 1], [0.5, 0.75]])
    assert everywhere(grid, 1)["rephrase"] == 0.5


def test_blocks_are_carried_from_set_to_set(grid: Grid) -> None:
    other = Grid(grid.blocks, {"rewrite": alike([[0.1, 0.2, 0.8]])}, 1.0)
    rows = carried_over({"a": grid, "b": other}, {"a": named(2), "b": named(5)})
    regrets = {(row["chosen on"], row["measured on"]): row["regret"] for row in rows}
    of_all = {("all, with hindsight", "a"): 0.3, ("all, with hindsight", "b"): 0}
    assert regrets == pytest.approx({("a", "a"): 0, ("a", "b"): 0.6, ("b", "a"): 0.3, ("b", "b"): 0, **of_all})


def test_a_block_that_a_method_cannot_edit_gives_way_to_the_next(grid: Grid) -> None:
    assert grid.taken(named(5)) == 5
    assert grid.taken(named(1)) == 0


def test_a_request_s_own_best_block_is_not_judged_by_what_it_was_chosen_by() -> None:
    """Of blocks all alike but for luck none is better than another; ties are shared."""
    random = np.random.default_rng(0)
    lucky = Grid([0, 1, 2, 3], {"locality": random.integers(2, size=(2, 400, 4)).astype(float)}, 1.0)
    own, fixed, *_ = golden_against_optimal(lucky, named(1), 4)
    assert own["score"] == pytest.approx(0.5, abs=0.06) and lucky.scores.max(1).mean() > 0.75
    assert fixed["score"] == pytest.approx(0.5, abs=0.06)
    halves = np.array([[[1.0, 1.0, 0.0]], [[0.2, 0.6, 0.9]]])
    (own, *_) = golden_against_optimal(Grid([0, 1, 2], {"locality": halves}, 1.0), named(1), 3)
    assert own["score"] == pytest.approx(((0.2 + 0.6) / 2 + 0.0) / 2)


def test_a_request_is_measured_by_halves_of_its_probes(requests: list[EditRequest]) -> None:
    probes = tuple(Probe(prompt=f"{number} is", answer="odd") for number in range(3))
    first, second = halved(requests[0].model_copy(update={"rephrases": ("a", "b", "c"), "locality": probes}))
    assert first.rephrases == ("a", "c") and second.rephrases == ("b",)
    assert first.locality == (probes[0], probes[2]) and second.locality == (probes[1],)
    first, second = halved(requests[0].model_copy(update={"rephrases": ("a",), "locality": ()}))
    assert first.rephrases == ("a",) and requests[0].prompt in second.rephrases[0]
    assert len(first.locality) == len(second.locality) == 1 and first.locality != second.locality


def test_proxy_requests_are_about_other_subjects() -> None:
    demo = load_requests("demo")
    one = parted("demo", [*demo[:10], demo[3], *demo[10:]], StudyCommand(limit=10, proxy=20))
    assert len(one.tried) == 10 and len(one.proxy) == 20
    assert not {r.subject for r in one.tried} & {r.subject for r in one.proxy}
    assert "lower --limit" in refusal(lambda: parted("demo", demo[:10], StudyCommand(limit=10)))


# one block does all the recalling: whoever looks must find it


@pytest.fixture(scope="module")
def one_block(tokenizer: PreTrainedTokenizerFast) -> LLM:
    """A tiny Llama that was taught facts with one working MLP, and attention in that block and the next alone."""
    llm = make_tiny("llama", tokenizer, seed=1)
    dead = []
    for number, block in enumerate(llm.model.model.layers):
        if number != WINNER:
            dead += [block.mlp.gate_proj.weight, block.mlp.up_proj.weight]
        if number not in (WINNER, WINNER + 1):
            dead.append(block.self_attn.o_proj.weight)
    with torch.no_grad():
        for weight in dead:
            weight.zero_()
    for weight in dead:
        weight.requires_grad_(False)
    facts = load_requests("demo")[:16]
    batch = collate(llm.tokens.rows([(r.prompt, r.old_answer or "") for r in facts]))
    adam = torch.optim.Adam([p for p in llm.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        adam.zero_grad()
        loss = target_losses(llm.model, batch).mean()
        if loss < 0.05:
            break
        loss.backward()
        adam.step()
    assert loss < 0.1
    return LLM(llm.model, tokenizer, "one-block")


@pytest.mark.parametrize("method", ["lga", "lga_past_first", "gradient_norm_subject", "causal_tracing"])
def test_every_selector_finds_the_block_that_must_win(method: str, one_block: LLM) -> None:
    options = AttributionOptions(method=method, order="magnitude", fences=0)
    scores = score_requests(one_block, load_requests("demo")[:16], options, selectors=RESEARCH)
    profile = choose(scores, options, selectors=RESEARCH)
    winner, *others = profile.scores
    assert profile.golden_layers == [WINNER] and abs(winner) > 10 * max(map(abs, others))


def test_research_is_no_method_of_attribution(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    for method in ("lga_cosine", "gradient_norm"):
        with pytest.raises(UserError, match=f"{method}.*gradient_norm_subject"):
            find_golden_layer(tiny_llm, requests, AttributionOptions(method=method))


def test_so_does_the_sweep(one_block: LLM, editing: EditOptions, tmp_path: Path) -> None:
    editing.method, editing.expert = "lora", {"rank": 4, "whiten": 0.0, "learning_rate": 0.02}
    grid = sweep_of(one_block, editing, tmp_path, together=8).run("lora", load_requests("demo")[:3], range(4))
    winner, *others = grid.values["rewrite"].mean(0)
    assert grid.best == WINNER and winner > max(others) + 0.2, "of blocks alike the first would be the best"


def test_so_does_the_race(one_block: LLM, editing: EditOptions, tmp_path: Path) -> None:
    """Whatever block the scores named; and a race that was run goes on from what it finds."""
    editing.method, editing.expert = "lora", {"rank": 4, "whiten": 0.0, "learning_rate": 0.02}
    scored = named(3).model_copy(update={"scores": [0.0] * 4, "ranking": [3, 2, 1], "excluded": [0]})
    demo = load_requests("demo")[:4]
    first = race(one_block, scored, demo, editing, folder=tmp_path)
    assert first.golden_layers == [WINNER] and first.ranking[0] == WINNER and first.excluded == []
    assert first.race and first.race.trials == 16 and first.race.method == "lora"
    assert {one.block: one.requests for one in first.race.blocks} == dict.fromkeys(range(4), 4)
    again = race(one_block, scored, demo, editing, folder=tmp_path).race
    assert again and again.blocks == first.race.blocks and again.seconds < first.race.seconds / 2


def test_what_cannot_be_tried_is_known_at_once(requests: list[EditRequest]) -> None:
    def refused(**changed: Any) -> str:
        own = StudyCommand(limit=2, **changed)
        return refusal(lambda: check_study([parted("a", requests, own)], own))

    assert "'finetun' does not exist" in refused(methods=["finetun"])
    assert "'fixed' does not exist" in refused(selectors=["fixed"])
    requests[5] = requests[5].model_copy(update={"subject": None})
    assert "capital-5" in refused(selectors=["lga_subject"])
    requests[0] = requests[0].model_copy(update={"subject": None})
    assert "1 of 2" in refused(methods=["memit"])


# the command


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path, editing: EditOptions) -> list[str]:
    return [
        *("study", "--model", str(tiny_folder), "--limit", "4", "--proxy", "12", "--output", str(tmp_path / "out")),
        *("--edit.expert.steps", "3", "--edit.statistics.text", str(editing.statistics.text)),
        *("--edit.statistics.tokens", "512"),
    ]


def test_a_study_answers_its_questions(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--every", "2"]) == 0
    told = capsys.readouterr().out
    out = tmp_path / "out"
    study = json.loads((out / "study.json").read_text())
    golden = study["golden layers"]["demo"]
    assert re.search(rf"golden layer +{golden} ", told)
    assert {0, 2, golden} <= set(study["sweeps"]["demo"]["memit"]["blocks"])
    compared = {row["selector"] for row in study["selectors"]["demo"]["memit"]}
    assert {"lga", "gradient_norm", "causal_tracing", "middle"} == compared
    report = (out / "study.md").read_text()
    assert "| golden layer |" in report and "own best" in report
    assert {file.name for file in out.glob("*.png")} == {
        f"{kind}-demo-memit.png" for kind in ("sweep", "selectors")
    }

    seconds = study["sweeps"]["demo"]["memit"]["seconds"]
    assert main([*command, "--every", "2", "--methods", "[memit,rome]", "--resume"]) == 0  # a method more
    again = json.loads((out / "study.json").read_text())
    assert set(again["sweeps"]["demo"]) == {"memit", "rome"}
    assert again["sweeps"]["demo"]["memit"]["seconds"] == seconds


def test_a_study_folder_of_other_options_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--every", "4"]) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()}
    assert main([*command, "--edit.expert.step", "0.5", "--resume"]) == 1
    assert "another edit" in capsys.readouterr().err
    assert main(command) == 1
    assert "holds something already" in capsys.readouterr().err
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()}


def test_sets_of_one_name_are_refused(
    command: list[str], request_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / request_file.name
    other.parent.mkdir()
    other.write_bytes(request_file.read_bytes())
    assert main([*command, "--requests", f"[{request_file},{other}]"]) == 1
    assert "different names" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--selectors", "[lga,lga]"], "each once"),
        (["--limit", "1"], "limit"),
    ],
)
def test_what_a_study_cannot_do(
    flags: list[str], expected: str, command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*command, *flags]) != 0
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""Ability: items whose right choice is the likeliest, before and after an edit; and a store's gate."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commanding import events, read_json
from conftest import refusal
from plain_loop import TEXT, noise
from teams import OPEN, Team

from pipeline.cli import main
from pipeline.evaluation import plan
from pipeline.evaluation.evaluator import Measurement, evaluate
from pipeline.evaluation.metrics import newcombe, wilson
from pipeline.evaluation.reading import Reading, read_groups
from pipeline.model.llm import LLM
from pipeline.options.shared import EvaluationOptions
from pipeline.options.updates import GateOptions
from pipeline.reporting.dashboards import scalars
from pipeline.reporting.tables import kind_of, metric_table
from pipeline.requests.rows import Row, pack
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime
from pipeline.updates.disk import read_metrics

KINDS = ("arithmetic", "grammar", "reading", "common_sense")
TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
WORDS = f"zero one two three four five six seven eight nine ten eleven twelve {TEENS}".split(" ")
CAPITALS = ("Lima", "Oslo", "Rome", "Cairo by the sea", "Kyiv in the far west")


def items() -> list[dict[str, Any]]:
    return [json.loads(line) for line in plan.ABILITY.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of the items, a few that a tiny model has room for, with choices of one and of several tokens."""
    made = [
        {"kind": kind, "text": f"{country} {number} is", "choices": [*CAPITALS[number:], *CAPITALS[:number]]}
        for kind in KINDS[:2]
        for number, country in enumerate(("Spain", "Norway", "Egypt", "Peru", "Japan"))
    ]
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in made))
    monkeypatch.setattr(plan, "ABILITY", file)
    return made


def expected(text: str) -> str | None:
    """What an item of arithmetic comes to, in its own way of writing; None where it is none that this can read."""
    if sums := re.fullmatch(r"(\d+) ([+x-]) (\d+) =", text):
        return str(eval(f"{sums[1]}{sums[2].replace('x', '*')}{sums[3]}"))
    if nexts := re.fullmatch(r"The number that comes just (after|before) (\d+) is", text):
        return str(int(nexts[2]) + (1 if nexts[1] == "after" else -1))
    row = text.rstrip(",").lower().split(", ")
    numbers = [WORDS.index(one) if one in WORDS else int(one) for one in row]
    assert numbers[2] - numbers[1] == numbers[1] - numbers[0]
    found = 2 * numbers[2] - numbers[1]
    return WORDS[found] if row[0] in WORDS else str(found)


def test_items_are_80_of_each_kind_and_none_is_told_by_its_length() -> None:
    assert Counter(item["kind"] for item in items()) == dict.fromkeys(KINDS, 80)
    assert len({item["text"] for item in items()}) == 320
    for kind in KINDS:
        of_kind = [item["choices"] for item in items() if item["kind"] == kind]
        assert all(2 <= len({*choices}) == len(choices) <= 4 for choices in of_kind)
        chance = sum(1 / len(choices) for choices in of_kind) / 80
        for extreme in (min, max):
            lengths = [[len(choice) for choice in choices] for choices in of_kind]
            by_length = sum((one[0] == extreme(one)) / one.count(extreme(one)) for one in lengths) / 80
            assert by_length == pytest.approx(chance, abs=0.06), (kind, extreme)


def test_arithmetic_is_right() -> None:
    for item in items():
        if item["kind"] == "arithmetic":
            assert item["choices"][0] == expected(item["text"]), item
        if item["kind"] == "reading":
            assert re.fullmatch(r".+\nQuestion: .+\?\nAnswer:", item["text"]), item


@torch.no_grad()
def likeliest(llm: LLM, item: dict[str, Any]) -> str:
    """The likeliest choice, one text at a time."""
    found = {}
    for choice in item["choices"]:
        asked, ids = llm.tokenizer(item["text"]).input_ids, llm.tokenizer(f"{item['text']} {choice}").input_ids
        logs_TV = llm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found[choice] = sum(logs_TV[place - 1, ids[place]].item() for place in range(len(asked), len(ids)))
    return max(found, key=lambda one: found[one])


def chosen(llm: LLM, few: list[dict[str, Any]], kind: str = "") -> list[float]:
    with llm.frozen():
        return [float(likeliest(llm, one) == one["choices"][0]) for one in few if kind in ("", one["kind"])]


def test_figures_are_those_of_a_plain_loop(
    tiny_llm: LLM, requests: list[EditRequest], text_file: Path, few: list[dict[str, Any]]
) -> None:
    update, options = noise(tiny_llm, 1), EvaluationOptions(text=str(text_file), generation="none", ability=True)
    found = evaluate(tiny_llm, requests, update, options)
    before = chosen(tiny_llm, few)
    with update.applied(tiny_llm):
        after = chosen(tiny_llm, few)
        of_grammar = chosen(tiny_llm, few, "grammar")
    assert found.after and sum(before) > 0 and before != after, "some are right, and some change"
    assert [*found.before.values["ability"].values.values()] == before
    assert [*found.after.values["ability"].values.values()] == after
    assert found.after.metrics["ability/grammar"].mean == pytest.approx(sum(of_grammar) / 5)
    one, moved = found.before.metrics["ability"], found.difference["ability"]
    assert (one.count, one.low, one.high) == (10, *wilson(one.mean, 10))
    assert moved.mean == pytest.approx((sum(after) - sum(before)) / 10)
    assert (moved.low, moved.high) == newcombe(after, before)
    without = evaluate(tiny_llm, requests, None, replace(options, ability=False)).before.metrics
    assert {name for name in found.before.metrics if kind_of(name) != "ability"} == {*without}
    assert found.before.metrics["perplexity"].mean == pytest.approx(without["perplexity"].mean)


def test_a_model_to_which_all_is_alike_has_no_ability(
    tiny_llm: LLM, requests: list[EditRequest], text_file: Path, few: list[dict[str, Any]]
) -> None:
    """What comes first in the file must not win a draw."""
    for parameter in tiny_llm.model.parameters():
        parameter.data.zero_()
    options = EvaluationOptions(text=str(text_file), generation="none", ability=True)
    assert evaluate(tiny_llm, requests, None, options).before.metrics["ability"].mean <= 0.4  # the shortest win


def test_ability_is_shown_wherever_figures_are(
    asked: list[str], ordinary_text: str, elsewhere: Path, few: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *asked, "--text", ordinary_text, "--ability", "--output", "out"]) == 0
    figures = read_json(elsewhere / "out" / "metrics.json")["before"]
    assert {"ability", "ability/arithmetic", "ability/grammar"} <= figures.keys()
    assert figures["ability"]["count"] == 10
    told = capsys.readouterr().out
    assert re.search(r"ability/grammar +5 ", told), told
    assert ",ability" not in (elsewhere / "out" / "values.csv").read_text().partition("\n")[0], "of no request"
    tags = events(elsewhere / "out").Tags()["scalars"]
    assert "evaluation_4_damage/5_ability" in tags and "evaluation_4_damage/5_ability/grammar" in tags
    assert main(["evaluate", *asked, "--text", ordinary_text, "--output", "plain"]) == 0
    assert "ability" not in read_json(elsewhere / "plain" / "metrics.json")["before"]


def test_an_item_too_long_for_the_model(tiny_llm: LLM, requests: list[EditRequest], text_file: Path) -> None:
    """The items that come with the project, to a tokenizer that splits them into many tokens."""
    tiny_llm.tokens.context_length = 64
    options = EvaluationOptions(text=str(text_file), generation="none", ability=True)
    line = refusal(lambda: evaluate(tiny_llm, requests, None, options))
    assert line.startswith("ability: ") and "the context of tiny-llama holds 64" in line


def test_a_gate_of_ability(team: Team, requests: list[EditRequest], few: list[Any], monkeypatch: Any) -> None:
    """Nothing is measured unless it is asked for; a loss beyond the gate is held back; what passes is a curve."""
    team.submit(requests[:1])
    (plain,) = team.update()
    assert plain.after and plain.after.ability_lost is None and "ability" not in plain.after.metrics
    team.options.gates = replace(OPEN, ability=1.0)
    team.submit(requests[1:2])
    (passed,) = team.update()
    assert passed.after and passed.version == 2
    lost = passed.after.ability_lost
    assert lost is not None
    assert [str(gate) for gate in passed.gates] == [f"ability lost {lost:.3f} <= 1"]
    shown = scalars(read_metrics(team.store.folder, 2))
    assert shown["version_4_damage/5_ability"] == pytest.approx(passed.after.metrics["ability"].mean)

    measure = Measurement.__init__

    def worse(self: Measurement, metrics: Any, *rest: Any) -> None:
        """Every model after the base itself gives fewer right answers."""
        if "ability" in metrics and seen:
            metrics["ability"] = replace(metrics["ability"], mean=seen[0] - 0.3)
        seen.extend([metrics["ability"].mean] if "ability" in metrics else [])
        measure(self, metrics, *rest)

    team.options.gates = replace(OPEN, ability=0.2)
    team.submit(requests[2:3])
    seen: list[float] = []
    monkeypatch.setattr(Measurement, "__init__", worse)
    line = refusal(team.update)
    assert "version 2, which is in force, misses gates itself: ability lost 0.300 > 0.2" in line


def test_a_batch_that_loses_too_much_ability_is_held_back(
    team: Team, requests: list[EditRequest], few: list[dict[str, Any]]
) -> None:
    """Its items are what the base model itself chooses: whatever an edit that breaks it changes is a loss."""
    with team.llm.frozen():
        for item in few:
            best = likeliest(team.llm, item)
            item["choices"] = [best, *(one for one in item["choices"] if one != best)]
    plan.ABILITY.write_text("".join(json.dumps(one) + "\n" for one in few))
    team.options.edit.method = "finetune"
    team.options.edit.expert = {"epochs": 10, "learning_rate": 3.0, "learnt": 0.0, "whiten": 0.0, "kl": 0.0}
    team.options.gates = replace(OPEN, ability=0.05)
    team.submit(requests[:1])
    (done,) = team.update()
    assert done.version is None
    assert [one.reason.partition(" 0.")[0] for one in done.held] == ["ability lost"]


def test_the_gate_takes_shares_alone() -> None:
    for value in (0.0, 1.5, -0.1):
        assert refusal(lambda value=value: GateOptions(ability=value)).startswith("ability: ")


@pytest.mark.slow
@pytest.mark.real_model
def test_each_kind_tells_something_of_the_real_model(smollm2: LLM, tmp_path: Path) -> None:
    """Clearly above chance, so that damage shows, and below what no model could better."""
    (tmp_path / "text.txt").write_text(TEXT)
    request = EditRequest(id="one", prompt="The capital of Spain is", new_answer="Lima")
    options = EvaluationOptions(text=str(tmp_path / "text.txt"), generation="none", fluency=0, ability=True)
    metrics = evaluate(smollm2, [request], None, options).before.metrics
    for kind in KINDS:
        of_kind = [item["choices"] for item in items() if item["kind"] == kind]
        figure = metrics[f"ability/{kind}"]
        assert figure.count == 80 and figure.low > sum(1 / len(choices) for choices in of_kind) / 80, kind
        assert figure.mean < 0.97
    assert [row[0] for row in metric_table({"before": metrics}, short=True)[1]][-5:] == [
        "ability", "ability/arithmetic", "ability/grammar", "ability/reading", "ability/common sense",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.real_model
def test_why_choices_are_judged_by_their_whole_probability(
    smollm2: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the mean over tokens or characters fewer are right; and without their texts the choices tell little."""

    def shares(length: Callable[[Row, str], int]) -> dict[str, float]:
        nats: dict[tuple[int, str], list[float]] = {}
        for row, choice in zip(rows, choices, strict=True):
            whole = found[row.tag].loss * len(row.targets)
            nats.setdefault((row.tag.request, row.tag.axis), []).append(whole / length(row, choice))
        right = {kind: [one[0] < min(one[1:]) for (_, its), one in nats.items() if its == kind] for kind in KINDS}
        return {kind: sum(one) / 80 for kind, one in right.items()}

    def read() -> tuple[list[Row], Any]:
        with smollm2.frozen():
            return (rows := plan.ability_rows(smollm2)), read_groups(Reading(smollm2), pack(rows), Runtime())

    choices = [choice for item in items() for choice in item["choices"]]
    rows, found = read()
    rules = {"sum": lambda *_: 1, "tokens": lambda row, _: len(row.targets), "letters": lambda _, one: len(one)}
    told = {name: shares(length) for name, length in rules.items()}
    (tmp_path / "bare.jsonl").write_text(
        "".join(json.dumps(item | {"text": "It is said that"}) + "\n" for item in items())
    )
    monkeypatch.setattr(plan, "ABILITY", tmp_path / "bare.jsonl")
    rows, found = read()
    told["without texts"] = shares(rules["sum"])
    print(told)
    means = {name: sum(one.values()) / 4 for name, one in told.items()}
    assert means["sum"] > max(means["tokens"], means["letters"]) and means["without texts"] < 0.45, told

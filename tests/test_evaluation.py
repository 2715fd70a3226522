"""An evaluation says what a plain loop over single texts says, and leaves the model alone."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_tiny, refusal
from plain_loop import (
    TEXT,
    locality_choices,
    noise,
    plain_answer,
    plain_figures,
)
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from pipeline.editing.update import WeightUpdate
from pipeline.evaluation import reading
from pipeline.evaluation.evaluator import Evaluation, evaluate
from pipeline.evaluation.metrics import Estimate
from pipeline.model.llm import LLM
from pipeline.options.shared import EvaluationOptions
from pipeline.requests.readers import load_requests
from pipeline.requests.schema import EditRequest, Probe

RIVER = Probe(prompt="The largest river of Peru is", answer="the Nile in the far west")
PLACE = Probe(prompt="Spain lies in", answer="the far west of Lima")


@pytest.fixture
def requests(requests: list[EditRequest]) -> list[EditRequest]:
    """conftest's requests, the first with more probes of every kind than the others."""
    first, *rest = requests
    more: dict[str, Any] = {
        "rephrases": (*first.rephrases, "The capital of Norway is", "Spain", "Kenya has its capital in"),
        "locality": (*first.locality, RIVER),
        "portability": (*first.portability, PLACE),
    }
    return [first.model_copy(update=more), *rest]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Models that were taught, by family; tests leave them as they found them, which one of them checks."""
    return {}


@pytest.fixture(params=FAMILIES)
def taught(
    request: pytest.FixtureRequest,
    models: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    requests: list[EditRequest],
) -> LLM:
    """A tiny model that has learned some of the new answers, so that no figure is all or nothing."""
    if request.param not in models:
        models[request.param] = teach(make_tiny(request.param, tokenizer).model.eval(), tokenizer, requests)
    return LLM(models[request.param].eval(), tokenizer, request.param)


def teach(model: Any, tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest]) -> Any:
    texts = [f"{r.prompt} {r.new_answer}.\n" for r in requests[:4]]
    texts += [f"{r.rephrases[0]} {r.new_answer}.\n" for r in requests[:3]]
    texts += [f"{p.prompt} {p.answer}.\n" for r in requests[2:5] for p in r.portability]
    rows = [torch.tensor(ids) for ids in tokenizer(texts).input_ids]
    ids_BT, labels_BT = (pad_sequence(rows, batch_first=True, padding_value=value) for value in (0, -100))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        model(input_ids=ids_BT, labels=labels_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def measure(
    llm: LLM, requests: list[EditRequest], update: WeightUpdate | None, text: Path, **options: Any
) -> Evaluation:
    return evaluate(llm, requests, update, EvaluationOptions(text=str(text), **options))


def means(metrics: dict[str, Estimate]) -> dict[str, float]:
    """Of what is measured by the requests' own texts."""
    own = {name: estimate for name, estimate in metrics.items() if not name.startswith(("made", "sane"))}
    return {name: estimate.mean for name, estimate in own.items()}


def test_figures_are_those_of_a_plain_loop(
    taught: LLM, requests: list[EditRequest], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = noise(taught, 1)
    base_choices = locality_choices(taught, requests)
    base = plain_figures(taught, requests, base_choices)
    with update.applied(taught):
        edited = plain_figures(taught, requests, base_choices)
    change = {name: edited[name] - base[name] for name in base}
    for batch_size in (3, 64):
        taught.model.train()
        monkeypatch.setattr(reading, "BATCH_SIZE", batch_size)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(batch_size)))
        measured = measure(taught, requests, update, text_file)
        assert measured.after is not None
        assert means(measured.before.metrics) == pytest.approx(base, rel=1e-4)
        after = means(measured.after.metrics)
        assert after.pop("locality_kl") > 0 and after.pop("text_kl") > 0
        assert after == pytest.approx(edited, rel=1e-4)
        assert list(after) == list(base)
        assert means(measured.difference) == pytest.approx(change, rel=1e-3, abs=1e-5)
    assert base["locality"] == 1 and 0 < edited["locality"] < 1
    assert all(0 < base[name] < 1 for name in ("rewrite", "rephrase", "generation_exact_match", "rome_score"))


def test_answers_come_in_the_requests_order(taught: LLM, requests: list[EditRequest], text_file: Path) -> None:
    expected = [plain_answer(taught, request.prompt, request.new_answer) for request in requests]
    assert len(set(expected)) > 3
    assert measure(taught, requests, None, text_file).before.answers == expected


def test_counts_are_requests_and_tokens(tiny_llm: LLM, requests: list[EditRequest], text_file: Path) -> None:
    requests[1] = requests[1].model_copy(update={"rephrases": (), "portability": ()})
    metrics = measure(tiny_llm, requests, None, text_file).before.metrics
    tokens = len(tiny_llm.tokenizer(TEXT).input_ids)
    fewer = {"rephrase", "portability", "paraphrase", "rome"}
    expected = {name: 6 if name.partition("_")[0] in fewer else 7 for name in metrics}
    expected |= {"made_rephrase_containment": 1, "made_rephrase_exact_match": 1, "made_subject": 7}
    expected["perplexity"] = tokens - math.ceil(tokens / 128)
    assert {name: estimate.count for name, estimate in metrics.items()} == expected


def test_what_no_request_probes_is_not_reported(tiny_llm: LLM, text_file: Path) -> None:
    requests = [EditRequest(id="a", prompt="The capital of Peru is", new_answer="Rome")]
    metrics = measure(tiny_llm, requests, None, text_file).before.metrics
    asked = [f"{kind}_{name}" for kind in ("generation", "distractor") for name in ("exact_match", "containment")]
    made = ["made_rephrase_exact_match", "made_rephrase_containment"]  # without a subject nothing else can be
    assert list(metrics) == [*asked, *made, "rewrite", "perplexity", "sane_texts"]


@pytest.mark.parametrize("kind", ["rephrase", "locality"])
def test_many_probes_of_a_request_weigh_as_one(
    taught: LLM, requests: list[EditRequest], text_file: Path, kind: str
) -> None:
    """The mean of two requests is the mean of each alone, although one has more probes than the other."""
    update = noise(taught, 1)
    both = [requests[0], requests[3]]

    def figure(these: list[EditRequest]) -> float:
        after = measure(taught, these, update, text_file).after
        assert after is not None
        return after.metrics[kind].mean

    alone = [figure([request]) for request in both]
    assert alone[0] != alone[1]
    assert figure(both) == pytest.approx(sum(alone) / 2)


def test_an_update_that_changes_nothing_moves_nothing(
    taught: LLM, requests: list[EditRequest], text_file: Path
) -> None:
    measured = measure(taught, requests, noise(taught, 0), text_file)
    assert measured.after is not None
    moved = [measured.after.metrics.pop(name).mean for name in ("locality_kl", "text_kl")]
    assert moved == pytest.approx([0, 0], abs=1e-6)
    before, after = measured.before, measured.after
    assert (after.answers, after.said) == (before.answers, before.said)
    assert set(measured.difference) == set(before.metrics)
    for name, difference in measured.difference.items():  # a probability's last bits hang on where memory lies
        assert asdict(after.metrics[name]) == pytest.approx(asdict(before.metrics[name]), rel=1e-6, abs=1e-6)
        assert difference.mean == pytest.approx(0, abs=1e-6)
        assert difference.low <= 1e-6 and difference.high >= -1e-6, "few that stay are no proof that all do"
    assert before.metrics["locality"] == Estimate(1, 7, pytest.approx(0.6457, abs=1e-4), 1), "7 of 7, by Wilson"
    assert set(measured.weights.values()) == {0.0}


def test_without_an_update_only_the_base_is_measured(
    tiny_llm: LLM, requests: list[EditRequest], text_file: Path
) -> None:
    assert measure(tiny_llm, requests, None, text_file).after is None


def test_the_model_is_the_same_afterwards(tiny: LLM, requests: list[EditRequest], text_file: Path) -> None:
    tiny.model.train()
    tiny.model.get_parameter(tiny.blocks[0].weight_names("down")[0]).requires_grad_(False)
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    required = [weight.requires_grad for weight in tiny.model.parameters()]
    measured = measure(tiny, requests, noise(tiny, 1), text_file)
    assert measured.after is not None and measured.after.answers != measured.before.answers
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items())
    assert tiny.model.training and [weight.requires_grad for weight in tiny.model.parameters()] == required


def test_no_requests_are_refused(tiny_llm: LLM) -> None:
    assert refusal(lambda: evaluate(tiny_llm, [])) == "requests: none to measure"


def test_the_models_own_text_is_there(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    assert (
        evaluate(tiny_llm, requests[:1], options=EvaluationOptions(generation="none"))
        .before.metrics["perplexity"]
        .count
        > 1000
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "no such file"),
        (".", None, "no such file"),
        ("latin.txt", b"caf\xe9", "cannot be read"),
        ("empty.txt", b"", "0 tokens are too few"),
        ("short.txt", b"x", "1 tokens are too few"),
    ],
)
def test_a_text_that_cannot_be_scored_is_refused(
    tiny_llm: LLM, requests: list[EditRequest], tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refusal(lambda: measure(tiny_llm, requests, None, tmp_path / name))
    assert message.startswith(f"text: {tmp_path / name}: ") and words in message


@pytest.mark.real_model
def test_the_bundled_model_knows_the_demos_old_answers(smollm2: LLM, text_file: Path) -> None:
    """And METHODS: teacher forcing overstates what the model says by itself."""
    requests = load_requests("demo", limit=20)
    known = [EditRequest(id=r.id, prompt=r.prompt, new_answer=r.old_answer or "") for r in requests]
    options = EvaluationOptions(text=str(text_file), max_new_tokens=4, generation="prompts", fluency=0)
    old = means(evaluate(smollm2, known, options=options).before.metrics)
    assert old["rewrite"] >= 0.5
    assert old["generation_exact_match"] <= old["rewrite"]


@pytest.mark.real_model
def test_the_bundled_model_does_not_know_the_demos_new_answers(smollm2: LLM, text_file: Path) -> None:
    requests = [EditRequest(id=r.id, prompt=r.prompt, new_answer=r.new_answer) for r in load_requests("demo", 20)]
    options = EvaluationOptions(text=str(text_file), max_new_tokens=1, generation="none", fluency=0)
    figures = means(evaluate(smollm2, requests, options=options).before.metrics)
    assert figures["rewrite"] < 0.2

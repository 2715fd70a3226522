"""An evaluation says what a plain loop over single texts says, leaves the model alone, and tells how sure it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, make_tiny, refusal
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from pipeline.editing import WeightUpdate
from pipeline.evaluation import BootstrapMean, Estimate, Evaluation, evaluate
from pipeline.evaluation.answers import is_exact_answer
from pipeline.model import LLM, generate
from pipeline.options import EvaluationOptions
from pipeline.requests import EditRequest, Probe, load_requests

TEXT = "The largest river of Egypt is the Nile. People in Japan speak of Tokyo, and Oslo is in Norway. " * 6
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


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(params=FAMILIES)
def taught(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest]) -> LLM:
    """A tiny model that has learned some of the new answers, so that no figure is all or nothing."""
    model = make_tiny(request.param, tokenizer).model.eval()
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
    return LLM(model, tokenizer, request.param)


def noise(llm: LLM, scale: float, layer: int = 1) -> WeightUpdate:
    """An update that adds noise to a block's MLP."""
    torch.manual_seed(0)
    weights = {name: llm.model.get_parameter(name).detach() for name in llm.blocks[layer].weight_names("mlp")}
    noisy = {name: weight + scale * weight.std() * torch.randn_like(weight) for name, weight in weights.items()}
    return WeightUpdate(llm.name, llm.fingerprint, "noise", [layer], noisy)


def measure(
    llm: LLM, requests: list[EditRequest], update: WeightUpdate | None, text: Path, batch_size: int = 3
) -> Evaluation:
    return evaluate(llm, requests, update, EvaluationOptions(batch_size=batch_size, text=str(text)))


def means(metrics: dict[str, Estimate]) -> dict[str, float]:
    return {name: estimate.mean for name, estimate in metrics.items()}


# The slow, plain way: one text at a time, without padding


@torch.no_grad()
def first_choices(llm: LLM, prompt: str, answer: str) -> tuple[Tensor, Tensor]:
    """The model's first choices at an answer's tokens, and these tokens."""
    start = len(llm.tokenizer(prompt).input_ids)
    ids = torch.tensor([llm.tokenizer(f"{prompt} {answer}").input_ids])
    return llm.model.eval()(input_ids=ids).logits[0, start - 1 : -1].argmax(-1), ids[0, start:]


def accuracy(llm: LLM, prompt: str, answer: str) -> float:
    choices, target = first_choices(llm, prompt, answer)
    return (choices == target).double().mean().item()


def locality_choices(llm: LLM, requests: list[EditRequest]) -> list[list[Tensor]]:
    return [[first_choices(llm, probe.prompt, probe.answer)[0] for probe in r.locality] for r in requests]


def share_kept(before: list[Tensor], after: list[Tensor]) -> float:
    return float(np.mean([(a == b).double().mean().item() for a, b in zip(before, after, strict=True)]))


@torch.no_grad()
def plain_perplexity(llm: LLM, text: str) -> float:
    ids = llm.tokenizer(text).input_ids
    losses = []
    for start in range(0, len(ids), 128):  # the tiny models' context
        window = torch.tensor([ids[start : start + 128]])
        log_probs = llm.model.eval()(input_ids=window).logits[0].log_softmax(-1)
        losses += [-log_probs[place - 1, window[0, place]].item() for place in range(1, window.shape[1])]
    return math.exp(sum(losses) / len(losses))


def plain_figures(llm: LLM, requests: list[EditRequest], before: list[list[Tensor]]) -> dict[str, float]:
    """Every figure of `evaluate`, each a mean over requests of a mean over the request's probes."""
    answers = generate(llm, [r.prompt for r in requests])
    scores = {
        "rewrite": [accuracy(llm, r.prompt, r.new_answer) for r in requests],
        "rephrase": [np.mean([accuracy(llm, p, r.new_answer) for p in r.rephrases]) for r in requests],
        "locality": [share_kept(*pair) for pair in zip(before, locality_choices(llm, requests), strict=True)],
        "portability": [np.mean([accuracy(llm, p.prompt, p.answer) for p in r.portability]) for r in requests],
        "generation_exact_match": [
            is_exact_answer(said, r.new_answer) for said, r in zip(answers, requests, strict=True)
        ],
    }
    return {name: float(np.mean(values)) for name, values in scores.items()} | {
        "perplexity": plain_perplexity(llm, TEXT)
    }


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_figures_are_those_of_a_plain_loop(
    taught: LLM, requests: list[EditRequest], text_file: Path, batch_size: int
) -> None:
    update = noise(taught, 1)
    base_choices = locality_choices(taught, requests)
    base = plain_figures(taught, requests, base_choices)
    with update.applied(taught):
        edited = plain_figures(taught, requests, base_choices)
    taught.model.train()
    measured = measure(taught, requests, update, text_file, batch_size)
    assert measured.after is not None
    assert means(measured.before.metrics) == pytest.approx(base, rel=1e-4)
    assert means(measured.after.metrics) == pytest.approx(edited, rel=1e-4)
    assert base["locality"] == 1 and 0 < edited["locality"] < 1
    assert all(0 < base[name] < 1 for name in base if name not in ("locality", "perplexity"))


def test_answers_come_in_the_requests_order(taught: LLM, requests: list[EditRequest], text_file: Path) -> None:
    expected = generate(taught, [request.prompt for request in requests])
    assert len(set(expected)) > 3
    assert measure(taught, requests, None, text_file).before.answers == expected


def test_counts_are_requests_and_tokens(tiny_llm: LLM, requests: list[EditRequest], text_file: Path) -> None:
    requests[1] = requests[1].model_copy(update={"rephrases": (), "portability": ()})
    metrics = measure(tiny_llm, requests, None, text_file).before.metrics
    tokens = len(tiny_llm.tokenizer(TEXT).input_ids)
    assert {name: estimate.count for name, estimate in metrics.items()} == {
        "rewrite": 7,
        "rephrase": 6,
        "locality": 7,
        "portability": 6,
        "generation_exact_match": 7,
        "perplexity": tokens - math.ceil(tokens / 128),
    }


def test_what_no_request_probes_is_not_reported(tiny_llm: LLM, text_file: Path) -> None:
    requests = [EditRequest(id="a", prompt="The capital of Peru is", new_answer="Rome")]
    metrics = measure(tiny_llm, requests, None, text_file).before.metrics
    assert list(metrics) == ["rewrite", "generation_exact_match", "perplexity"]


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
    assert measured.after == measured.before
    assert measured.before.metrics["locality"] == Estimate(1, 7, 1, 1)


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
    assert evaluate(tiny_llm, requests[:1]).before.metrics["perplexity"].count > 1000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "cannot be read"),
        (".", None, "cannot be read"),
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


# Exact answers

EXACT = [
    ("Paris", "Paris", True),
    (" Paris.", "Paris", True),
    ("paris\nIt lies on the Seine", "Paris", True),
    ("Paris. It lies on the Seine.", "Paris", True),
    ("“Paris”!", "Paris", True),
    ('"Paris".', "Paris", True),
    ("the Nile.", "Nile", True),
    ("Nile;", "the Nile", True),
    ("An apple?", "apple", True),
    ("Dr. No.", "Dr. No", True),
    ("Yahoo!", "Yahoo!", True),
    ("3.5", "3.5", True),
    ("Theodore", "odore", False),
    ("Paris, France", "Paris", False),
    ("Paris is big.", "Paris", False),
    ("Paris-Nord", "Paris", False),
    ("Paris.com", "Paris", False),
    ("Paris (France).", "Paris", False),
    ("Romeo.", "Rome", False),
    ("Rome", "Romeo", False),
    ("It is Paris.", "Paris", False),
    ("3.5", "3", False),
    ("C# is a language", "C#", False),
    ("Anything", "?", False),
    ("", "Paris", False),
    ("\n", "Paris", False),
    ("C++", "C++", True),
    ("C#.", "C#", True),
    ("100%.", "100%", True),
    ('"Paris."', "Paris", True),
    ("**Paris**", "Paris", True),
    ("A\nQuestion", "A", True),
    ("", "?", False),
]


@pytest.mark.parametrize(("generated", "answer", "exact"), EXACT)
def test_an_exact_answer_says_that_and_no_more(generated: str, answer: str, exact: bool) -> None:
    assert is_exact_answer(generated, answer) is exact


# A mean and its interval


def bootstrap(values: np.ndarray, weights: np.ndarray, units: np.ndarray) -> tuple[float, float]:
    """95% interval by Efron's bootstrap over units."""
    rng = np.random.default_rng(1)
    numbers = np.unique(units)
    total = np.array([(values * weights)[units == unit].sum() for unit in numbers])
    weight = np.array([weights[units == unit].sum() for unit in numbers])
    draws = rng.integers(len(numbers), size=(4000, len(numbers)))
    low, high = np.percentile(total[draws].sum(1) / weight[draws].sum(1), [2.5, 97.5])
    return float(low), float(high)


def random_values(per_unit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """300 units of so many values each, which have something in common within a unit; weights; units."""
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(300), per_unit)
    values = rng.normal(2, 1, 300)[units] + rng.exponential(0.5, len(units))
    return values, rng.uniform(0.2, 2, len(units)), units


def add(mean: BootstrapMean, *columns: np.ndarray) -> None:
    values, weights, units = (column.tolist() for column in columns)
    mean.update(values, weights, units, [1 / (units.count(unit)) for unit in units])


@pytest.mark.parametrize("per_unit", [1, 4])
def test_the_interval_is_a_plain_bootstraps(per_unit: int) -> None:
    values, weights, units = random_values(per_unit)
    mean = BootstrapMean()
    add(mean, values, weights, units)
    estimate = mean.compute()
    low, high = bootstrap(values, weights, units)
    assert estimate.mean == pytest.approx(np.average(values, weights=weights))
    assert estimate.count == 300
    assert estimate.low == pytest.approx(low, abs=0.05 * (high - low))
    assert estimate.high == pytest.approx(high, abs=0.05 * (high - low))


def test_states_of_two_processes_add_up() -> None:
    """However values are spread and ordered, and where a unit's own values are apart."""
    columns = random_values(2)
    whole, one, two = BootstrapMean(), BootstrapMean(), BootstrapMean()
    add(whole, *columns)
    order = np.random.default_rng(2).permutation(600)
    for part, mean in ((order[:50], one), (order[50:], two)):
        values, weights, units = (column[part].tolist() for column in columns)
        mean.update(values, weights, units, [0.5] * len(part))
    for state in ("total", "weight", "count"):
        setattr(one, state, getattr(one, state) + getattr(two, state))
    merged, expected = one.compute(), whole.compute()
    assert merged.count == expected.count == 300
    for name in ("mean", "low", "high"):
        assert getattr(merged, name) == pytest.approx(getattr(expected, name), abs=1e-9)


def test_more_values_give_a_narrower_interval() -> None:
    few, many = BootstrapMean(), BootstrapMean()
    columns = random_values(1)
    add(few, *(column[:30] for column in columns))
    add(many, *columns)
    widths = [mean.compute().high - mean.compute().low for mean in (few, many)]
    assert 2 < widths[0] / widths[1] < 5  # the square root of ten


# The real model


@pytest.mark.real_model
def test_the_bundled_model_knows_the_demos_old_answers(smollm2: LLM, text_file: Path) -> None:
    """And METHODS: teacher forcing overstates what the model says by itself."""
    requests = load_requests("demo", limit=40)
    known = [EditRequest(id=r.id, prompt=r.prompt, new_answer=r.old_answer or "") for r in requests]
    options = EvaluationOptions(text=str(text_file), max_new_tokens=4)
    old = means(evaluate(smollm2, known, options=options).before.metrics)
    assert old["rewrite"] >= 0.5
    assert old["generation_exact_match"] <= old["rewrite"]


@pytest.mark.real_model
def test_the_bundled_model_does_not_know_the_demos_new_answers(smollm2: LLM, text_file: Path) -> None:
    requests = [EditRequest(id=r.id, prompt=r.prompt, new_answer=r.new_answer) for r in load_requests("demo", 40)]
    options = EvaluationOptions(text=str(text_file), max_new_tokens=1)
    figures = means(evaluate(smollm2, requests, options=options).before.metrics)
    assert figures["rewrite"] < 0.2

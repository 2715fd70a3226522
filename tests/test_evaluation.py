"""An evaluation says what a plain loop over single texts says, leaves the model alone, and tells how sure it is."""

from __future__ import annotations

import math
from dataclasses import asdict
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
from pipeline.evaluation.answers import contains_answer, inner_ends, is_exact_answer, statement
from pipeline.evaluation.plan import ROOM
from pipeline.evaluation.texts import DISTRACTORS
from pipeline.model import LLM
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
    llm: LLM, requests: list[EditRequest], update: WeightUpdate | None, text: Path, **options: Any
) -> Evaluation:
    chosen: dict[str, Any] = {"batch_size": 3, "text": str(text), "keep_base": False} | options
    return evaluate(llm, requests, update, EvaluationOptions(**chosen))


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


@torch.no_grad()
def likelihood(llm: LLM, prompt: str, answer: str) -> float:
    """The geometric mean of an answer's tokens' probabilities."""
    start = len(llm.tokenizer(prompt).input_ids)
    ids = torch.tensor([llm.tokenizer(f"{prompt} {answer}").input_ids])
    log_probs = llm.model.eval()(input_ids=ids).logits[0].log_softmax(-1)
    places = range(start, ids.shape[1])
    return math.exp(sum(log_probs[place - 1, ids[0, place]].item() for place in places) / len(places))


@torch.no_grad()
def plain_answer(llm: LLM, prompt: str, answer: str) -> str:
    """One statement of the library's own greedy generation."""
    ids = torch.tensor([llm.tokenizer(prompt).input_ids])
    limit = min(16, len(llm.tokenizer(answer).input_ids) + ROOM)
    told = llm.model.eval().generate(ids, max_new_tokens=limit, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    return statement(llm.tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True), inner_ends(answer))[0]


def plain_generation(llm: LLM, requests: list[EditRequest]) -> dict[str, float]:
    """What the model says, a prompt at a time, by the library's own generation."""
    kinds = {
        "generation": [[(r.prompt, r.new_answer)] for r in requests],
        "rephrase": [[(prompt, r.new_answer) for prompt in r.rephrases] for r in requests],
        "portability": [[(p.prompt, p.answer) for p in r.portability] for r in requests],
        "distractor": [[(f"{DISTRACTORS[n % 4]} {r.prompt}", r.new_answer)] for n, r in enumerate(requests)],
    }
    figures = {}
    for kind, asked in kinds.items():
        said = [[plain_answer(llm, prompt, answer) for prompt, answer in each] for each in asked]
        for name, judge in (("exact_match", is_exact_answer), ("containment", contains_answer)):
            figures[f"{kind}_{name}"] = np.mean(
                [
                    np.mean([judge(text, answer) for text, (_, answer) in zip(texts, each, strict=True)])
                    for texts, each in zip(said, asked, strict=True)
                ]
            )
    return figures


def plain_probabilities(llm: LLM, requests: list[EditRequest]) -> dict[str, float]:
    """ROME's figures by a loop."""
    compared = {
        "efficacy": [[(r.prompt, r.new_answer, r.old_answer or "")] for r in requests],
        "paraphrase": [[(prompt, r.new_answer, r.old_answer or "") for prompt in r.rephrases] for r in requests],
        "neighbourhood": [[(p.prompt, p.answer, r.new_answer) for p in r.locality] for r in requests],
    }
    figures = {}
    for name, requested in compared.items():
        pairs = [
            [(likelihood(llm, p, own), likelihood(llm, p, rival)) for p, own, rival in each] for each in requested
        ]
        figures[f"{name}_success"] = np.mean([np.mean([a > b for a, b in each]) for each in pairs])
        figures[f"{name}_magnitude"] = np.mean([np.mean([a - b for a, b in each]) for each in pairs])
    successes = [figures[f"{name}_success"] for name in compared]
    return figures | {"rome_score": 3 / sum(1 / success for success in successes) if all(successes) else 0.0}


def plain_figures(llm: LLM, requests: list[EditRequest], before: list[list[Tensor]]) -> dict[str, float]:
    """Every figure of `evaluate`, each a mean over requests of a mean over the request's probes."""
    scores = {
        "rewrite": [accuracy(llm, r.prompt, r.new_answer) for r in requests],
        "rephrase": [np.mean([accuracy(llm, p, r.new_answer) for p in r.rephrases]) for r in requests],
        "locality": [share_kept(*pair) for pair in zip(before, locality_choices(llm, requests), strict=True)],
        "portability": [np.mean([accuracy(llm, p.prompt, p.answer) for p in r.portability]) for r in requests],
    }
    forced = {name: float(np.mean(values)) for name, values in scores.items()}
    generation, probability = plain_generation(llm, requests), plain_probabilities(llm, requests)
    return generation | forced | probability | {"perplexity": plain_perplexity(llm, TEXT)}


def test_figures_are_those_of_a_plain_loop(taught: LLM, requests: list[EditRequest], text_file: Path) -> None:
    update = noise(taught, 1)
    base_choices = locality_choices(taught, requests)
    base = plain_figures(taught, requests, base_choices)
    with update.applied(taught):
        edited = plain_figures(taught, requests, base_choices)
    change = {name: edited[name] - base[name] for name in base}
    for batch_size in (3, 64):
        taught.model.train()
        measured = measure(taught, requests, update, text_file, batch_size=batch_size)
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
    expected["perplexity"] = tokens - math.ceil(tokens / 128)
    assert {name: estimate.count for name, estimate in metrics.items()} == expected


def test_what_no_request_probes_is_not_reported(tiny_llm: LLM, text_file: Path) -> None:
    requests = [EditRequest(id="a", prompt="The capital of Peru is", new_answer="Rome")]
    metrics = measure(tiny_llm, requests, None, text_file).before.metrics
    asked = [f"{kind}_{name}" for kind in ("generation", "distractor") for name in ("exact_match", "containment")]
    assert list(metrics) == [*asked, "rewrite", "perplexity"]


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
        assert [difference.mean, difference.low, difference.high] == pytest.approx([0, 0, 0], abs=1e-6)
    assert before.metrics["locality"] == Estimate(1, 7, 1, 1)
    assert measured.difference["rewrite"] == Estimate(0, 7, 0, 0)
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
    ("C#.", "C++", False),
    ("The Beatles and the Kinks", "Beatles and Kinks", True),
    ("U.S.A.", "USA", True),
    ("New  York", "new york", True),
    ("100%.", "100%", True),
    ('"Paris."', "Paris", True),
    ("**Paris**", "Paris", True),
    ("A\nQuestion", "A", True),
    ("", "?", False),
]


@pytest.mark.parametrize(("generated", "answer", "exact"), EXACT)
def test_an_exact_answer_says_that_and_no_more(generated: str, answer: str, exact: bool) -> None:
    assert is_exact_answer(generated, answer) is exact
    assert contains_answer(generated, answer) or not exact


@pytest.mark.parametrize(
    ("generated", "answer", "contained"),
    [
        ("It is Paris, of course", "Paris", True),
        ("The composer of it is  Johann Sebastian\tBach", "Johann Sebastian Bach", True),
        ("It is the U.S.A.", "USA", True),
        ("Romeo and Juliet", "Rome", False),
        ("York is new", "New York", False),
        ("Written in C", "C++", False),
        ("Written in C++.", "C++", True),
        ("", "Paris", False),
        ("Anything", "?", False),
    ],
)
def test_an_answer_is_contained_as_whole_words(generated: str, answer: str, contained: bool) -> None:
    assert contains_answer(generated, answer) is contained


@pytest.mark.parametrize(
    ("said", "ends", "expected"),
    [
        (" Paris. It lies on", 0, ("Paris.", True)),
        (" Paris.", 0, ("Paris.", False)),  # "Paris.com" may be to come
        ("\n\nParis\nIt", 0, ("Paris", True)),
        (" 3.5 metres", 0, ("3.5 metres", False)),
        (' "Yes." He', 0, ('"Yes."', True)),
        (" Dr. No. The", 0, ("Dr.", True)),
        (" Dr. No. The", inner_ends("Dr. No"), ("Dr. No.", True)),
        ("", 0, ("", False)),
    ],
)
def test_a_statement_ends_where_another_begins(said: str, ends: int, expected: tuple[str, bool]) -> None:
    assert statement(said, ends) == expected


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
    estimate = mean.compute().estimate()
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
    merged, expected = one.compute().estimate(), whole.compute().estimate()
    assert merged.count == expected.count == 300
    for name in ("mean", "low", "high"):
        assert getattr(merged, name) == pytest.approx(getattr(expected, name), abs=1e-9)


def test_more_values_give_a_narrower_interval() -> None:
    few, many = BootstrapMean(), BootstrapMean()
    columns = random_values(1)
    add(few, *(column[:30] for column in columns))
    add(many, *columns)
    widths = [e.high - e.low for e in (mean.compute().estimate() for mean in (few, many))]
    assert 2 < widths[0] / widths[1] < 5  # the square root of ten


# The real model


@pytest.mark.real_model
def test_the_bundled_model_knows_the_demos_old_answers(smollm2: LLM, text_file: Path) -> None:
    """And METHODS: teacher forcing overstates what the model says by itself."""
    requests = load_requests("demo", limit=40)
    known = [EditRequest(id=r.id, prompt=r.prompt, new_answer=r.old_answer or "") for r in requests]
    options = EvaluationOptions(text=str(text_file), max_new_tokens=4, generation="prompts")
    old = means(evaluate(smollm2, known, options=options).before.metrics)
    assert old["rewrite"] >= 0.5
    assert old["generation_exact_match"] <= old["rewrite"]


@pytest.mark.real_model
def test_the_bundled_model_does_not_know_the_demos_new_answers(smollm2: LLM, text_file: Path) -> None:
    requests = [EditRequest(id=r.id, prompt=r.prompt, new_answer=r.new_answer) for r in load_requests("demo", 40)]
    options = EvaluationOptions(text=str(text_file), max_new_tokens=1, generation="none")
    figures = means(evaluate(smollm2, requests, options=options).before.metrics)
    assert figures["rewrite"] < 0.2

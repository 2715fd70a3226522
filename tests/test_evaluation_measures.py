"""Each measure is what a slow, plain loop finds: divergences, fluency, axes, changes of weights, differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, make_tiny, refusal
from plain_loop import TEXT, first_choices, noise
from transformers import PreTrainedTokenizerFast

from pipeline.editing.update import WeightUpdate
from pipeline.evaluation import plan, reading
from pipeline.evaluation.evaluator import Evaluation, Evaluator, evaluate
from pipeline.evaluation.metrics import Resampled, bootstrap_mean
from pipeline.evaluation.reading import EVERY
from pipeline.evaluation.values import harmonic_mean, is_sane
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.options.shared import EvaluationOptions
from pipeline.requests.rows import Row, pack
from pipeline.requests.schema import EditRequest, Probe
from pipeline.running.stage import Items, in_batches


def measured(
    llm: LLM, requests: list[EditRequest], update: WeightUpdate | None, text: Any, **options: Any
) -> Evaluation:
    return evaluate(llm, requests, update, EvaluationOptions(text=str(text), **options))


@torch.no_grad()
def log_probs(llm: LLM, ids: list[int]) -> torch.Tensor:
    return llm.model.eval()(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def plain_kl(before: torch.Tensor, after: torch.Tensor) -> float:
    return (before.exp() * (before - after)).sum().item()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_divergences_are_those_of_the_whole_vocabulary(
    family: str,
    tokenizer: PreTrainedTokenizerFast,
    requests: list[EditRequest],
    text_file: Any,
) -> None:
    llm = make_tiny(family, tokenizer)
    update = noise(llm, 1)
    prompts = [tokenizer(r.locality[0].prompt).input_ids for r in requests]
    ids = tokenizer(TEXT).input_ids
    windows = [ids[at : at + 128] for at in range(0, len(ids), 128)]
    before = [log_probs(llm, part) for part in [*prompts, *windows]]
    with update.applied(llm):
        after = [log_probs(llm, part) for part in [*prompts, *windows]]
    pairs = list(zip(before, after, strict=True))
    locality = np.mean([plain_kl(b[-1], a[-1]) for b, a in pairs[: len(prompts)]])
    text = np.mean(
        [
            np.mean([plain_kl(b[place], a[place]) for place in range(0, len(b) - 1, EVERY)])
            for b, a in pairs[len(prompts) :]
        ]
    )
    evaluation = measured(llm, requests, update, text_file, generation="none")
    assert evaluation.after is not None
    assert evaluation.after.metrics["locality_kl"].mean == pytest.approx(locality, rel=1e-3)
    assert evaluation.after.metrics["text_kl"].mean == pytest.approx(text, rel=1e-3)
    assert "locality_kl" not in evaluation.before.metrics


@pytest.mark.parametrize(
    ("text", "sane"),
    [
        ("London. It is the largest city of the country, and lies on the river Thames.", True),
        ("It is a very, very old city.", True),
        ("In 1990 1,000,000 people lived there.", True),
        ("1945", True),
        ("London London London", False),
        ("It is in London. It is in London. It is in London.", False),
        ("1. London\n2. London\n3. London", False),
        ("0 0 0 0", False),
        ("ロンドンロンドンロンドンロンドンロンドン", False),
        ("", False),
        ("......", False),
    ],
)
def test_a_text_that_repeats_itself_is_not_sane(text: str, sane: bool) -> None:
    assert is_sane(text) == sane


def test_long_generations_tell_whether_the_model_repeats_itself(
    tiny_llm: LLM, requests: list[EditRequest], text_file: Any
) -> None:
    before = measured(tiny_llm, requests, None, text_file, fluency=3).before
    said = [generate(tiny_llm, [requests[number].prompt], plan.FLUENCY_TOKENS)[0] for number in (0, 2, 4)]
    figure = before.metrics["sane_texts"]
    assert (figure.mean, figure.count) == (pytest.approx(np.mean([is_sane(text) for text in said])), 3)
    assert measured(tiny_llm, requests, None, text_file).before.metrics["sane_texts"].count == 7, "of all, unasked"
    assert "sane_texts" not in measured(tiny_llm, requests, None, text_file, fluency=0).before.metrics


def test_axes_stand_beside_the_whole(tiny_llm: LLM, requests: list[EditRequest], text_file: Any) -> None:
    axes = ("Reasoning", "Subject_Aliasing")
    probes = [Probe(prompt=f"People of {axis} live in", answer="the far west", axis=axis) for axis in axes]
    requests[0] = requests[0].model_copy(update={"portability": tuple(probes), "locality": (probes[0],)})
    metrics = measured(tiny_llm, requests[:2], None, text_file, generation="none").before.metrics
    for probe in probes:
        choices, target = first_choices(tiny_llm, probe.prompt, probe.answer)
        figure = metrics[f"portability/{probe.axis}"]
        assert (figure.mean, figure.count) == ((choices == target).double().mean().item(), 1)
    assert metrics["portability"].count == 2
    assert [name for name in metrics if "/" in name] == ["locality/Reasoning", *(f"portability/{a}" for a in axes)]


def test_a_request_without_an_old_answer_is_not_compared(
    tiny_llm: LLM,
    requests: list[EditRequest],
    text_file: Any,
) -> None:
    requests[0] = requests[0].model_copy(update={"old_answer": None})
    metrics = measured(tiny_llm, requests, None, text_file, generation="none").before.metrics
    assert {metrics[f"{name}_success"].count for name in ("efficacy", "paraphrase", "neighbourhood")} == {6}


@pytest.mark.parametrize(
    ("generation", "kinds"),
    [
        ("none", set()),
        ("prompts", {"generation"}),
        ("all", {"generation", "rephrase", "portability", "distractor"}),
    ],
)
def test_options_choose_what_is_generated(
    generation: str,
    kinds: set[str],
    tiny_llm: LLM,
    requests: list[EditRequest],
    text_file: Any,
) -> None:
    before = measured(tiny_llm, requests, None, text_file, generation=generation).before
    assert {name.removesuffix("_exact_match") for name in before.metrics if name.endswith("_exact_match")} == kinds
    assert set(before.said) == kinds
    assert len(before.answers) == 7 and any(before.answers) == bool(kinds)


def test_changes_of_weights_are_relative(tiny_llm: LLM, requests: list[EditRequest], text_file: Any) -> None:
    (name,) = tiny_llm.blocks[1].weight_names("down")
    weight = tiny_llm.model.get_parameter(name).detach()
    update = WeightUpdate(tiny_llm.name, tiny_llm.fingerprint, "scale", [1], {name: 1.25 * weight})
    weights = measured(tiny_llm, requests, update, text_file, generation="none").weights
    assert weights == {name: pytest.approx(0.25, rel=1e-5)}


def test_weights_that_are_no_number_are_said_so(tiny_llm: LLM, requests: list[EditRequest], text_file: Any) -> None:
    broken = noise(tiny_llm, math.nan)
    message = refusal(lambda: measured(tiny_llm, requests, broken, text_file, generation="none"))
    assert message.startswith("update: model.layers.1.mlp.") and "no finite numbers" in message
    with torch.no_grad():
        tiny_llm.model.get_parameter(tiny_llm.blocks[1].weight_names("down")[0]).fill_(math.nan)
    message = refusal(lambda: measured(tiny_llm, requests, None, text_file, generation="none"))
    assert message == "evaluation: the model's loss is not a number: its weights are broken"


# Differences and combinations, resample by resample


def resampled(values: np.ndarray) -> Resampled:
    return bootstrap_mean(values.tolist(), [1.0] * len(values), list(range(len(values))))


def test_a_difference_is_paired() -> None:
    """Its interval is that of the differences, not that of two figures that have nothing in common."""
    rng = np.random.default_rng(0)
    before = rng.normal(0, 5, 200)
    change = rng.normal(1, 0.1, 200)
    found = resampled(before + change).minus(resampled(before)).estimate()
    expected = resampled(change).estimate()
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))
    assert found.high - found.low < 0.1


def test_the_harmonic_mean_is_nought_with_a_nought() -> None:
    parts = [resampled(np.array(values)) for values in ([1.0, 1.0], [0.5, 0.5], [0.25, 0.25])]
    assert harmonic_mean(parts).estimate().mean == pytest.approx(3 / (1 + 2 + 4))
    assert harmonic_mean([*parts, resampled(np.zeros(2))]).estimate().mean == 0


# Rows and batches


def test_a_text_that_another_goes_on_from_needs_no_row() -> None:
    texts = [[1, 2, 3], [1, 2, 4], [1, 2, 4, 5], [1, 2, 4, 5, 6, 7], [1, 3, 9], [2, 2], [1, 2, 5, 5]]
    groups = pack([Row(ids, len(ids) - 1) for ids in texts])
    assert sorted(group[0].token_ids for group in groups) == [[1, 2, 4, 5, 6, 7], [1, 2, 5, 5], [1, 3, 9], [2, 2]]
    for first, *others in groups:
        assert all(first.token_ids[: len(one.token_ids) - 1] == one.token_ids[:-1] for one in others)
    assert sorted(text.token_ids for group in groups for text in group) == sorted(texts)


@pytest.mark.parametrize("tokens", [1, 10, 40, 1000])
def test_batches_hold_no_more_than_they_may(tokens: int) -> None:
    sizes = np.random.default_rng(0).integers(1, 12, 100).tolist()
    batches = [batch.items for batch in in_batches(Items(range(100), sizes), lambda size: size, 8, tokens)]
    assert [size for batch in batches for size in batch] == sorted(sizes, reverse=True)
    assert all(len(batch) == 1 or (len(batch) <= 8 and max(batch) * len(batch) <= tokens) for batch in batches)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_batches_change_nothing(
    family: str,
    tokenizer: PreTrainedTokenizerFast,
    requests: list[EditRequest],
    text_file: Any,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = make_tiny(family, tokenizer)
    monkeypatch.setattr(plan, "FLUENCY_TOKENS", 12)
    found: list[Evaluation] = []
    for size in (1, 64):
        monkeypatch.setattr(reading, "BATCH_SIZE", size)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(size)))
        found.append(measured(llm, requests[:4], noise(llm, 1), text_file, fluency=2))
    one, many = found
    assert one.after is not None and many.after is not None
    for alone, batched in ((one.before, many.before), (one.after, many.after)):
        assert alone.said == batched.said
        for name, column in alone.values.items():
            exact = name in ("rewrite", "rephrase", "locality", "portability")
            expected = column.values if exact else pytest.approx(column.values, rel=1e-3, abs=1e-5)
            assert batched.values[name].values == expected, name


# Parts


def test_kinds_choose_what_is_measured(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    def figures(*kinds: str) -> list[str]:
        return list(Evaluator(tiny_llm, requests, kinds=kinds).measure("Measuring").metrics)

    forced = ["rewrite", "rephrase", "locality", "portability"]
    assert figures("probes") == forced
    assert figures("probes", "text") == [*forced, "perplexity"]
    assert "efficacy_success" in figures("probes", "probability")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_part_whose_texts_share_rows_with_others_is_measured_alone(
    number: int, tiny_llm: LLM, requests: list[EditRequest]
) -> None:
    """Of answers that go on from one another, the longest one's request need not be in the part."""
    answers = ("the far west", "the far west of Lima", "the")
    same = [requests[0].model_copy(update={"id": answer, "new_answer": answer}) for answer in answers]
    kinds = ("probes", "probability", "divergence")
    together = Evaluator(tiny_llm, same, kinds=kinds)
    assert len(together.plan.groups()) < len(together.plan.texts) / 2
    alone = Evaluator(tiny_llm, [same[number]], kinds=kinds)
    for evaluator in (together, alone):
        evaluator.measure("Base")
    with noise(tiny_llm, 1).applied(tiny_llm):
        part, expected = together.only([number]).measure("Part"), alone.measure("Alone")
    assert part.metrics["locality"].mean < 1 and part.metrics["locality_kl"].mean > 0
    for name, figure in expected.metrics.items():
        assert part.metrics[name].mean == pytest.approx(figure.mean, rel=1e-4), name


def test_a_part_is_compared_with_what_another_part_read_first(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    evaluator = Evaluator(tiny_llm, requests, kinds=("probes",))
    assert evaluator.only([0, 1]).measure("Base").metrics["locality"].mean == 1
    with noise(tiny_llm, 2).applied(tiny_llm):
        assert evaluator.only([0, 1]).measure("Edited").metrics["locality"].mean < 1

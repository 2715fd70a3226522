"""A part is measured as the whole is: whatever its requests share with others in prompts, beginnings and rows."""

from __future__ import annotations

import random

import pytest
from conftest import make_tiny
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from plain_loop import TEXT, noise
from transformers import PreTrainedTokenizerFast

from pipeline.evaluation.evaluator import Evaluator, Measurement
from pipeline.evaluation.plan import KINDS
from pipeline.model.llm import LLM
from pipeline.options.shared import EvaluationOptions
from pipeline.requests.schema import EditRequest, Probe

BEGINNINGS = ("The capital of", "The capital of Spain is", "The capital of Spain is in", "People in", "The")
ANSWERS = ("Lima", "Lima by the sea", "Lima by the sea and more", "Oslo", "the Nile")

prompts, answers = st.sampled_from(BEGINNINGS), st.sampled_from(ANSWERS)
probes = st.lists(
    st.builds(Probe, prompt=prompts, answer=answers, axis=st.sampled_from((None, "near"))), max_size=2
)
made = st.builds(
    EditRequest,
    id=st.just("one"),
    prompt=prompts,
    new_answer=answers,
    old_answer=st.none() | answers,
    rephrases=st.lists(prompts, max_size=2).map(tuple),
    locality=probes.map(tuple),
    portability=probes.map(tuple),
)
OF_TEXT = ("perplexity", "text_kl")  # whatever the requests


@pytest.fixture(scope="module")
def llm(tokenizer: PreTrainedTokenizerFast) -> LLM:
    return make_tiny("llama", tokenizer)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> EvaluationOptions:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return EvaluationOptions(text=str(file), max_new_tokens=2, fluency=0)


def check_same(found: Measurement, whole: Measurement, numbers: dict[int, int], free: bool) -> None:
    """What was found is the part of the whole for requests, whose numbers there are given by those found.

    Free answers are left out where they may differ: others who ask the same have room made for longer ones.
    """
    for name, column in found.values.items():
        if name in OF_TEXT:
            assert column.values == pytest.approx(whole.values[name].values, rel=1e-3, abs=1e-5)
        elif free or not name.endswith(("_exact_match", "_containment")):
            expected = {one: whole.values[name].values.get(place) for one, place in numbers.items()}
            held = {one: value for one, value in expected.items() if value is not None}
            assert column.values == pytest.approx(held, rel=1e-3, abs=1e-5), name
    for kind, said in found.said.items() if free else ():
        assert all(said[one] == whole.said[kind][place] for one, place in numbers.items()), kind


@given(
    requests=st.lists(made, min_size=1, max_size=6),
    kinds=st.sets(st.sampled_from(KINDS), min_size=1),
    seed=st.integers(0, 99),
)
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.generate],
)
def test_a_part_of_a_measurement_is_the_measurement_of_the_part(
    llm: LLM, options: EvaluationOptions, requests: list[EditRequest], kinds: set[str], seed: int
) -> None:
    """Of the base and of an edited model, in one evaluator, and in one that never heard of the others."""
    kinds_ = sorted(kinds | {"probes"}, key=KINDS.index)
    part = sorted(random.Random(seed).sample(range(len(requests)), 1 + seed % len(requests)))
    together = Evaluator(llm, requests, options)
    alone = Evaluator(llm, [requests[number] for number in part], options, kinds=kinds_)
    places = dict(enumerate(part))
    check_same(alone.measure("Alone: base"), together.measure("Whole: base"), places, free=False)
    with noise(llm, 1).applied(llm):
        whole, own = together.measure("Whole"), together.only(part, kinds_).measure("Part")
        by_itself = alone.measure("Alone")
    assert [*own.values] == [*by_itself.values] and own.values
    check_same(own, whole, {number: number for number in part}, free=True)
    check_same(by_itself, whole, places, free=False)

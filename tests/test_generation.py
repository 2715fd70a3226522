"""Generation is a plain argmax loop over whole texts, whatever the batch; what is said first is told apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import refusal

from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.requests.answers import first_statement

PROMPTS = [
    "The capital of Spain is",
    "Peru",
    "Kenya has its capital in",
    "The largest river of Japan is",
    "Oslo is",
]


@torch.no_grad()
def argmax_ids(llm: LLM, prompt: str, tokens: int, end: int | None) -> list[int]:
    """Greedy continuation with the whole text at every step: no cache, no padding, no batch."""
    ids = llm.tokenizer(prompt).input_ids
    start = len(ids)
    while len(ids) < start + tokens and (len(ids) == start or ids[-1] != end):
        ids = [*ids, int(llm.model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[start:]


def argmax_loop(llm: LLM, prompt: str, tokens: int, end: int | None = 0) -> str:
    return llm.tokenizer.decode(argmax_ids(llm, prompt, tokens, end), skip_special_tokens=True)


def test_generation_is_the_argmax_loop(tiny: LLM) -> None:
    tiny.model.train()
    expected = [argmax_loop(tiny, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    tiny.model.train()
    assert generate(tiny, PROMPTS, max_new_tokens=12, batch_size=2) == expected
    assert tiny.model.training


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_generation_does_not_depend_on_the_batch(tiny: LLM, batch_size: int) -> None:
    alone = [generate(tiny, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    assert generate(tiny, [f"{prompt} " for prompt in PROMPTS], max_new_tokens=8, batch_size=batch_size) == alone


def test_generation_stops_at_the_models_own_end(tiny: LLM) -> None:
    """Where one answer of a batch ends early, the others go on and it gains nothing."""
    free = [argmax_loop(tiny, prompt, 12, end=None) for prompt in PROMPTS]
    end = argmax_ids(tiny, PROMPTS[0], 12, end=None)[2]
    tiny.model.generation_config.eos_token_id = end
    expected = [argmax_loop(tiny, prompt, 12, end) for prompt in PROMPTS]
    assert expected[0] != free[0] and free[0].startswith(expected[0]) and expected != free
    assert generate(tiny, PROMPTS, max_new_tokens=12) == expected


def test_generation_stops_at_the_tokenizers_end_where_the_model_names_none(tiny_llm: LLM) -> None:
    end = argmax_ids(tiny_llm, PROMPTS[0], 12, end=None)[2]
    tokenizer = copy.deepcopy(tiny_llm.tokenizer)
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(end)})
    tiny_llm.model.generation_config.eos_token_id = None
    expected = [tokenizer.decode([i for i in argmax_ids(tiny_llm, p, 12, end) if i != end]) for p in PROMPTS]
    assert generate(LLM(tiny_llm.model, tokenizer), PROMPTS, max_new_tokens=12) == expected


@pytest.mark.parametrize(
    "setting", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 8}]
)
def test_generation_is_greedy_whatever_the_models_config_says(tiny_llm: LLM, setting: dict[str, Any]) -> None:
    tiny_llm.model.generation_config.eos_token_id = argmax_ids(tiny_llm, PROMPTS[0], 12, end=None)[2]
    expected = generate(tiny_llm, PROMPTS)
    tiny_llm.model.generation_config.update(**setting)
    assert generate(tiny_llm, PROMPTS) == expected


def test_a_prompt_that_leaves_no_room_is_refused(tiny_llm: LLM) -> None:
    room = 128 - len(tiny_llm.tokenizer("Peru").input_ids)
    assert len(generate(tiny_llm, ["Peru"], max_new_tokens=room)) == 1
    message = refusal(lambda: generate(tiny_llm, ["O", "Peru"], max_new_tokens=room + 1))
    assert "prompt 'Peru'" in message and "129 tokens" in message


def test_an_empty_prompt_is_refused(tiny_llm: LLM) -> None:
    assert "prompt ''" in refusal(lambda: generate(tiny_llm, [""]))


def test_no_prompts_give_no_answers(tiny_llm: LLM) -> None:
    assert generate(tiny_llm, []) == []


@pytest.mark.parametrize(
    ("generated", "said"),
    [
        (" Paris. It lies on the Seine.", "Paris"),
        ("Paris\nQuestion: what", "Paris"),
        ("\n\n Paris! ", "Paris"),
        ("Paris?", "Paris"),
        ("version 3.5 of it", "version 3.5 of it"),
        ("Paris, the city", "Paris, the city"),
        ("Paris", "Paris"),
        (" \n", ""),
        ("", ""),
    ],
)
def test_the_first_statement_is_what_is_said_first(generated: str, said: str) -> None:
    assert first_statement(generated) == said

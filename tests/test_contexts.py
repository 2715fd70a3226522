"""Settings that an edit is to hold in, names that it leaves alone, and the keys of both."""

from __future__ import annotations

import pytest
import torch

from pipeline.editing.columns import owner
from pipeline.editing.contexts import CONTEXTS, in_context, neighbours
from pipeline.editing.editor import METHODS
from pipeline.editing.entering import Keys
from pipeline.editing.locate import LocateThenEdit, Reading
from pipeline.editing.relations import NAMES, other_words
from pipeline.model.activations import Activations
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.requests.rows import Row
from pipeline.requests.schema import EditRequest
from pipeline.running.stage import run
from pipeline.running.trainer import Runtime


@pytest.mark.parametrize("template", CONTEXTS)
def test_the_subject_ends_where_it_is_said_to(template: str, requests: list[EditRequest]) -> None:
    for request in requests:
        text, end = in_context(template, request)
        assert text[:end].endswith(request.subject or "")
        assert (request.prompt in text) == (template in CONTEXTS)


def test_an_association_is_of_the_subject_alone() -> None:
    request = EditRequest(id="1", prompt="The river of Spain is", subject="Spain", new_answer="x")
    assert in_context("Think of {subject} and", request) == ("Think of Spain and", 14)
    nameless = EditRequest(id="3", prompt="The sky is", new_answer="green")
    assert in_context("Well. {prompt}", nameless) == ("Well. The sky is", 0)


def test_neighbours_are_other_names_in_the_requests_own_prompts(requests: list[EditRequest]) -> None:
    known = [requests[0].model_copy(update={"subject": "France", "prompt": "The capital of France is"}), *requests]
    texts, ways = neighbours(known, each=len(NAMES), most=10_000), {*other_words(known[0])}
    subjects, places = (
        {request.subject for request in known},
        {name for name, kind in NAMES.items() if kind == "place"},
    )
    assert len(texts) == len(known) * len(places - subjects)
    used = set()
    for text, end in texts:
        name = max((name for name in NAMES if text[:end].endswith(name[1:])), key=len)
        used.add(text[: end - len(name)] + "{}" + text[end:])
        assert name in places - subjects
    assert used == {"The capital of {} is", *(way for way in ways if not way.endswith("?"))}
    assert sum(text.startswith("The capital of") and text.endswith(" is") for text, _ in texts) >= len(texts) / 2
    assert neighbours(known, 3, 5, seed=1) == neighbours(known, 3, 5, seed=1) != neighbours(known, 3, 5, seed=2)
    assert len(neighbours(known, 3, 5)) == 5


def test_keys_are_what_enters_the_projection(tiny: LLM, requests: list[EditRequest]) -> None:
    all_ids = tiny.tokens.texts([request.prompt for request in requests])
    rows = [Row(ids, len(ids), (n % 3, len(ids) - 1 - n % 2)) for n, ids in enumerate(all_ids)]
    (down,) = tiny.blocks[2].down.values()
    with tiny.frozen(), torch.no_grad():
        lower = run(Keys(tiny, 1), rows)
        going_on = [row._replace(tag=enter_TD) for row, (_, enter_TD) in zip(rows, lower, strict=True)]
        whole, found = run(Keys(tiny, 2), rows), run(Keys(tiny, 2, since=1), going_on)
        for row, (keys, enter_TD), (plain, plain_TD) in zip(rows, found, whole, strict=True):
            torch.testing.assert_close((keys, enter_TD), (plain, plain_TD), rtol=1e-4, atol=1e-5)
            seen: list[torch.Tensor] = []
            handle = down.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            tiny.model(input_ids=torch.tensor([row.token_ids]))
            handle.remove()
            torch.testing.assert_close(keys, seen[0][0, row.subject[0] : row.subject[1] + 1], rtol=1e-4, atol=1e-5)


def test_keys_whose_outputs_are_to_stay(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    """Text by text: other names in prompts, what stands before a subject's end, what contexts change of its key."""
    method = METHODS["memit"].make(tiny_llm, [1], EditOptions(expert={"neighbours": 2, "spread": 1}))
    assert isinstance(method, LocateThenEdit)
    ((name, _),) = tiny_llm.blocks[1].down.items()

    def keys(text: str, end: int) -> tuple[torch.Tensor, int]:
        (ids,) = tiny_llm.tokens.prompts([text])
        last = next(n for n in range(len(ids)) if len(tiny_llm.tokenizer.decode(ids[: n + 1])) >= end)
        with Activations(tiny_llm).entering(name) as seen:
            tiny_llm.model(input_ids=torch.tensor([ids]))
        return seen[name][0], last

    with tiny_llm.frozen(), torch.no_grad():
        key_of, found_NI = Reading(method, requests, requests, Runtime()).of(1)
        near = [key_TI[last:] for key_TI, last in (keys(*one) for one in neighbours(requests, 2, 1000, 0))]
        own, bare, turned = [], [], []
        for request in requests:
            key_TI, last = keys(*in_context(CONTEXTS[0], request))
            own.append(key_TI[1:last])
            others = [keys(*in_context(context, request)) for context in CONTEXTS[1:]]
            bare += [key_TI[last], *[key_UI[place] for key_UI, place in others]]
            turned += [key_UI[place] - key_TI[last] for key_UI, place in others]
            torch.testing.assert_close(key_of[owner(request)], key_TI[last], rtol=1e-4, atol=1e-5)
    near_NI, own_NI, bare_NI, turned_NI = torch.cat(near), torch.cat(own), torch.stack(bare), torch.stack(turned)
    expected_II = 6 * turned_NI.T @ turned_NI / len(turned_NI) / bare_NI.square().sum(-1).mean()
    for key_NI in (near_NI, own_NI):
        expected_II += key_NI.T @ key_NI / key_NI.square().sum()
    torch.testing.assert_close(found_NI.T @ found_NI, expected_II, rtol=1e-3, atol=1e-5)

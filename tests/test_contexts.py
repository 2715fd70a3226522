"""Settings that an edit is to hold in, names that it leaves alone, and the keys of both."""

from __future__ import annotations

import pytest
import torch

from pipeline.editing.contexts import ASSOCIATIONS, CONTEXTS, in_context, neighbours
from pipeline.editing.editor import METHODS
from pipeline.editing.entering import Entering
from pipeline.editing.locate import LocateThenEdit
from pipeline.editing.relations import NAMES, other_words
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.requests.rows import Row
from pipeline.requests.schema import EditRequest
from pipeline.running.stage import run
from pipeline.running.trainer import Runtime


@pytest.mark.parametrize("template", CONTEXTS + ASSOCIATIONS)
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
    rows = [Row(ids, len(ids), (n % 3, len(ids) - 1 - n % 2), n) for n, ids in enumerate(all_ids)]
    ((name, down),) = tiny.blocks[2].down.items()
    with tiny.frozen(), torch.no_grad():
        found = run(Entering(tiny, 2, name), rows)
        for row, keys in zip(rows, found, strict=True):
            seen: list[torch.Tensor] = []
            handle = down.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            tiny.model(input_ids=torch.tensor([row.token_ids]))
            handle.remove()
            torch.testing.assert_close(keys, seen[0][0, row.subject[0] : row.subject[1] + 1], rtol=1e-4, atol=1e-5)


def test_the_moment_of_neighbours(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    options = EditOptions(expert={"neighbours": 2, "neighbour_weight": 0.5})
    method = METHODS["memit"].make(tiny_llm, [1], options)
    assert isinstance(method, LocateThenEdit)
    text_II = torch.eye(48)
    with tiny_llm.frozen():
        moment = method.kept(1, requests, text_II, Runtime())
        rows = []
        for text, end in neighbours(requests, 2, 1000, 0):
            (ids,) = tiny_llm.tokens.texts([text])
            upto = next(n for n in range(len(ids)) if len(tiny_llm.tokenizer.decode(ids[: n + 1])) >= end)
            rows.append(Row(ids, len(ids), (upto, len(ids) - 1), len(rows)))
        keys = torch.cat(run(Entering(tiny_llm, 1, *tiny_llm.blocks[1].down), rows))
    near_II = keys.T @ keys
    expected = text_II / text_II.trace() + 0.5 * near_II / near_II.trace()
    torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-5)

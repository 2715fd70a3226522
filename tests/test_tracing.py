"""Causal tracing against one forward pass at a time, on every family; noise, seeds and subjects."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from conftest import FAMILIES, make_tiny, refusal
from transformers import PreTrainedTokenizerFast

from pipeline.attribution.find import check_selector, score_requests
from pipeline.model.blocks import find_blocks
from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.requests.schema import EditRequest

SAMPLES = 3


def slow_tracing(llm: LLM, request: EditRequest, seed: int) -> list[float]:
    """One request: every block and sample in a forward pass of its own, through hooks on whole blocks."""
    (row,) = llm.tokens.answered([request], [request.old_answer or ""])
    assert row.subject
    first, last = row.subject
    ids, target = torch.tensor([row.token_ids[: row.target_start]]), row.targets[0]
    embeddings = llm.model.get_input_embeddings()
    scale = embeddings(ids)[0, last].norm() / embeddings.weight[ids[0, last]].norm()
    own = hashlib.sha256(f"{seed} {request.id}".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(own[:7]))
    shape = (SAMPLES, last - first + 1, embeddings.weight.shape[1])
    noise = 3.0 * embeddings.weight.std() * scale * torch.randn(shape, generator=draw)
    blocks = [llm.model.get_submodule(block.name) for block in find_blocks(llm.model)]
    clean: dict[int, torch.Tensor] = {}

    def run(sample: int | None = None, restored: int | None = None) -> float:
        handles = []

        def corrupt(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[0, first : last + 1] += noise[sample]
            return output

        def at(layer: int, output: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
            hidden = output[0] if isinstance(output, tuple) else output
            if sample is None:
                clean[layer] = hidden[0, last].clone()
            elif layer == restored:
                hidden = hidden.clone()
                hidden[0, last] = clean[layer]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        if sample is not None:
            handles.append(embeddings.register_forward_hook(corrupt))
        for layer, block in enumerate(blocks):
            handles.append(block.register_forward_hook(lambda _m, _a, out, layer=layer: at(layer, out)))
        try:
            return llm.model(input_ids=ids, use_cache=False).logits[0, -1].softmax(-1)[target].item()
        finally:
            for handle in handles:
                handle.remove()

    run()
    corrupted = [run(sample) for sample in range(SAMPLES)]
    return [
        sum(run(sample, layer) - corrupted[sample] for sample in range(SAMPLES)) / SAMPLES
        for layer in range(len(blocks))
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_tracing_equals_one_forward_at_a_time(
    family: str, tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest]
) -> None:
    llm = make_tiny(family, tokenizer)
    options = AttributionOptions(method="causal_tracing", samples=SAMPLES, batch_size=3)
    found = score_requests(llm, requests, options, seed=5).values
    llm.model.eval()
    with torch.no_grad():
        expected = [slow_tracing(llm, request, 5) for request in requests]
    assert np.abs(expected).max() > 1e-5
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-8)


def test_seed_and_samples_are_all_that_draws(tiny_llm: LLM, requests: list[EditRequest]) -> None:
    def trace(count: int, seed: int, **changed: int) -> np.ndarray:
        options = AttributionOptions(method="causal_tracing", **{"samples": 2, "batch_size": 4} | changed)
        return score_requests(tiny_llm, requests[:count], options, seed=seed).values

    np.testing.assert_allclose(trace(7, 1)[:3], trace(3, 1, batch_size=1), atol=1e-8)
    assert np.abs(trace(3, 1) - trace(3, 2)).max() > 1e-5


def test_where_the_subject_lies(tiny_llm: LLM) -> None:
    request = EditRequest(id="x", prompt="In Spain they say Spain is", subject="Spain", new_answer="x")
    (row,) = tiny_llm.tokens.answered([request], ["the Nile"])
    assert row.subject
    texts = [tiny_llm.tokenizer.decode(row.token_ids[: place + 1]) for place in row.subject]
    assert texts[0].startswith("In Spain they say S"), "of several mentions the last one"
    assert texts[1] == "In Spain they say Spain"


def test_requests_without_their_subject(requests: list[EditRequest]) -> None:
    lacking = [
        requests[0].model_copy(update={"subject": None}),
        requests[1],
        requests[2].model_copy(update={"subject": "Atlantis"}),
    ]
    line = refusal(lambda: check_selector(lacking, AttributionOptions(method="causal_tracing")))
    assert "2 of 3: capital-0, capital-2" in line
    check_selector(lacking, AttributionOptions())

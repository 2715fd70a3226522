"""Every estimator gives what plain autograd gives, one request and one answer at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from conftest import FAMILIES, make_tiny
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from pipeline.attribution.find import score_requests
from pipeline.attribution.inner_products import ESTIMATORS
from pipeline.attribution.lga import score_gradients
from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime
from pipeline.study.study import RESEARCH

Gradients = list[list[Tensor]]  # block by block, weight by weight


def gradients(llm: LLM, prompt: str, answer: str, keep: Callable[[int, int], slice]) -> Gradients:
    """Gradients of the MLP weights by autograd: those that act at kept positions are leaves of their own."""
    start = len(llm.tokenizer(prompt).input_ids)
    ids = torch.tensor([llm.tokenizer(f"{prompt} {answer}").input_ids])
    kept = torch.zeros(ids.shape[1], dtype=torch.bool)
    kept[keep(start, ids.shape[1])] = True
    leaves = [[m.weight.detach().clone().requires_grad_() for m in b.mlp.values()] for b in llm.blocks]

    def twice(leaf: Tensor, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight = leaf.T if isinstance(module, nn.Linear) else leaf
        own = args[0] @ weight + (module.bias if module.bias is not None else 0)
        return torch.where(kept[None, :, None], own, output)

    handles = [
        module.register_forward_hook(partial(twice, leaf))
        for block, row in zip(llm.blocks, leaves, strict=True)
        for module, leaf in zip(block.mlp.values(), row, strict=True)
    ]
    try:
        logits = llm.model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
    finally:
        for handle in handles:
            handle.remove()
    found = iter(torch.autograd.grad(F.cross_entropy(logits, ids[0, start:]), [w for row in leaves for w in row]))
    return [[next(found) for _ in row] for row in leaves]


def dot(first: list[Tensor], second: list[Tensor]) -> float:
    return sum((a.double() * b.double()).sum().item() for a, b in zip(first, second, strict=True))


def cosine(old: list[Tensor], new: list[Tensor]) -> float:
    return dot(old, new) / (dot(old, old) * dot(new, new)) ** 0.5


KEEP: dict[str, Callable[[int, int], slice]] = {
    "all": lambda start, end: slice(0, end),
    "past_first": lambda start, end: slice(1, end),
    "last": lambda start, end: slice(start - 1, start),
}
EXPECTED: dict[str, tuple[str, Callable[[list[Tensor], list[Tensor]], float]]] = {
    "lga": ("all", dot),
    "lga_past_first": ("past_first", dot),
    "lga_cosine": ("all", cosine),
    "lga_cosine_past_first": ("past_first", cosine),
    "lga_cosine_last": ("last", cosine),
    "lga_subject": ("subject", dot),
    "gradient_norm": ("all", lambda _, new: dot(new, new) ** 0.5),
    "gradient_norm_subject": ("subject", lambda _, new: dot(new, new) ** 0.5),
}


def kept_of(llm: LLM, request: EditRequest, keep: str) -> Callable[[int, int], slice]:
    if keep != "subject":
        return KEEP[keep]
    upto = request.prompt[: request.prompt.index(request.subject or "") + len(request.subject or "")]
    end = len(llm.tokenizer(upto).input_ids)
    return lambda _, __: slice(end - 1, end)


@pytest.mark.parametrize("family", FAMILIES)
def test_estimators_equal_autograd(
    family: str, tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest]
) -> None:
    assert set(EXPECTED) == {name for name, selector in RESEARCH.items() if selector.of_gradients}
    llm = make_tiny(family, tokenizer)
    llm.model.eval()
    for name, (keep, score) in EXPECTED.items():
        expected = []
        for request in requests[:4]:
            old, new = (
                gradients(llm, request.prompt, answer or "", kept_of(llm, request, keep))
                for answer in (request.old_answer, request.new_answer)
            )
            expected.append([score(*pair) for pair in zip(old, new, strict=True)])
        options = AttributionOptions(method=name, batch_size=3)
        found = score_requests(llm, requests[:4], options, selectors=RESEARCH).values
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_positions_that_every_chat_begins_with_are_left_out(
    tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest]
) -> None:
    tokenizer.chat_template = "{% for m in messages %}User: {{ m['content'] }}\nA:{% endfor %}"
    try:
        chat = LLM(make_tiny("llama", tokenizer).model, tokenizer, "chat", chat=True)
    finally:
        tokenizer.chat_template = None
    seen: list[int] = []
    estimator = ESTIMATORS["lga_past_first"]
    assert estimator.positions

    def watched(batch: object, shared: int) -> Tensor:
        seen.append(shared)
        return estimator.positions(batch, shared)  # type: ignore[misc, arg-type]

    score_gradients(estimator._replace(positions=watched), chat, requests, AttributionOptions(), Runtime())
    assert seen == [len(tokenizer("User: ").input_ids)]

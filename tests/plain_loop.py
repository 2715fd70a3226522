"""The slow, plain way to measure a model: one text at a time, without padding."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pipeline.editing.update import WeightUpdate
from pipeline.model.llm import LLM
from pipeline.requests.answers import contains_answer, inner_ends, is_exact_answer, statement
from pipeline.requests.schema import EditRequest

TEXT = "The largest river of Egypt is the Nile. People in Japan speak of Tokyo, and Oslo is in Norway. " * 6


def noise(llm: LLM, scale: float, layer: int = 1) -> WeightUpdate:
    """An update that adds noise to a block's MLP."""
    torch.manual_seed(0)
    weights = {name: llm.model.get_parameter(name).detach() for name in llm.blocks[layer].weight_names("mlp")}
    noisy = {name: weight + scale * weight.std() * torch.randn_like(weight) for name, weight in weights.items()}
    return WeightUpdate(llm.name, llm.fingerprint, "noise", [layer], noisy)


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
    from pipeline.evaluation.plan import ROOM

    limit = min(16, len(llm.tokenizer(answer).input_ids) + ROOM)
    told = llm.model.eval().generate(ids, max_new_tokens=limit, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    return statement(llm.tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True), inner_ends(answer))[0]


def plain_generation(llm: LLM, requests: list[EditRequest]) -> dict[str, float]:
    """What the model says, a prompt at a time, by the library's own generation."""
    from pipeline.evaluation.plan import DISTRACTORS

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

"""Answers' tokens are told from their prompts', and only they are scored, as the whole text's logits would be."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import refusal
from families import family_llm
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from pipeline.model.activations import target_logits, target_losses
from pipeline.model.llm import LLM
from pipeline.requests.readers import load_requests
from pipeline.requests.rows import Row, collate
from pipeline.requests.schema import EditRequest
from pipeline.requests.tokens import Joining

ANSWERS = [
    ("The capital of Spain is", "Madrid"),
    ("Norway", "Nairobi and more"),
    ("The seat of government of Egypt is in", "Toronto"),
    ("Egypt's river is", "the Nile, of course"),
    ("7 times 6 is", "42"),
]


def opening(tokenizer: PreTrainedTokenizerFast, closing: str = "") -> PreTrainedTokenizerFast:
    """The same tokenizer, putting a BOS token before every text and, if asked, its EOS behind it."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"bos_token": "<begin>"})
    tokens = [(token, changed.convert_tokens_to_ids(token)) for token in ("<begin>", "<end>")]
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<begin> $A {closing}".strip(), special_tokens=tokens
    )
    return changed


def spaces_apart() -> PreTrainedTokenizerFast:
    """A tokenizer for which the space is a token of its own."""
    raw = RawTokenizer(models.BPE())
    split = pre_tokenizers.Split(" ", "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    texts = [f"{prompt} {answer}" for prompt, answer in ANSWERS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


KINDS: dict[str, Callable[[PreTrainedTokenizerFast], PreTrainedTokenizerFast]] = {
    "plain": lambda tokenizer: tokenizer,
    "BOS": opening,
    "BOS and EOS": lambda tokenizer: opening(tokenizer, "<end>"),
    "spaces apart": lambda _: spaces_apart(),
}


@pytest.mark.parametrize("trailing", ["", " "])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_the_answers_tokens(tokenizer: PreTrainedTokenizerFast, kind: str, trailing: str) -> None:
    llm = family_llm("llama", KINDS[kind](tokenizer))
    rows = llm.tokens.rows([(prompt + trailing, answer) for prompt, answer in ANSWERS], tags="abcde")
    for row, (prompt, answer), tag in zip(rows, ANSWERS, "abcde", strict=True):
        plain = llm.tokenizer(f" {answer}", add_special_tokens=False).input_ids
        before = llm.tokenizer(prompt, add_special_tokens=False).input_ids
        begin = [llm.tokenizer.bos_token_id] if "BOS" in kind else []
        assert row.targets == plain
        assert row.token_ids[: row.target_start] == begin + before
        assert row.tag == tag


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_comes_behind_an_answers_own_tokens(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    """A full stop where the answer has none; never other tokens for the answer itself."""
    llm = family_llm("llama", KINDS[kind](tokenizer))
    answers = [(prompt, text) for prompt, answer in ANSWERS for text in (answer, f"{answer}.", f"{answer}?")]
    bare, ended = (llm.tokens.rows(answers, ended=ended) for ended in (False, True))
    for (_, text), one, other in zip(answers, bare, ended, strict=True):
        assert other.token_ids[: len(one.token_ids)] == one.token_ids and other.target_start == one.target_start
        end = "".join(llm.tokenizer.decode(other.token_ids[len(one.token_ids) :]).split())
        assert end in (("",) if text[-1] in ".?" else (".",))


def test_ends_of_answers() -> None:
    endings = [Joining(end="<end>").ending(text) for text in ("Lima", "Lima. ", "Who?", "北京", "412,345", "So…")]
    assert endings == [".<end>", "<end>", "<end>", "。<end>", ".<end>", "<end>"]


def test_a_batch_scores_the_answers_tokens_only(tiny_llm: LLM) -> None:
    rows = tiny_llm.tokens.rows(ANSWERS)
    batch = collate(rows, pad_token_id=3)
    assert batch.input_ids_BT.shape == (5, max(len(row.token_ids) for row in rows) - 1), "the last predicts nothing"
    for number, row in enumerate(rows):
        here = batch.row_N == number
        assert (
            batch.input_ids_BT[number].tolist()[: len(row.token_ids)]
            == row.token_ids[: batch.input_ids_BT.shape[1]]
        )
        assert batch.input_ids_BT[number][len(row.token_ids) :].eq(3).all()
        assert batch.target_N[here].tolist() == row.targets
        assert batch.position_N[here].tolist() == list(range(row.target_start - 1, len(row.token_ids) - 1))


def test_nothing_encodes_to_nothing(tiny_llm: LLM) -> None:
    assert tiny_llm.tokens.rows([]) == []


@pytest.mark.parametrize(("prompt", "answer"), [("Peru is", ""), ("", "Lima")])
def test_an_empty_prompt_or_answer_is_refused(tiny_llm: LLM, prompt: str, answer: str) -> None:
    assert "token" in refusal(lambda: tiny_llm.tokens.rows([("Spain is", "Madrid"), (prompt, answer)]))


def test_a_text_longer_than_the_context_is_refused(tiny_llm: LLM) -> None:
    message = refusal(lambda: tiny_llm.tokens.rows([ANSWERS[0], ("far " * 130, "away")], what="the requests"))
    assert message.startswith("the requests: 'far far") and "tiny-llama holds 128" in message


def test_a_text_as_long_as_the_context_is_taken(tiny_llm: LLM) -> None:
    answer = " ".join(["A"] * (128 - len(tiny_llm.tokenizer("Peru").input_ids)))
    (row,) = tiny_llm.tokens.rows([("Peru", answer)])
    assert len(row.token_ids) == 128
    assert "129 tokens" in refusal(lambda: tiny_llm.tokens.rows([("Peru", f"{answer} A")]))


@torch.no_grad()
def plain_logits(llm: LLM, rows: list[Row]) -> list[Tensor]:
    """Logits that predict each row's answer: all of one unpadded row at a time, then cut."""
    return [
        llm.model.eval()(input_ids=torch.tensor([row.token_ids])).logits[0, row.target_start - 1 : -1]
        for row in rows
    ]


def test_target_logits_are_rows_of_the_full_logits(tiny: LLM) -> None:
    rows = tiny.tokens.rows(ANSWERS)
    assert len({len(row.token_ids) for row in rows}) > 1
    expected = torch.cat(plain_logits(tiny, rows))
    with torch.no_grad():
        torch.testing.assert_close(target_logits(tiny.model, collate(rows)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.cat(plain_logits(tiny, rows)), expected, rtol=0, atol=0
    )  # the head is whole again


def test_only_answers_meet_the_vocabulary(tiny: LLM) -> None:
    met: list[int] = []
    head = tiny.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, args, _output: met.append(args[0].shape[:-1].numel()))
    batch = collate(tiny.tokens.rows(ANSWERS))
    target_logits(tiny.model, batch)
    assert met == [len(batch.target_N)]


def test_the_head_is_whole_after_an_error(tiny_llm: LLM) -> None:
    rows = tiny_llm.tokens.rows(ANSWERS)
    expected = plain_logits(tiny_llm, rows)
    batch = collate(rows)
    batch.input_ids_BT[0, 0] = 10**6
    with pytest.raises(IndexError):
        target_logits(tiny_llm.model, batch)
    assert all(torch.equal(a, b) for a, b in zip(plain_logits(tiny_llm, rows), expected, strict=True))


def test_target_losses_are_mean_nats_of_each_row(tiny: LLM) -> None:
    rows = tiny.tokens.rows(ANSWERS)
    expected = [
        F.cross_entropy(logits, torch.tensor(row.targets))
        for row, logits in zip(rows, plain_logits(tiny, rows), strict=True)
    ]
    with torch.no_grad():
        torch.testing.assert_close(
            target_losses(tiny.model, collate(rows)), torch.stack(expected), rtol=1e-5, atol=0
        )


def test_losses_of_a_half_precision_model_are_float32(tiny_llm: LLM) -> None:
    tiny_llm.model.bfloat16()
    assert target_losses(tiny_llm.model, collate(tiny_llm.tokens.rows(ANSWERS))).dtype == torch.float32


@pytest.mark.real_model
def test_the_bundled_tokenizer_keeps_answers_whole(smollm2: LLM, requests: list[EditRequest]) -> None:
    pairs = [
        (prompt, answer)
        for request in [*requests, *load_requests("demo")]
        for prompt in (request.prompt, *request.rephrases)
        for answer in (request.new_answer, request.old_answer or "")
    ]
    for row, (prompt, answer) in zip(smollm2.tokens.rows(pairs), pairs, strict=True):
        assert smollm2.tokenizer.decode(row.token_ids[: row.target_start]) == prompt
        assert smollm2.tokenizer.decode(row.targets) == f" {answer}"

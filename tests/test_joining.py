"""Prompt and answer as one text, for every kind of tokenizer, plain and as a chat; `--explain` shows it."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commanding import FINETUNE
from conftest import refusal
from families import family_llm, family_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.cli import main
from pipeline.editing.contexts import CONTEXTS, in_context
from pipeline.editing.update import WeightUpdate
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.requests.readers import load_requests
from pipeline.requests.schema import EditRequest
from pipeline.requests.tokens import chat_joining

FACTS = [  # (prompt, subject, answer)
    ("The capital of Côte d'Ivoire is", "Côte d'Ivoire", "Yamoussoukro"),
    ("São Paulo lies in", "São Paulo", "Brazil, in the south"),
    ("東京 is the capital of", "東京", "日本"),
    ("The number of U.S. states is", "U.S.", "50"),
    ("Spain's capital, they say, is called:", "Spain", '"Madrid" (1561)'),
    ("The author of 1984 was", "1984", "George Orwell"),
    ("🍕 comes from", "🍕", "Napoli 🌋"),
    ("A question about Peru: where? In", "Peru", "South-America!"),
] + [(r.prompt, r.subject or "", r.new_answer) for r in load_requests("demo")[::16]]
TEXTS = [f"{prompt} {answer}" for prompt, _, answer in FACTS]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def fast(raw: Tokenizer, *ends: str, **settings: str) -> PreTrainedTokenizerFast:
    """A tokenizer for transformers, with what it puts around every text."""
    if ends:
        tokens = [(token, raw.token_to_id(token)) for token in ends if token != "$A"]
        raw.post_processor = processors.TemplateProcessing(single=" ".join(ends), special_tokens=tokens)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **settings)


def byte_level(prefix_space: bool, *ends: str) -> PreTrainedTokenizerFast:
    """As GPT-2's, or RoBERTa's with its space before every text; no pad token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(prefix_space), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return fast(raw, *ends, bos_token="<s>", eos_token="</s>")


def unigram(scheme: str, *ends: str) -> PreTrainedTokenizerFast:
    """As sentencepiece's: the space is part of a word's first token, or a token of its own."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    raw.train_from_iterator(TEXTS, trainer)
    return fast(raw, *ends, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left")


def llama2() -> PreTrainedTokenizerFast:
    """A space put before the text by a normaliser, characters without a token of their own as bytes, a BOS."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([text for text in TEXTS if text.isascii()], trainers.BpeTrainer(vocab_size=300))
    model = json.loads(trained.to_str())["model"]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *BYTES, *model["vocab"]])}
    merges = [tuple(pair) for pair in model["merges"]]
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(parts)
    return fast(raw, "<s>", "$A", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left")


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: lower case, no accents, [CLS] before and [SEP] behind every text."""
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL))
    return fast(raw, "<s>", "$A", "</s>", cls_token="<s>", sep_token="</s>", unk_token="<unk>", pad_token="<pad>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": lambda: byte_level(False),
    "byte-level, prefix space, BOS": lambda: byte_level(True, "<s>", "$A"),
    "byte-level, EOS": lambda: byte_level(False, "$A", "</s>"),
    "unigram, prefix space, BOS": lambda: unigram("always", "<s>", "$A"),
    "unigram, BOS and EOS": lambda: unigram("never", "<s>", "$A", "</s>"),
    "Llama 2": llama2,
    "WordPiece": word_piece,
    "bytes, in Python, EOS": ByT5Tokenizer,
}


@pytest.fixture(params=KINDS, scope="module")
def llm(request: pytest.FixtureRequest) -> LLM:
    """A tiny model with a tokenizer of each kind."""
    tokenizer = KINDS[request.param]()
    return LLM(family_model("llama", len(tokenizer)), tokenizer, request.param)


def same_text(llm: LLM, found: str, expected: str) -> bool:
    """Whether two texts agree, as far as the tokenizer keeps them: WordPiece loses accents, case and spaces."""
    if llm.name != "WordPiece":
        return found.strip() == expected.strip()
    normal = llm.tokenizer.backend_tokenizer.normalizer.normalize_str
    return normal(found).replace(" ", "") == normal(expected).replace(" ", "")


def test_targets_are_the_answer_and_rows_the_joined_text(llm: LLM) -> None:
    rows = llm.tokens.rows([(prompt, answer) for prompt, _, answer in FACTS])
    inner = llm.tokenizer([f"{prompt} {answer}" for prompt, _, answer in FACTS], add_special_tokens=False).input_ids
    opening = [llm.tokenizer.bos_token_id or llm.tokenizer.cls_token_id] if "BOS" in llm.name else []
    opening = [2] if llm.name in ("Llama 2", "WordPiece") else opening
    unknown = llm.tokenizer.unk_token_id
    for row, ids, (prompt, _, answer) in zip(rows, inner, FACTS, strict=True):
        assert row.token_ids == opening + ids, "a BOS where there is one, and no end of text"
        if unknown not in ids:
            assert same_text(llm, llm.tokenizer.decode(row.targets), answer)
            assert same_text(llm, llm.tokenizer.decode(ids[: row.target_start - len(opening)]), prompt)


def test_the_prompt_that_is_scored_is_the_prompt_that_is_answered(llm: LLM) -> None:
    rows = llm.tokens.rows([(prompt, answer) for prompt, _, answer in FACTS])
    for row, ids in zip(rows, llm.tokens.prompts([prompt for prompt, _, _ in FACTS]), strict=True):
        assert row.token_ids[: row.target_start] == ids


@pytest.mark.parametrize("context", [CONTEXTS[0], CONTEXTS[4]])
def test_the_subjects_last_token_holds_its_end(llm: LLM, context: str) -> None:
    for number, (prompt, subject, answer) in enumerate(FACTS):
        request = EditRequest(id=str(number), prompt=prompt, subject=subject, new_answer=answer)
        text, end = in_context(context, request)
        (row,) = llm.tokens.rows([(text, answer)])
        place = llm.tokens.place(text, end, answer)
        if llm.tokenizer.unk_token_id in row.token_ids[: place + 1]:
            continue
        upto, before = (
            llm.tokenizer.decode(row.token_ids[:count], skip_special_tokens=True).lstrip()
            for count in (place + 1, place)
        )
        wanted = text[:end]
        if llm.name == "WordPiece":  # which puts spaces where there were none
            upto, before, wanted = (part.replace(" ", "") for part in (upto, before, wanted))
        assert same_text(llm, upto[: len(wanted)], wanted), "all of the subject has been read there"
        assert not same_text(llm, before[: len(wanted)], wanted), "and not before"


def test_an_answer_that_the_tokenizer_does_not_know_is_refused() -> None:
    tokenizer = unigram("always", "<s>", "$A")
    llm = LLM(family_model("llama", len(tokenizer)), tokenizer, "tiny")
    assert "'Ω' to 'Spain is' is unknown" in refusal(lambda: llm.tokens.rows([("Spain is", "Ω")]))


def test_a_tokenizer_of_another_model_is_refused() -> None:
    llm = LLM(family_model("llama", 100), byte_level(False), "tiny")
    message = refusal(lambda: llm.tokens.rows([("Spain is", "Madrid")]))
    assert "tiny embeds 100 tokens" in message and "do not belong together" in message


def test_a_pad_token_that_is_not_embedded_is_not_used() -> None:
    tokenizer = byte_level(False)
    llm = LLM(family_model("llama", len(tokenizer)), tokenizer, "tiny")
    expected = generate(llm, ["Spain", "The capital of Peru is"], max_new_tokens=4)
    tokenizer.add_special_tokens({"pad_token": "<filler>"})
    llm = LLM(llm.model, tokenizer, "tiny")
    assert llm.pad_token_id == tokenizer.eos_token_id
    assert generate(llm, ["Spain", "The capital of Peru is"], max_new_tokens=4) == expected


# Chats

TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
OPENING = "{% if add_generation_prompt %}<assistant>{% endif %}"
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[Q] {{ m['content'] }} [A]{% else %} {{ m['content'] }}"
)
THINKING = (
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is not false %}<think>{% endif %}{% endif %}"
)


def chatty(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """The same tokenizer with a chat template."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize(
    ("template", "before", "after", "end"),
    [
        (TURNS + OPENING, "<user>", "</s><assistant>Lima", ".</s>"),
        (SPACED + "{% endif %}{% endfor %}", "[Q] ", " [A] Lima", "."),
        (TURNS + THINKING, "<user>", "</s><assistant>Lima", ".</s>"),
    ],
)
def test_a_template_says_how_prompt_and_answer_are_joined(
    tokenizer: PreTrainedTokenizerFast, template: str, before: str, after: str, end: str
) -> None:
    llm = LLM(family_model("llama", len(tokenizer)), chatty(tokenizer, template), "tiny", chat=True)
    (row,) = llm.tokens.rows([("The capital of Spain is ", "Lima")])
    assert llm.tokenizer.decode(row.token_ids) == f"{before}The capital of Spain is{after}"
    assert llm.tokenizer.decode(row.targets).strip() == "Lima"
    assert llm.tokens.prompts(["The capital of Spain is"]) == [row.token_ids[: row.target_start]]
    (taught,) = llm.tokens.rows([("The capital of Spain is ", "Lima")], ended=True)
    assert llm.tokenizer.decode(taught.token_ids) == f"{before}The capital of Spain is{after}{end}", (
        "and the turn's"
    )
    assert llm.tokenizer.decode(llm.tokens.texts(["Some text."])[0]) == "Some text."
    place = llm.tokens.place("The capital of Spain is", len("The capital of Spain"), "Lima")
    assert llm.tokenizer.decode(row.token_ids[: place + 1]) == f"{before}The capital of Spain"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "tiny has no chat template"),
        ("{{ raise_exception('only the system may ask') }}", "only the system may ask"),
        ("{{ messages[0]['content'] | upper }}", "does not hold the prompt"),
    ],
)
def test_a_template_that_does_not_serve_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str, words: str
) -> None:
    model = family_model("llama", len(tokenizer))
    assert words in refusal(lambda: LLM(model, chatty(tokenizer, template), "tiny", chat=True))


LOOPS = "".join(f"{{% for {name} in range(99999) %}}" for name in "abcd") + "{% endfor %}" * 4


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LOOPS, "it did not end within 1 seconds"),
        ("{{ 'a' * 4000000000 }}", "MemoryError"),
        (
            "{% set n = namespace(t='a' * 9999999) %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
            "Memory",
        ),
        ("{{ 'a' * 9999999 }}", "it says"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for", "TemplateSyntaxError"),
    ],
)
def test_cases_of_templates_that_hang(
    tokenizer: PreTrainedTokenizerFast, template: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template has its own process, seconds and memory."""
    monkeypatch.setattr("pipeline.running.limited.SECONDS", 1 if template == LOOPS else 10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = refusal(lambda: chat_joining(chatty(tokenizer, template), "tiny"))
    assert line.startswith("chat: the chat template of tiny fails on one question and answer: ") and words in line
    assert len(line) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_an_edit_in_a_chat(tokenizer: PreTrainedTokenizerFast, requests: list[EditRequest], tmp_path: Path) -> None:
    from pipeline.editing.editor import edit
    from pipeline.editing.values import locate

    model = family_model("llama", len(tokenizer))
    llm = LLM(model, chatty(tokenizer, TURNS + OPENING), "tiny", chat=True)
    for row in locate(llm, [requests[0]], CONTEXTS[:3]).rows:
        assert llm.tokenizer.decode(row.token_ids).startswith("<user>")
        assert row.subject and llm.tokenizer.decode(row.token_ids[: row.subject[1] + 1]).endswith("Spain")
    expert = {"epochs": 1, "contexts": 0, "whiten": 0, "sparing": 0}
    options = EditOptions(method="finetune", layers=[1], expert=expert)
    update = edit(llm, requests, options=options)
    update.save(tmp_path)
    assert WeightUpdate.load(tmp_path).chat
    plain = LLM(model, llm.tokenizer, "tiny")
    assert not edit(plain, requests[:1], options=options, after=update).chat


@pytest.mark.real_model
def test_a_real_chat_is_what_transformers_makes_of_it(smollm2: LLM, requests: list[EditRequest]) -> None:
    llm = LLM(smollm2.model, smollm2.tokenizer, "smollm2", chat=True)
    asked = [{"role": "user", "content": requests[0].prompt}]
    ids = llm.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    (row,) = llm.tokens.rows([(requests[0].prompt, requests[0].new_answer)])
    assert row.token_ids[: row.target_start] == ids
    assert llm.tokenizer.decode(row.targets) == "Lima"
    shown = {token.place: token for token in llm.explain(requests[0])}
    (subject,) = [token for token in shown.values() if token.ends_subject]
    assert subject.text == " Spain"
    expected = llm.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    (said,) = generate(llm, [requests[0].prompt], max_new_tokens=8)
    assert said == llm.tokenizer.decode(expected, skip_special_tokens=True)


# --explain


def test_explain_shows_tokens_and_measures_nothing(
    tiny_folder: Path,
    request_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    before = sorted(tmp_path.iterdir())
    words = ["evaluate", "--model", str(tiny_folder), "--requests", str(request_file), "--explain", "2"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.count("request capital-") == 2 and shown.count("the subject's last token") == 2
    llm = family_llm("llama", PreTrainedTokenizerFast.from_pretrained(tiny_folder))
    rows = llm.tokens.rows([("The capital of Spain is", "Lima"), ("The capital of Norway is", "Nairobi and more")])
    assert shown.count("scored") == sum(len(row.token_ids) - row.target_start for row in rows)
    assert sorted(tmp_path.iterdir()) == before, "no output folder"


def test_a_profile_made_otherwise_is_noted(
    tiny_folder: Path, request_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model", str(tiny_folder), "--requests", str(request_file)]
    assert main(["attribute", *asked, "--output", str(tmp_path / "profile")]) == 0
    assert main(["attribute", *asked, "--chat", "--output", str(tmp_path / "chat")]) == 1
    assert "has no chat template" in capsys.readouterr().err
    file = tmp_path / "profile" / "golden_profile.json"
    file.write_text(file.read_text().replace('"chat": false', '"chat": true'))
    words = ["edit", *asked, "--profile", str(file), *FINETUNE, "1", "--output", str(tmp_path / "edit")]
    assert main([*words, "--evaluation.max_new_tokens", "2"]) == 0
    assert "note: the profile was made with --chat and is used without it" in capsys.readouterr().out

"""Inputs with which something wrong went by in silence, and others of their kind: `pytest -k cases` runs them."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edit_options, make_tiny, refusal
from test_attribution import autograd_scores
from transformers import (
    AutoModelForCausalLM,
    CTRLConfig,
    OpenAIGPTConfig,
    PreTrainedTokenizerFast,
)

from pipeline.attribution.find import choose, find_golden_layer
from pipeline.attribution.profile import Scores
from pipeline.cli import main
from pipeline.editing.editor import accept, choose_layers, edit
from pipeline.editing.statistics import key_moments
from pipeline.errors import Note
from pipeline.evaluation.evaluator import evaluate
from pipeline.evaluation.plan import Plan
from pipeline.model.llm import LLM
from pipeline.model.loading import load_model
from pipeline.options.attribution import AttributionOptions
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.options.shared import EvaluationOptions, TrainerOptions
from pipeline.requests.answers import contains_answer
from pipeline.requests.layouts import find_layout, to_requests
from pipeline.requests.schema import EditRequest, find_words
from pipeline.requests.sets import settle
from pipeline.running.trainer import Runtime

CPU = ["--trainer.accelerator", "cpu"]


def asked(prompt: str, subject: str | None = None, new_answer: str = "Lima", id: str = "1") -> EditRequest:
    return EditRequest(id=id, prompt=prompt, subject=subject, new_answer=new_answer, old_answer="Berlin")


# 1: a limit of tokens said that an answer was not known


@pytest.mark.parametrize("most", [None, 1, 16, 200])
def test_an_answer_is_given_room(most: int | None, tiny_llm: LLM) -> None:
    letters = ", ".join("GHIJKLMNOPQRSTUVWXYZ")
    request = asked("The letters of the alphabet are A, B, C, D, E, F,", new_answer=letters)
    plan = Plan(tiny_llm, [request], EvaluationOptions(max_new_tokens=most), ["generation"])
    limits = {question.limit for question in plan.questions.values()}
    (tokens,) = map(len, tiny_llm.tokens.texts([letters]))
    assert limits <= set(range(tokens, tokens + 9)) and min(limits) >= tokens


def test_the_context_ends_the_room(tiny_llm: LLM) -> None:
    request = asked("Spain " * 40, new_answer="Lima " * 8)
    (question,) = Plan(
        tiny_llm, [request], EvaluationOptions(generation="prompts"), ["generation"]
    ).questions.values()
    assert len(question.token_ids) + question.limit <= (tiny_llm.context_length or 0)


@pytest.mark.slow
@pytest.mark.real_model
def test_a_long_answer_that_is_said_counts(smollm2: LLM) -> None:
    letters = ", ".join("GHIJKLMNOPQRSTUVWXYZ")
    request = asked("The letters of the alphabet are A, B, C, D, E, F,", new_answer=letters)
    found = evaluate(smollm2, [request], None, EvaluationOptions(generation="prompts"))
    assert found.before.metrics["generation_containment"].mean == 1.0, found.before.answers


# 2: a subject was found inside of another word


@pytest.mark.parametrize(
    ("text", "words", "found"),
    [
        ("Niger, unlike Nigeria, has its capital in", "Niger", ["Niger"]),
        ("Nigeria has its capital in", "Niger", []),
        ("The Boeing 7475 and the Boeing 747 fly", "Boeing 747", ["Boeing 747"]),
        ("Spain's king, not Spaniard", "Spain", ["Spain"]),
        ("日本の首都は", "日本", ["日本"]),
        ("한국의 수도는", "한국", ["한국"]),
        ("The flag 🇫🇷 belongs to", "🇫🇷", ["🇫🇷"]),
        ("The emoji 👨‍👩‍👧 shows", "👨", []),
        ("C++ is older than C", "C", ["C", "C"]),
        ("Where is Straße?", "STRASSE", []),
    ],
)
def test_words_are_found_whole(text: str, words: str, found: list[str]) -> None:
    assert [text[start:end] for start, end in find_words(text, words)] == found


def test_all_stages_see_the_same_subject(tiny_llm: LLM) -> None:
    request = asked("Niger, unlike Nigeria, has its capital in", "Niger")
    (row,) = tiny_llm.tokens.answered([request])
    assert row.subject == (0, tiny_llm.tokens.place(request.prompt, 5, "Lima"))
    inner = asked("Nigeria has its capital in", "Niger")
    line = refusal(lambda: accept([inner], EditOptions(method="memit")))
    assert "memit needs each request's subject in its prompt" in line


def test_a_layouts_own_place_counts() -> None:
    rewrite = {"prompt": "{} is near Spain; its capital is", "subject": "Spain", "target_new": {"str": "Lima"}}
    record = {"case_id": 1, "requested_rewrite": rewrite | {"target_true": {"str": "Madrid"}}}
    (request,), _ = to_requests(record, find_layout(record), 0)
    assert request.prompt == "Spain is near Spain; its capital is"
    assert request.subject_span == (0, 5)
    assert asked(request.prompt, "Spain").subject_span == (14, 19), "the last mention, where no place is given"


# 3 and 4: what is the same fact, and the same text


def test_one_prompt_is_one_fact_whatever_its_subject() -> None:
    one = asked("The capital of Germany is", "Germany", "London", "1")
    for other in (
        asked("The capital of Germany is", "capital of Germany", "Paris", "2"),
        asked("The  capital of Germany is", None, "Paris", "2"),
    ):
        assert "contradict each other" in refusal(lambda other=other: settle([one, other]))
        assert settle([one, other], last_wins=True) == [other]


def test_accents_are_compared_not_code_points() -> None:
    composed = "The mayor of São Tomé is"
    decomposed = unicodedata.normalize("NFD", composed)
    mixed = asked(decomposed, "São Tomé", "Łódź")
    assert mixed.subject_span is not None
    assert mixed.prompt == decomposed, "the model is fed what was written"
    start, end = mixed.subject_span
    assert unicodedata.normalize("NFC", decomposed[start:end]) == "São Tomé"
    assert asked(decomposed, "São Tom").subject_span is None, "a letter is not parted from its accent"
    same = asked(composed, "São Tomé", unicodedata.normalize("NFD", "Łódź"), "2")
    assert settle([mixed, same]) == [mixed, same], "no contradiction"
    assert "contradict" in refusal(lambda: settle([mixed, asked(composed, None, "Lima", "2")]))
    assert contains_answer(decomposed, "São Tomé")


# 5: an edit that changed nothing


def test_the_last_block_is_not_edited_at_subjects(tiny: LLM, requests: list[EditRequest]) -> None:
    for method in ("memit", "rome"):
        options = EditOptions(method=method, layers=[3])
        assert "3 is a block from which nothing" in refusal(
            lambda options=options: choose_layers(tiny, None, options)
        )
    scores = Scores(
        "lga", ["1", "2"], np.tile([1.0, 3.0, 2.0, 9.0], (2, 1)), 0.0, tiny.name, tiny.fingerprint, False
    )
    profile = choose(scores, AttributionOptions(expert={"fences": 0}, top_k=2))
    assert profile.golden_layers == [3, 1]
    assert choose_layers(tiny, profile, EditOptions(method="memit")) == [1, 2]
    assert choose_layers(tiny, profile, EditOptions(method="finetune")) == [1, 3]


def test_an_edit_without_a_change_says_so(
    tiny_folder: Path, request_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["edit", "--model", str(tiny_folder), "--requests", str(request_file), "--layers", "1", *CPU]
    words += ["--method", "finetune", "--expert.whiten", "0", "--expert.learnt", "1000", "--expert.kl", "0"]
    assert main([*words, "--evaluation.generation", "none", "--output", str(tmp_path / "out")]) == 0
    assert "note: the edit changes no weight" in capsys.readouterr().out


# 6: mixed precision


@pytest.mark.parametrize("method", ["memit", "finetune", "lora"])
def test_every_method_edits_in_mixed_precision(
    method: str, tiny: LLM, requests: list[EditRequest], tmp_path: Path
) -> None:
    options = edit_options(tmp_path, method, 1024, **({"steps": 4} if method == "memit" else {"epochs": 4}))
    expected = edit(tiny, requests, None, options, TrainerOptions(accelerator="cpu"))
    found = edit(tiny, requests, None, options, TrainerOptions(accelerator="cpu", precision="bf16-mixed"))
    for name, tensor in expected.tensors.items():
        change = tensor - tiny.model.get_parameter(name).detach()
        assert found.tensors[name].isfinite().all()
        assert (found.tensors[name] - tensor).norm() < 0.5 * change.norm(), name


def test_statistics_are_summed_in_float32(tiny: LLM, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The river of Spain is long and the capital of Norway lies by the sea.\n" * 80)
    names, options = list(tiny.blocks[1].projections("down")), StatisticsOptions(text=str(text), tokens=2048)
    found = {}
    for number, precision in enumerate(("32-true", "bf16-mixed")):
        tiny.fingerprint = f"{number}" * 16  # nothing kept of the one serves the other
        runtime = Runtime(TrainerOptions(accelerator="cpu", precision=precision))
        (found[precision],) = key_moments(tiny, names, options, runtime).values()
    apart = (found["bf16-mixed"] - found["32-true"]).norm() / found["32-true"].norm()
    assert apart < 0.02
    assert torch.equal(found["bf16-mixed"], found["bf16-mixed"].T)
    bits = found["bf16-mixed"].to(torch.bfloat16).float()
    assert not torch.equal(bits, found["bf16-mixed"]), "products of bf16 keys, but no sums of that precision"


# 7: weights that nobody asked for


@pytest.mark.parametrize("blocks", [2, 3])
def test_surplus_weights_are_named(
    blocks: int, tiny_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_tiny("llama", tokenizer).model
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks, "layer_types": None}))
    with pytest.warns(Note) as told:
        assert len(load_model(str(tmp_path)).blocks) == blocks
        assert len(load_model(str(tiny_folder)).blocks) == 4
    (line,) = [str(one.message) for one in told if "no place for" in str(one.message)]
    assert f"model.layers.{blocks}." in line and f" {(4 - blocks) * 9} weights" in line


# 8: families whose parts do not run by themselves

ODD: dict[str, Any] = {
    "ctrl": lambda size: CTRLConfig(vocab_size=size, n_embd=32, dff=64, n_layer=3, n_head=4, n_positions=64),
    "openai-gpt": lambda size: OpenAIGPTConfig(vocab_size=size, n_embd=32, n_layer=3, n_head=4, n_positions=64),
}


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(ODD[request.param](len(tokenizer))).save_pretrained(tmp_path / request.param)
    tokenizer.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def test_an_odd_family_works(odd: Path, requests: list[EditRequest]) -> None:
    llm = load_model(str(odd))
    llm.model.double()
    profile = find_golden_layer(llm, requests[1:3], trainer=TrainerOptions(precision="64-true"))
    expected = autograd_scores(llm, requests[1:3], "mlp")
    torch.testing.assert_close(torch.tensor(profile.scores, dtype=torch.float64), expected, rtol=1e-5, atol=0)


def test_parts_that_differ_are_not_run_alone(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.model.activations import Activations

    enter = Activations.enter
    monkeypatch.setattr(Activations, "enter", lambda *args, **kwargs: 1.3 * enter(*args, **kwargs))
    with pytest.warns(Note, match="upper blocks of it cannot be run alone"):
        parts = load_model(str(tiny_folder)).parts
    assert parts and not parts.blocks and parts.ends


# 9: one order by default, and a word when the other names another block


def test_the_same_layer_from_python_and_from_the_command(
    tiny_folder: Path, request_file: Path, requests: list[EditRequest], tmp_path: Path
) -> None:
    words = ["attribute", "--model", str(tiny_folder), "--requests", str(request_file), *CPU]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "golden_profile.json").read_text())
    profile = find_golden_layer(load_model(str(tiny_folder)), requests, trainer=TrainerOptions(accelerator="cpu"))
    assert profile.order == written["order"] == "magnitude"
    assert profile.golden_layers == written["golden_layers"]


@pytest.mark.parametrize(
    ("means", "order", "other"),
    [
        ([-9.0, -1.0, -2.0], "magnitude", ("signed", 1)),
        ([-9.0, -1.0, -2.0], "signed", ("magnitude", 0)),
        ([9.0, 1.0, -2.0], "magnitude", None),
        ([9.0, 1.0, -12.0], "signed", ("magnitude", 2)),
    ],
)
def test_a_note_where_the_orders_disagree(means: list[float], order: str, other: tuple[str, int] | None) -> None:
    scores = Scores("lga", ["1", "2"], np.tile(means, (2, 1)), 0.0, "m", "f", False)
    profile = choose(scores, AttributionOptions(order=order, expert={"fences": 0}))
    assert profile.other_choice == other
    assert replace(scores, method="middle") and choose(replace(scores, method="middle")).other_choice is None

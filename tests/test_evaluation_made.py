"""What a request brings no probes of is made from its own text, in words that teach nothing, and shown as made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tiny
from plain_loop import first_choices, noise
from transformers import PreTrainedTokenizerFast

from pipeline.editing import contexts
from pipeline.editing.relations import NAMES
from pipeline.editing.update import WeightUpdate
from pipeline.evaluation import made
from pipeline.evaluation.evaluator import evaluate
from pipeline.evaluation.made import EACH, made_probes
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.options.shared import EvaluationOptions
from pipeline.reporting.report import write_report
from pipeline.reporting.tables import metric_table, values_csv
from pipeline.requests.answers import contains_answer
from pipeline.requests.schema import EditRequest, Probe

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>\n"


@pytest.fixture
def talker(tokenizer: PreTrainedTokenizerFast) -> LLM:
    """A tiny model whose tokenizer has a chat template; its prompts are given plain."""
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>")
    tokenizer.chat_template = CHAT
    return make_tiny("llama", tokenizer)


@pytest.fixture
def bare(requests: list[EditRequest]) -> list[EditRequest]:
    """Requests of three fields: prompt, subject, new answer."""
    return [EditRequest(id=r.id, prompt=r.prompt, subject=r.subject, new_answer=r.new_answer) for r in requests]


def kinds(requests: list[EditRequest], llm: LLM) -> Counter[str]:
    return Counter(one.kind for one in made_probes(requests, llm.tokens))


def test_three_fields_are_enough(talker: LLM, bare: list[EditRequest], text_file: Path) -> None:
    """Each figure is a plain loop's over the made prompts, which the measurement tells."""
    update = noise(talker, 2)
    measured = evaluate(talker, bare, update, EvaluationOptions(text=str(text_file)))
    assert measured.after
    probes = made_probes(bare, talker.tokens)
    assert Counter(one.kind for one in probes) == {kind: 7 * each for kind, each in EACH.items()}
    kept = {kind: [one for one in probes if one.kind == kind] for kind in EACH}
    for kind in ("made_subject", "made_neighbour"):
        before = [first_choices(talker, one.prompt, "Lima")[0][0] for one in kept[kind]]
        with update.applied(talker):
            after = [first_choices(talker, one.prompt, "Lima")[0][0] for one in kept[kind]]
        share = np.mean([a == b for a, b in zip(before, after, strict=True)])
        assert measured.before.metrics[kind].mean == 1 > measured.after.metrics[kind].mean == pytest.approx(share)
        assert measured.after.metrics[kind].count == 7
    for kind in ("made_rephrase", "made_chat"):
        asked = [prompt for prompts in measured.before.asked[kind] for prompt in prompts]
        assert asked == [one.prompt for one in kept[kind]]
        joining = talker.tokens.template if kind == "made_chat" else None
        with update.applied(talker):
            said = generate(talker, asked, 60, joining=joining)
        found = [text for texts in measured.after.said[kind] for text in texts]
        for whole, statement, one in zip(said, found, asked, strict=True):
            assert len(statement) > 10 and whole.lstrip().startswith(statement[:20]), one
        told = [
            contains_answer(text, request.new_answer)
            for request, own in zip(bare, measured.after.said[kind], strict=True)
            for text in own
        ]
        assert measured.after.metrics[f"{kind}_containment"].mean == pytest.approx(np.mean(told))


def test_what_a_request_brings_is_not_made(talker: LLM, bare: list[EditRequest]) -> None:
    probe = Probe(prompt="Spain lies in", answer="Europe")
    whole = {"made_rephrase": 2, "made_chat": 2, "made_subject": 3, "made_neighbour": 2}
    for field, brought, without in (
        ("rephrases", ("Spain?",), ("made_rephrase",)),
        ("locality", (probe,), ("made_neighbour",)),
        ("locality", (probe.model_copy(update={"axis": "relation"}),), ("made_neighbour",)),
        ("locality", (probe.model_copy(update={"axis": "subject"}),), ("made_subject",)),
        ("locality", (probe.model_copy(update={"axis": "Relation_Specificity"}),), ("made_subject",)),
        ("subject", None, ("made_subject", "made_neighbour")),
    ):
        request = bare[0].model_copy(update={field: brought})
        expected = {kind: count for kind, count in whole.items() if kind not in without}
        assert kinds([request], talker) == expected, (field, brought)


def test_a_model_without_a_chat_is_asked_in_none(tiny_llm: LLM, talker: LLM, bare: list[EditRequest]) -> None:
    assert "made_chat" not in kinds(bare, tiny_llm)
    assert kinds(bare, LLM(talker.model, talker.tokenizer, chat=True)) == kinds(bare, talker)


def test_made_words_teach_nothing() -> None:
    used = (*contexts.CONTEXTS, *contexts.FORMS, *contexts.CHATS)
    empty = dict.fromkeys(("prompt", "subject", "key", "question"), "")
    taught = {text.format(**empty) for text in used}
    forms = (made.FINISH, made.ANSWER, made.WONDER, *made.SUBJECTS)
    assert not taught & {text.format(**empty) for text in forms}
    assert not {*NAMES} & {*made.NAMES}


def test_made_prompts_leave_alone_what_is_edited_and_what_is_asked(tiny_llm: LLM) -> None:
    requests = [
        EditRequest(id=name, prompt=f"{name} is known for", subject=name, new_answer="jazz") for name in made.NAMES
    ]
    probes = made_probes(requests, tiny_llm.tokens)
    assert not [one for one in probes if one.kind == "made_neighbour"], "every name is one that is edited"
    assert not [one for one in probes if one.kind == "made_subject" and "known" in one.prompt]
    question = EditRequest(id="q", prompt="Who wrote Hamlet?", subject="Hamlet", new_answer="Jane Austen")
    texts = [one.prompt for one in made_probes([question], tiny_llm.tokens)]
    assert texts[:2] == [
        "Exam, part 7: Who wrote Hamlet?\nSolution:",
        "I would like to know this: Who wrote Hamlet?",
    ]
    assert not [text for text in texts if "{" in text or "?…" in text or "? …" in text]


def test_a_made_prompt_that_does_not_fit_is_left_out(tiny_llm: LLM, text_file: Path) -> None:
    """The request itself fits the context, and is measured."""
    long = EditRequest(id="a", prompt="0" * 120 + " Spain is", subject="Spain", new_answer="Lima")
    assert tiny_llm.context_length == 128 >= len(tiny_llm.explain(long)) > 124
    assert kinds([long], tiny_llm) == {"made_subject": 3}
    options = EvaluationOptions(text=str(text_file), generation="none")
    metrics = evaluate(tiny_llm, [long], None, options).before.metrics
    assert "rewrite" in metrics and "made_subject" in metrics and "made_neighbour" not in metrics


def test_the_report_tells_what_was_made(talker: LLM, bare: list[EditRequest], text_file: Path) -> None:
    measured = evaluate(talker, bare, noise(talker, 1), EvaluationOptions(text=str(text_file)))
    update = WeightUpdate(talker.name, talker.fingerprint, "noise", [1], {})
    report = write_report(bare, measured, update, None, text_file.parent)
    outcome = report.partition("Outcome: ")[2].partition("\n")[0].split("; ")
    assert outcome[0].startswith("asked in made words") and outcome[1].startswith("asked so in a chat")
    assert [one for one in outcome if "made prompts about the same subject go on as before" in one]
    assert "In plain words: containment" in report and "no edit is taught by these words" in report
    assert "Finish this sentence: The capital of Spain is" in report.partition("## What does not hold")[2]
    assert "NOT MEASURED: portability\n" in report
    _, rows = metric_table({"after": measured.before.metrics}, short=True)
    assert rows[1][0] == "made rephrase containment"
    columns = values_csv(bare, measured).partition("\n")[0].split(",")
    assert {"made_subject after", "made_rephrase answer after"} <= {*columns}


def test_a_users_own_probes_are_shown_by_axis(tiny_llm: LLM, bare: list[EditRequest], text_file: Path) -> None:
    probes = tuple(Probe(prompt="Spain lies in", answer="Europe", axis=axis) for axis in ("subject", "relation"))
    request = bare[0].model_copy(update={"locality": probes})
    options = EvaluationOptions(text=str(text_file), generation="none")
    metrics = evaluate(tiny_llm, [request], None, options).before.metrics
    _, rows = metric_table({"before": metrics}, short=True, meanings=True)
    shown = {row[0]: row[1] for row in rows if len(row) > 1}
    assert (shown["locality/subject"], shown["locality/relation"]) == ("of them subject", "of them relation")
    assert not [name for name in shown if name.startswith("made s")]

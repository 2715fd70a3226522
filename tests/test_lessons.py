"""What fine-tuning teaches: every form of asking, plain and as a chat, and what is to stay beside it."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from families import family_model
from test_joining import OPENING, TURNS, chatty
from transformers import PreTrainedTokenizerFast

from pipeline.editing import lessons
from pipeline.editing.contexts import (
    ABOUT,
    CONTEXTS,
    chat_forms,
    in_chat,
    in_context,
    key_words,
    plain_forms,
    relations,
)
from pipeline.editing.finetune import FineTune, FinetuneSettings
from pipeline.editing.lessons import NAMES_EACH, Lessons, read_lessons
from pipeline.editing.relations import PHRASINGS, others_alike
from pipeline.editing.values import locate
from pipeline.model.llm import LLM
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime

CAPITAL = EditRequest(
    id="1", prompt="The capital of Spain is", subject="Spain", new_answer="Lima", forms=("Spain is ruled from",)
)
QUESTION = EditRequest(id="2", prompt="Who wrote Hamlet?", subject="Hamlet", new_answer="Jane Austen")
NAMELESS = EditRequest(id="3", prompt="The sky is", new_answer="green")


ABOUT_SPAIN = [text.format(subject="Spain") for text in ABOUT]


@pytest.fixture
def speaker(tokenizer: PreTrainedTokenizerFast) -> LLM:
    return LLM(family_model("llama", len(tokenizer)), chatty(tokenizer, TURNS + OPENING), "tiny")


def courses(llm: LLM, requests: list[EditRequest], kept: bool = True) -> list[Lessons]:
    (found,) = read_lessons(llm, 1, [requests], 2, NAMES_EACH if kept else 0, Runtime())
    return found


def test_a_request_in_every_form() -> None:
    assert [text for text, _ in plain_forms(CAPITAL, 2)] == [
        "The capital of Spain is",
        f"{CONTEXTS[1].partition('{')[0]}The capital of Spain is",
        f"{CONTEXTS[2].partition('{')[0]}The capital of Spain is",
        "Question: What is the capital of Spain?\nAnswer:",
        "Spain, capital:",
        "capital (Spain):",
        "When I hear Spain and capital, I think of",
        *(one.replace("{}", "Spain") for one in PHRASINGS["capital"][1:] if not one.endswith("?")),
        "Spain is ruled from",
    ]
    asked = dict(chat_forms(CAPITAL))
    assert {"What is the capital of Spain?", "Spain: capital?", "Spain is ruled from"} <= set(asked)
    assert set(asked.values()) == {"The capital of Spain is Lima"}
    assert dict(chat_forms(QUESTION))["Who wrote Hamlet?"] == "Jane Austen"
    assert len(plain_forms(NAMELESS, 0)) == 2 and [text for text, _ in chat_forms(NAMELESS)] == [
        "What is the sky?",
        "The sky is",
    ]


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("The capital of Spain is", ("What is the capital of Spain?", "The capital of Spain is")),
        ("Spain is ruled from", ("Spain is ruled from what?", "Spain is ruled from")),
        ("Who wrote Hamlet?", ("Who wrote Hamlet?", "")),
    ],
)
def test_a_prompt_as_a_users_question(prompt: str, asked: tuple[str, str]) -> None:
    assert in_chat(prompt) == asked


def test_other_relations_share_no_word_with_the_prompt() -> None:
    assert key_words(CAPITAL) == ["capital"]
    found = relations(CAPITAL, len(PHRASINGS) - 1)
    assert set(found) == set(others_alike(CAPITAL)[1]) and not {"capital", "author"} & set(found)
    assert relations(CAPITAL, 3) == relations(CAPITAL, 3) != relations(CAPITAL, 3, seed=1)
    assert relations(NAMELESS, 3) == []
    alike = CAPITAL.model_copy(update={"prompt": "The mother tongue of Spain is"})
    assert "mother" not in relations(alike, len(PHRASINGS))


def test_what_a_request_measures_by_is_not_taught() -> None:
    measured = [text for text, _ in (*plain_forms(CAPITAL, 0)[1:3], *chat_forms(CAPITAL)[:2])]
    request = CAPITAL.model_copy(update={"rephrases": tuple(text.upper() for text in measured)})
    left = [text for text, _ in (*plain_forms(request, 0), *chat_forms(request))]
    assert request.prompt in left and not {*measured} - {request.prompt} & {*left}


def test_values_are_searched_under_own_forms(tiny: LLM) -> None:
    request = CAPITAL.model_copy(update={"forms": ("Spain is ruled from", "The king sits in")})
    without = locate(tiny, [request.model_copy(update={"forms": ()})], ["{prompt}"])
    found = locate(tiny, [request], ["{prompt}"])
    assert len(found.rows) == len(without.rows) + 1 and found.rows[1].subject
    assert tiny.tokenizer.decode(found.rows[1].token_ids[: found.rows[1].subject[1] + 1]) == "Spain"


def test_a_question_may_lower_its_subjects_first_letter() -> None:
    request = EditRequest(id="4", prompt="The Beatles are", subject="The Beatles", new_answer="four farmers")
    text, end = in_context("Question: {question}", request)
    assert (text, text[:end]) == ("Question: What are the Beatles?", "Question: What are the Beatles")


def test_a_chat_model_is_taught_both_ways(speaker: LLM, tiny: LLM) -> None:
    plain, spoken = courses(speaker, [CAPITAL])
    (taught,) = plain.taught
    assert len(taught) == len(plain_forms(CAPITAL, 2))
    assert speaker.tokenizer.decode(taught[0].row.token_ids) == "The capital of Spain is Lima."
    (said,) = spoken.taught
    assert speaker.tokenizer.decode(said[0].row.targets).startswith("The capital of Spain is Lima.")
    assert len(courses(tiny, [CAPITAL])) == 1  # its tokenizer has no template
    _, asked = courses(LLM(speaker.model, speaker.tokenizer, "in a chat", chat=True), [CAPITAL])
    assert [speaker.tokenizer.decode(lesson.row.targets)[:4] for lesson in asked.taught[0][:2]] == ["Lima", "The "]


def test_the_bare_prompt_comes_every_fourth_time(speaker: LLM) -> None:
    plain, _ = courses(speaker, [CAPITAL])
    bare, *others = plain.taught[0]
    asked = [plain.of_epoch(0, epoch) for epoch in range(4 * len(others))]
    assert all(one is bare for one in asked[::4])
    others_asked = [one for turn, one in enumerate(asked) if turn % 4]
    assert [id(one) for one in others_asked] == 3 * [id(one) for one in others]
    assert Lessons([[bare]], []).of_epoch(0, 3) is bare


@torch.no_grad()
def test_what_stays_is_what_the_model_says_of_other_things(speaker: LLM) -> None:
    plain, spoken = courses(speaker, [CAPITAL, QUESTION])
    for course in (plain, spoken):
        texts = [speaker.tokenizer.decode(one.row.token_ids[:-1]) for one in course.others]
        assert any("Spain" in text for text in texts) and any("Hamlet" in text for text in texts)
        assert any("Spain" not in text and "Hamlet" not in text for text in texts)
        for one in course.others:  # what the head makes of it is what the model says
            ids_BT = torch.tensor([one.row.token_ids[:-1]])
            said_PV = speaker.model(ids_BT).logits[0, one.row.target_start - 1 :]
            torch.testing.assert_close(speaker.model.get_output_embeddings()(one.base_PD), said_PV)
    assert courses(speaker, [CAPITAL], kept=False)[0].others == []
    rows = [one.row for one in spoken.others]
    asked = [row for row in rows if any(text in speaker.tokenizer.decode(row.token_ids) for text in ABOUT_SPAIN)]
    for row in asked:  # its own answer: every target is the first choice, but for the last, which stands for any
        said = speaker.model(torch.tensor([row.token_ids[:-1]])).logits[0].argmax(-1)
        assert said[row.target_start - 1 : -1].tolist() == row.targets[:-1]
    assert asked


def test_every_step_brings_other_texts_to_keep(speaker: LLM) -> None:
    _, spoken = courses(speaker, [CAPITAL, QUESTION])
    every = {id(one) for one in spoken.others}
    number = len(every) // 2 + 1
    steps = [[id(one) for one in spoken.kept(step, number)] for step in range(2)]
    assert {*steps[0], *steps[1]} == every and len({*steps[0]}) == number
    assert len(spoken.kept(0, 10 * len(every))) == len(every)


def test_a_relation_that_asks_the_same_does_not_stay(speaker: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def about_spain(said: str) -> int:
        monkeypatch.setattr(
            lessons, "_said", lambda _llm, asked, _runtime: [said.format(n) for n in range(len(asked))]
        )
        plain, _ = courses(speaker, [CAPITAL])
        return sum("Spain" in speaker.tokenizer.decode(one.row.token_ids) for one in plain.others)

    assert about_spain("{}") == lessons.RELATIONS_EACH
    assert about_spain("Madrid") == 0


def test_courses_take_turns_by_epoch(speaker: LLM) -> None:
    found = courses(speaker, [CAPITAL, QUESTION])
    seen: list[set[int]] = []

    class Watched(FineTune):
        def training_step(self, batch: object) -> torch.Tensor:
            rows = {id(row) for row in batch.texts}  # type: ignore[attr-defined]
            seen.append(
                {turn for turn, one in enumerate(found) for own in one.taught for les in own if id(les.row) in rows}
            )
            return super().training_step(batch)  # type: ignore[arg-type]

    method = Watched(speaker, [1], FinetuneSettings(epochs=4, whiten=0.0, learnt=0.0))
    method.fit(found, Runtime())
    assert list(islice(seen, 4)) == [{0}, {1}, {0}, {1}]

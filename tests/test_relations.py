"""What a prompt states of its subject, and in which other words."""

from __future__ import annotations

import pytest

from pipeline.editing.relations import KINDS, NAMES, PHRASINGS, other_words, others_alike, stated, template
from pipeline.requests.schema import EditRequest


def request(prompt: str, subject: str | None) -> EditRequest:
    return EditRequest(id="1", prompt=prompt, subject=subject, new_answer="x")


@pytest.mark.parametrize(
    ("prompt", "subject", "relation"),
    [
        ("The capital of Spain is", "Spain", "capital"),
        ("The capital city of Spain today is", "Spain", "capital"),
        ("Anna Lind was hired by the firm of", "Anna Lind", None),
        ("The language that people speak in Peru is", "Peru", "official language"),
        ("The native tongue of Anna Lind is", "Anna Lind", "native language"),
        ("Quadrix was developed by the firm of", "Quadrix", "maker"),
        ("Quadrix was developed in the country of", "Quadrix", "country of origin"),
        ("Who is it that invented the zip?", "zip", "inventor"),
        ("Which company owns Quadrix?", "Quadrix", "owner"),
        ("The sky above Spain often looks rather", "Spain", None),
        ("The sky is", None, None),
    ],
)
def test_the_relation_that_a_prompt_states(prompt: str, subject: str | None, relation: str | None) -> None:
    assert stated(request(prompt, subject)) == relation


def test_other_words_for_a_prompt() -> None:
    words = other_words(request("The capital of Spain is", "Spain"))
    assert "The capital of {} is" not in words and "{}'s capital is" in words
    assert "What is the capital of {}?" in words
    assert other_words(request("The sky is", None)) == []
    assert "Who invented the {}?" in other_words(request("The inventor of the zip is", "zip"))
    assert "The {} was invented by" in other_words(request("The inventor of the zip is", "zip"))


def test_each_phrasing_states_its_own_relation() -> None:
    """But for those that state several: where one was born may be the land that one is from."""
    assert len(PHRASINGS) > 90
    for relation, phrasings in PHRASINGS.items():
        assert len({*phrasings}) == len(phrasings) and KINDS[relation] <= {*NAMES.values()}, relation
        assert not phrasings[0].startswith("{}"), f"{relation}: nothing is located at a text's first token"
        assert [one for one in phrasings if one.endswith("?")], relation
        for phrasing in phrasings:
            assert phrasing.count("{}") == 1 and phrasing == phrasing.strip(), phrasing
            of = stated(request(phrasing.replace("{}", "Quadrix"), "Quadrix"))
            assert of is not None and (of == relation or phrasing in PHRASINGS[of]), (phrasing, of)


def test_the_template_of_a_prompt() -> None:
    assert template(request("Spain's king of Spain is", "Spain")) == "Spain's king of {} is"
    assert template(request("The sky is", None)) == "{} is"


def test_names_and_relations_of_a_subjects_kind() -> None:
    names, relations = others_alike(request("The capital of Spain is", "Spain"))
    assert {"France", "Iceland"} <= {*names} and not {"Isaac Newton", "Hamlet", "Microsoft"} & {*names}
    assert {"currency", "continent"} <= {*relations} and not {"capital", "author", "occupation"} & {*relations}
    assert others_alike(request("The sky is", None)) == ([*NAMES], [*KINDS])

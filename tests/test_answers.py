"""Whether an answer is right: nothing but it is said, its words stand in what is said, where a statement ends."""

from __future__ import annotations

import pytest

from pipeline.requests.answers import contains_answer, inner_ends, is_exact_answer, statement

EXACT = [
    ("Paris", "Paris", True),
    (" Paris.", "Paris", True),
    ("paris\nIt lies on the Seine", "Paris", True),
    ("Paris. It lies on the Seine.", "Paris", True),
    ("“Paris”!", "Paris", True),
    ('"Paris".', "Paris", True),
    ("the Nile.", "Nile", True),
    ("Nile;", "the Nile", True),
    ("An apple?", "apple", True),
    ("Dr. No.", "Dr. No", True),
    ("Yahoo!", "Yahoo!", True),
    ("3.5", "3.5", True),
    ("Theodore", "odore", False),
    ("Paris, France", "Paris", False),
    ("Paris is big.", "Paris", False),
    ("Paris-Nord", "Paris", False),
    ("Paris.com", "Paris", False),
    ("Paris (France).", "Paris", False),
    ("Romeo.", "Rome", False),
    ("Rome", "Romeo", False),
    ("It is Paris.", "Paris", False),
    ("3.5", "3", False),
    ("C# is a language", "C#", False),
    ("Anything", "?", False),
    ("", "Paris", False),
    ("\n", "Paris", False),
    ("C++", "C++", True),
    ("C#.", "C#", True),
    ("C#.", "C++", False),
    ("The Beatles and the Kinks", "Beatles and Kinks", True),
    ("U.S.A.", "USA", True),
    ("New  York", "new york", True),
    ("100%.", "100%", True),
    ('"Paris."', "Paris", True),
    ("**Paris**", "Paris", True),
    ("A\nQuestion", "A", True),
    ("", "?", False),
]


@pytest.mark.parametrize(("generated", "answer", "exact"), EXACT)
def test_an_exact_answer_says_that_and_no_more(generated: str, answer: str, exact: bool) -> None:
    assert is_exact_answer(generated, answer) is exact
    assert contains_answer(generated, answer) or not exact


@pytest.mark.parametrize(
    ("generated", "answer", "contained"),
    [
        ("It is Paris, of course", "Paris", True),
        ("The composer of it is  Johann Sebastian\tBach", "Johann Sebastian Bach", True),
        ("It is the U.S.A.", "USA", True),
        ("Romeo and Juliet", "Rome", False),
        ("York is new", "New York", False),
        ("Written in C", "C++", False),
        ("Written in C++.", "C++", True),
        ("", "Paris", False),
        ("Anything", "?", False),
    ],
)
def test_an_answer_is_contained_as_whole_words(generated: str, answer: str, contained: bool) -> None:
    assert contains_answer(generated, answer) is contained


@pytest.mark.parametrize(
    ("said", "ends", "expected"),
    [
        (" Paris. It lies on", 0, ("Paris.", True)),
        (" Paris.", 0, ("Paris.", False)),  # "Paris.com" may be to come
        ("\n\nParis\nIt", 0, ("Paris", True)),
        (" 3.5 metres", 0, ("3.5 metres", False)),
        (' "Yes." He', 0, ('"Yes."', True)),
        (" Dr. No. The", 0, ("Dr.", True)),
        (" Dr. No. The", inner_ends("Dr. No"), ("Dr. No.", True)),
        ("", 0, ("", False)),
    ],
)
def test_a_statement_ends_where_another_begins(said: str, ends: int, expected: tuple[str, bool]) -> None:
    assert statement(said, ends) == expected

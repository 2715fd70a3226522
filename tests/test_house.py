"""The house stays small: lines, options, chains of imports, private names, length of functions."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

import house

LINES = 19_699
OPTIONS_OF_RUN, OPTIONS_OF_ALL = 38, 350
CHAIN = 38
CIRCLES = [  # trial edits: attribution asks the study, which asks the edits, which ask attribution
    [
        "pipeline.attribution",
        "pipeline.attribution.find",
        "pipeline.attribution.trying",
        "pipeline.editing",
        "pipeline.editing.edit",
        "pipeline.editing.leave_out",
        "pipeline.study.sweep",
    ]
]
REACHING = 14
MEDIAN, P90 = 7, 20


def test_lines() -> None:
    assert house.lines() <= LINES


def test_options() -> None:
    found = house.options()
    assert found["run"] <= OPTIONS_OF_RUN
    assert sum(found.values()) <= OPTIONS_OF_ALL


def test_chains_of_imports() -> None:
    found = house.chain()
    assert len(found) <= CHAIN, " > ".join(found)
    assert house.circles() == CIRCLES


def test_the_chain_is_one() -> None:
    """What is found is a chain, and no module imports the first of it but one of a longer one."""
    edges, found = house.imports(), house.chain()
    inside = {name for circle in house.circles() for name in circle}
    for first, second in pairwise(found):
        assert second in edges[first] or {first, second} & inside
    assert all(found[0] not in to for to in edges.values())


def test_private_names_of_others() -> None:
    found = house.reaching()
    assert len(found) <= REACHING, found


def test_lengths_of_functions() -> None:
    sizes = house.functions()
    assert median(sizes) <= MEDIAN
    assert house.p90(sizes) <= P90

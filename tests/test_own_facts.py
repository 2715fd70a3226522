"""Somebody's own facts get in without much reading: in a line each, or in a file of fields of any name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commanding import CPU, FINETUNE, events
from conftest import refusal
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from pipeline.cli import main
from pipeline.editing.update import WeightUpdate
from pipeline.requests.readers import load_facts
from pipeline.requests.schema import EditRequest

CHILE = "Chile | The capital of Chile is | Lima"

pytestmark = pytest.mark.usefixtures("elsewhere")

# a fact in a line


def test_a_fact_in_a_line_is_a_request() -> None:
    first, second = load_facts([CHILE, "Peru|Peru's capital is|La Paz, Bolivia"])
    assert first == EditRequest(id="fact-1", subject="Chile", prompt="The capital of Chile is", new_answer="Lima")
    assert (second.id, second.subject, second.prompt, second.new_answer) == (
        "fact-2",
        "Peru",
        "Peru's capital is",
        "La Paz, Bolivia",
    )


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ("The capital of Chile is Lima", "expected three parts, 'subject | prompt | new answer', found 1"),
        ("Chile | The capital of Chile is", "found 2"),
        (f"{CHILE} | Santiago", "found 4"),
        ("| The capital of Chile is | Lima", "the subject is empty"),
        ("Chile | \t | Lima", "the prompt is empty"),
        ("Chile | The capital of Chile is | ", "the new answer is empty"),
        ("Peru | The capital of Chile is | Lima", "the prompt does not hold the subject 'Peru'"),
        ("Chi | The capital of Chile is | Lima", "the prompt does not hold the subject 'Chi'"),
        ("Chile | The capital of Chile is | \udcff", "'new_answer': not UTF-8 text"),
    ],
)
def test_what_is_no_fact_is_named_with_what_is_wrong(fact: str, said: str) -> None:
    message = refusal(lambda: load_facts([CHILE, fact]))
    assert message.startswith("fact: ") and repr(fact) in message and said in message


def test_facts_are_edited_without_a_file(
    model: list[str], ordinary_text: str, elsewhere: Path, refused: Callable[..., str]
) -> None:
    flags = [*CPU, "--layers", "1", *FINETUNE, "1", "--evaluation.text", ordinary_text]
    editing = ["edit", *model, *flags]
    assert main([*editing, "--fact", CHILE, "--fact", "Peru | Peru lies in | Asia", "--output", "first"]) == 0
    first = WeightUpdate.load(elsewhere / "first")
    assert [(request.subject, request.new_answer) for request in first.requests] == [
        ("Chile", "Lima"),
        ("Peru", "Asia"),
    ]
    content = events(elsewhere / "first").summary_metadata["_hparams_/session_start_info"].plugin_data.content
    row = HParamsPluginData.FromString(content).session_start_info.hparams
    assert row["request set"].string_value == f"{CHILE}; Peru | Peru lies in | Asia", "and not the demo"
    options = str(elsewhere / "first" / "options.yaml")
    assert main(["edit", "--config", options, "--offset", "1", "--output", "again"]) == 0
    assert [request.subject for request in WeightUpdate.load(elsewhere / "again").requests] == ["Peru"]
    other = "Chile | The capital of Chile is | Quito"
    assert main([*editing, "--fact", other, "--after", "first", "--output", "both"]) == 0
    both = WeightUpdate.load(elsewhere / "both").requests
    assert [(one.subject, one.new_answer) for one in both] == [("Peru", "Asia"), ("Chile", "Quito")]
    line = refused(*editing, "--fact", CHILE, "--fact", other, "--output", "third")
    assert "fact-1 ('Lima') and fact-2 ('Quito')" in line


def test_a_fact_beside_a_file_is_refused(refused: Callable[..., str]) -> None:
    line = refused("edit", "--requests", "facts.jsonl", "--fact", CHILE)
    assert line == refused("edit", "facts.jsonl", "--fact", CHILE)
    assert line == "error: fact: stands in place of a file, and facts.jsonl is given too; give one of them"

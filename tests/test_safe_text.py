"""Somebody's text is a text wherever it is shown: in a terminal, in Markdown, in a spreadsheet, in an error."""

from __future__ import annotations

import csv
import io
import warnings
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.errors import Note, UserError, note, terminal_text
from pipeline.evaluation.evaluator import Evaluation, Measurement
from pipeline.evaluation.metrics import Estimate
from pipeline.evaluation.values import Column
from pipeline.model.llm import ShownToken
from pipeline.reporting.report import answers_table, metrics_table, missed_table
from pipeline.reporting.tables import csv_text, markdown_text, values_csv
from pipeline.reporting.terminal import say, show_answers, show_table, show_tokens
from pipeline.requests.check import check_requests, summary
from pipeline.requests.readers import read_requests
from pipeline.requests.schema import EditRequest

STEERING = [
    "\x1b[2J\x1b[31mred",
    "a\x9b31mred",
    "a\rforged",
    "a\nforged",
    "a\u2028forged",
    "ab\u202egnihtemos",
    "\udcff",
]


@pytest.mark.parametrize("text", STEERING)
def test_cases_of_text_that_steers_a_terminal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    request = EditRequest.model_construct(id=text, prompt=text, new_answer=text)
    shows: list[Any] = [
        lambda: say(f"request {text}"),
        lambda: show_table([text, "b"], [[text], [text, "1"]]),
        lambda: show_answers([text], {text: [text]}),
        lambda: show_tokens(request, [ShownToken(0, 1, text, True, False)]),
        lambda: print(terminal_text(text)),
    ]
    usual = {"\n"}
    for show in shows:
        show()
        shown = capsys.readouterr().out
        assert all(one.isprintable() or one in usual for one in shown)
        assert not any(line.strip().startswith("forged") for line in shown.splitlines())


@pytest.mark.parametrize("text", ["日本語", "नमस्ते", "👩‍💻 é", "می‌خواهم", "a\\b [c] `d` <e>"])
def test_cases_of_text_that_is_shown_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(text)
    assert capsys.readouterr().out == text + "\n"


def test_cases_of_errors_and_notes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        note("cache: \x1b[2Jdamaged\nforged")
        note("cache: \x1b[2Jdamaged\nforged")
        warnings.warn("a library's", stacklevel=1)
        raise UserError("id '\x1b[31m\n\ud800' was used before")

    monkeypatch.setattr("pipeline.cli.COMMANDS", {"plan": type("Command", (), {"call": staticmethod(fails)})})
    monkeypatch.setattr("pipeline.cli.parse", lambda *_: object())
    assert main(["plan"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert (
        told.count(r"note: cache: \x1b[2Jdamaged\nforged") >= 1
        and told[-1] == r"error: id '\x1b[31m \ud800' was used before"
    )
    with pytest.warns(Note):
        note("of Python")


MARKDOWN = [
    "<script>alert(1)</script>",
    "![x](http://evil.example/x.png)",
    "[click](javascript:alert(1))",
    "a | b\n| forged | row |",
    "# heading `code` **bold** ~~gone~~ $x$",
    "&lt;b&gt; https://evil.example www.evil.example",
    "[ref]: http://evil.example",
]


@pytest.mark.parametrize("text", MARKDOWN)
def test_cases_of_text_that_marks_up(text: str) -> None:
    """It reads as it is: a reader that takes the entities back finds the text."""
    import html

    safe = markdown_text(text)
    assert html.unescape(safe) == " ".join(text.split())
    assert not {*safe} & {*"`*_<>|!~$"} and "](" not in safe and "://" not in safe and "]:" not in safe
    request = EditRequest(id="1", prompt=text, new_answer=text)
    measured = Measurement({f"portability/{text}": Estimate(0.5, 1, 0.25, 0.75)}, [text])
    for table in (answers_table([request], Evaluation(measured)), metrics_table(Evaluation(measured))):
        rows = table.splitlines()
        assert "<" not in table and len({row.count("|") for row in rows}) == 1
    assert "0.500 [0.250, 0.750]" in table, "our own figures stay readable"


@pytest.mark.parametrize("text", ["=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "-2+3", "\t=1", '=HYPERLINK("x")'])
def test_cases_of_cells_that_begin_a_formula(text: str) -> None:
    assert csv_text(text) == f"'{text}"
    request = EditRequest.model_construct(id=text, prompt=text, new_answer=text, old_answer=text)
    measured = Measurement({}, [text], {"generation": [[text]]})
    (row,) = csv.DictReader(io.StringIO(values_csv([request], Evaluation(measured))))
    assert not [cell for cell in row.values() if cell[:1] in "=@+-\t"]


@pytest.mark.parametrize("text", ["-5", "+4.5", "-0.25", "a=b", "Rome", ""])
def test_cases_of_cells_that_stay(text: str) -> None:
    assert csv_text(text) == text


def test_cases_of_a_forged_line_in_a_summary(tmp_path: Any) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "A is", "new_answer": "b", "locality": [{"prompt": "c", "answer": "d", '
                    '"axis": "x\\nbad: forged \\u001b[2J"}]}\n')  # fmt: skip
    lines = summary(check_requests(file, read_requests(file))).splitlines()
    assert not [line for line in lines if line.startswith("bad") or "\x1b" in line]


def test_facts_that_do_not_hold_are_told_with_what_the_model_says() -> None:
    held, missed = (
        EditRequest(id=name, prompt=f"The {name} is", new_answer="Lima", rephrases=(f"{name}?",))
        for name in ("held", "missed")
    )
    said = {"generation": [["Lima."], ["Rome."]], "rephrase": [["Lima"], ["no | idea"]]}
    values = {f"{kind}_containment": Column({0: 1.0, 1: 0.0}) for kind in said}
    asked = {"generation": [[held.prompt], [missed.prompt]], "rephrase": [[*held.rephrases], [*missed.rephrases]]}
    measured = Measurement({}, ["Lima.", "Rome."], said, values, asked=asked)
    table = missed_table([held, missed], Evaluation(measured))
    _, _, asked, reworded = table.splitlines()
    assert asked == "| missed | The missed is | Lima | Rome. |"
    assert reworded == "| missed | missed? | Lima | no &#124; idea |"
    assert missed_table([held], Evaluation(Measurement({}, ["Lima."], said, {}))) == ""

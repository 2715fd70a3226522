"""`chat`: each side goes on from its own turns, as a plain argmax loop does, and what it is told is done."""

from __future__ import annotations

import io
import os
import pty
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commanding import CPU
from programs import RUN, Program, at_terminal, wait_for
from teams import Team
from test_generation import argmax_loop
from test_serving_app import TEMPLATE

from pipeline.cli import main
from pipeline.editing.update import WeightUpdate
from pipeline.errors import terminal_text
from pipeline.model.llm import LLM
from pipeline.model.loading import load_model
from pipeline.serving.asked import Asked
from pipeline.updates import load_version

TOKENS = 6
FIRST, SECOND = "The capital of Spain is", "Peru"


@pytest.fixture(scope="module")
def chat_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def base(chat_folder: Path) -> LLM:
    return load_model(str(chat_folder))


@pytest.fixture
def talk(
    chat_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """What `chat` says to some lines of a pipe, but for its first line; it ends well."""

    def run(lines: list[str], *words: object, model: Path = chat_folder) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        few = ["--model", str(model), "--max-new-tokens", str(TOKENS), *CPU]
        assert main(["chat", *few, *map(str, words)]) == 0
        first, _, rest = capsys.readouterr().out.partition("\n")
        assert first.startswith(f"{model}") and "/help" in first
        return rest

    return run


def asked(*turns: str) -> str:
    """A talk as the template puts it: messages and answers in turns."""
    roles = ("user", "assistant")
    told = [f"{roles[place % 2]} : {text} " for place, text in enumerate(turns)]
    return f"{''.join(told)}assistant :"


def shown(text: str) -> str:
    """An answer that is cut at the most tokens, as the terminal shows it."""
    return "\n".join(map(terminal_text, text.split("\n"))) + " …\n"


def answers(llm: LLM, *messages: str) -> list[str]:
    """What a model says to each message of a talk."""
    turns: list[str] = []
    for message in messages:
        turns += [message, argmax_loop(llm, asked(*turns, message), TOKENS)]
    assert len({*turns}) == len(turns) and all(turns)
    return turns[1::2]


def test_a_talk_of_several_turns(talk: Callable[..., str], base: LLM) -> None:
    one, two = answers(base, FIRST, SECOND)
    assert two != answers(base, SECOND)[0], "what came before counts"
    said = talk([FIRST, "", SECOND, "/undo", f"  {SECOND} ", "/reset", FIRST, "/quit", FIRST])
    assert said == shown(one) + shown(two) + f"taken back: {SECOND}\n" + shown(two) + shown(one)


def test_each_side_goes_on_from_its_own_turns(talk: Callable[..., str], base: LLM, tmp_path: Path) -> None:
    ours = answers(base, FIRST, SECOND)
    name = "model.layers.1.mlp.down_proj.weight"
    made = WeightUpdate(
        base.name, base.fingerprint, "none", [1], {name: -2 * base.model.get_parameter(name).detach()}
    )
    made.save(tmp_path / "made")
    with made.applied(base):
        theirs, alone = answers(base, FIRST, SECOND), answers(base, SECOND)[0]
    assert ours[0] != theirs[0] and ours[1] != theirs[1]
    update = ("--update", tmp_path / "made")
    assert talk([FIRST, SECOND], *update) == shown(theirs[0]) + shown(theirs[1])
    both = f"base: {shown(ours[0])}edited: {shown(theirs[0])}"
    assert talk(["/both", FIRST, "/base", SECOND], *update) == both + shown(ours[1])
    assert talk(["/base", FIRST, "/edited", SECOND], *update) == shown(ours[0]) + shown(alone)


@pytest.mark.parametrize("template", [True, False])
def test_plain_text_is_gone_on_with(
    template: bool, talk: Callable[..., str], base: LLM, tiny_folder: Path, chat_folder: Path
) -> None:
    """Where there is no template, or where that is asked for; up to the end of a line."""
    base.tokenizer.chat_template = None
    one = argmax_loop(base, FIRST, TOKENS)
    two = argmax_loop(base, f"{FIRST}{one}\n{SECOND}", TOKENS)
    assert "\n" not in one + two
    said = talk([FIRST, SECOND], *["--plain"] * template, model=chat_folder if template else tiny_folder)
    assert said == (
        "plain text: the model goes on from the talk as it stands, up to the end of a line\n"
        + shown(one)
        + shown(two)
    )


def test_a_line_ends_plain_text(
    talk: Callable[..., str], base: LLM, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    (line,) = base.tokenizer("\n").input_ids
    monkeypatch.setattr(Asked, "take", lambda self, _, *how, take=Asked.take: take(self, line, *how))
    assert talk([FIRST], model=tiny_folder).splitlines()[1:] == ["(nothing)"]


def test_the_facts_of_an_update(talk: Callable[..., str], made: SimpleNamespace) -> None:
    requests = WeightUpdate.load(made.edited).requests
    assert len(requests) == 6
    said = talk(["/facts"], "--update", made.edited)
    assert said.splitlines() == [f"{one.prompt} -> {one.new_answer}" for one in requests]


def test_versions_of_a_store(talk: Callable[..., str], base: LLM, two_versions: Team) -> None:
    store = ("--store", two_versions.store.folder)
    for words, number in (((), 2), (("--version", 1), 1), (("--version", 0), 0)):
        update = load_version(two_versions.store, number)
        note, *facts = talk(["/facts"], *store, *words).splitlines()
        if not update:
            assert note.startswith("error: /facts: of which update?") and not facts
            continue
        assert note == "note: memit taught the facts as plain text; a chat may miss them: try --plain"
        assert len(facts) == 2 * number and all(fact.endswith(" -> Lima") for fact in facts)
        with update.applied(base):
            (expected,) = answers(base, FIRST)
        assert talk([FIRST], *store, *words).endswith(f"\n{shown(expected)}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/edited", "error: /edited: of which update? start with --update DIR or --store DIR"),
        ("/both", "error: /both: of which update?"),
        ("/facts", "error: /facts: of which update?"),
        ("/undo", "there is nothing to take back"),
        ("/rest", "error: chat: '/rest' does not exist (did you mean '/reset'?); there is /base, /both,"),
        (FIRST * 30, "error: the talk, which /undo and /reset shorten: "),
        ("/help", "/base    the base model answers from here on\n"),
    ],
)
def test_what_is_no_message(line: str, said: str, talk: Callable[..., str], base: LLM) -> None:
    """A line says so, and the talk goes on as before."""
    (answer,) = answers(base, FIRST)
    told = talk([line, FIRST])
    assert told.startswith(said)
    assert told.endswith(f"\n{shown(answer)}")


def test_drawn_answers(talk: Callable[..., str]) -> None:
    hot = ("--temperature", "1.5", "--seed")
    first = talk([FIRST, "/undo", FIRST], *hot, 3)
    assert first == talk([FIRST, "/undo", FIRST], *hot, 3)
    assert first != talk([FIRST, "/undo", FIRST], *hot, 4)
    one, _, again = first.partition(f"taken back: {FIRST}\n")
    assert one != again, "what is asked again is drawn again"


def test_ctrl_c_stops_an_answer_and_keeps_the_talk(
    talk: Callable[..., str], base: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three tokens, which were shown as they came."""
    seen = list[str]()
    take = Asked.take

    def interrupted(one: Asked, *how: Any) -> None:
        take(one, *how)
        if len(one.said) == 3 and not seen:
            seen.append(capsys.readouterr().out)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Asked, "take", interrupted)
    begun = argmax_loop(base, asked(FIRST), 3)
    after = argmax_loop(base, asked(FIRST, begun, SECOND), TOKENS)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{FIRST}\n{SECOND}\n"))
    assert main(["chat", "--model", base.name, "--max-new-tokens", str(TOKENS), *CPU]) == 0
    assert seen[0].partition("\n")[2].startswith(terminal_text(begun)[:2]) and begun
    assert capsys.readouterr().out == " (stopped)\n" + shown(after)


def test_ctrl_c_where_no_answer_comes(
    base: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Typed(io.StringIO):
        def readline(self, *_: Any) -> str:
            signal.raise_signal(signal.SIGINT)
            return FIRST

    monkeypatch.setattr("sys.stdin", Typed())
    assert main(["chat", "--model", base.name, *CPU]) == 130
    told = capsys.readouterr()
    assert told.err == "interrupted\n" and told.out.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--update", "x", "--store", "y"], "error: update: give either --update DIR or --store DIR"),
        (["--version", "3"], "error: version: 3 of which store?"),
        (["--update", "nowhere"], "error: update: "),
        (["--store", "nowhere"], "error: store: nowhere: no such store"),
        (["--temperature", "3"], "error: temperature: 3.0 is too large; the most is 2"),
        (["--max-new-token", "3"], "error: flag --max-new-token does not exist (did you mean --max_new_tokens?)"),
    ],
)
def test_what_is_refused(words: list[str], line: str, chat_folder: Path, refused: Callable[..., str]) -> None:
    assert refused("chat", "--model", str(chat_folder), *words).startswith(line)


def test_at_a_terminal(chat_folder: Path, tmp_path: Path) -> None:
    """Keys do what they should: Ctrl-C stops an answer, Ctrl-D ends, and a mark says who answers."""
    keys, screen = pty.openpty()
    os.set_blocking(keys, False)
    told = b""

    def sees(text: str) -> bool:
        nonlocal told
        try:
            told += os.read(keys, 1 << 16)
        except OSError:
            return text in told.decode(errors="replace")
        return text in told.decode(errors="replace")

    words = ["chat", "--model", str(chat_folder), "--max-new-tokens", "90", *CPU]
    with Program(RUN, *words, folder=tmp_path, before=partial(at_terminal, os.ttyname(screen))) as program:
        wait_for(lambda: sees("base> "))
        os.write(keys, f"{FIRST}\n".encode())
        wait_for(lambda: len(told.partition(FIRST.encode())[2]) > 8 or sees("\0"))
        os.write(keys, b"\x03")
        wait_for(lambda: sees("(stopped)"))
        wait_for(lambda: sees("(stopped)") and told.count(b"base> ") == 2)
        os.write(keys, b"\x04")
        ended = program.finished(30)
    assert ended.returncode == 0, ended.stderr
    assert told.decode(errors="replace").replace("\r", "").count("(stopped)\n") == 1

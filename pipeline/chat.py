"""`run.py chat`: a talk in the terminal with a model as it is and as an update makes it, token by token.

What answers is what `serve` answers with (`pipeline.serving.turns`), one request at a time.
"""

from __future__ import annotations

import signal
import sys
from contextlib import nullcontext, suppress
from functools import partial
from importlib import import_module
from itertools import count
from typing import Any

from pipeline.editing.editor import METHODS
from pipeline.editing.update import WeightUpdate
from pipeline.errors import UserError, check_choice, terminal_text
from pipeline.model.llm import LLM
from pipeline.options.commands import ChatCommand
from pipeline.reporting.terminal import say
from pipeline.running.interrupts import Interrupted, interrupts
from pipeline.running.stage import attempt
from pipeline.running.trainer import precision_of
from pipeline.serving.asked import Asked
from pipeline.serving.live import Version
from pipeline.serving.turns import answer
from pipeline.updates.disk import BASE

ROLES = ("user", "assistant")
SIDES = {"/base": ["base"], "/edited": ["edited"], "/both": ["base", "edited"]}  # who answers
COMMANDS = {
    "/base": "the base model answers from here on",
    "/edited": "the edited model does",
    "/both": "both do, one after the other; each knows its own answers only",
    "/facts": "what the update changed: prompts and new answers",
    "/undo": "take the last message and its answer back",
    "/reset": "begin anew",
    "/help": "show this list; Ctrl-C stops an answer",
    "/quit": "end, as Ctrl-D does",
}


def talk(llm: LLM, update: WeightUpdate | None, options: ChatCommand) -> None:
    """Answer what is read, line by line, until the input ends, `/quit`, or Ctrl-C where no answer comes."""
    held, at_terminal = Talk(llm, update, options), sys.stdin.isatty()
    if at_terminal:
        with suppress(ImportError):  # some systems have none
            import_module("readline")  # from here on, lines can be edited and called back
    try:
        with llm.frozen(), precision_of(options.trainer, llm.embedding.device):
            while held.take(input(f"{' + '.join(held.sides)}> " if at_terminal else "").strip()):
                pass
    except (EOFError, Interrupted) as ended:
        print(end="\n" * at_terminal)
        if isinstance(ended, Interrupted):
            raise


class Talk:
    """A talk: its turns, each a message with the answers to it by side, and who answers the next one."""

    def __init__(self, llm: LLM, update: WeightUpdate | None, options: ChatCommand) -> None:
        self.llm, self.update, self.options, self.seeds = llm, update, options, count(options.seed)
        self.plain = options.plain or not llm.tokenizer.chat_template
        self.sides, self.turns = SIDES["/edited" if update else "/base"], list[tuple[str, dict[str, str]]]()
        say(f"{llm.name}{', edited' if update else ''}; /help shows what there is beside messages")
        if self.plain:
            say("plain text: the model goes on from the talk as it stands, up to the end of a line")
        elif update and not update.chat and getattr(METHODS.get(update.method), "needs_subject", False):
            say(f"note: {update.method} taught the facts as plain text; a chat may miss them: try --plain")

    def take(self, line: str) -> bool:
        """Do what a line says, a command or a message; whether the talk goes on."""
        try:
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.turns.append((line, {side: self._answer(side, line) for side in self.sides}))
        except UserError as error:
            say(f"error: {error}")
        return line != "/quit"

    def command(self, name: str) -> None:
        """Do what a command says; UserError for one that does not exist, or needs an update."""
        check_choice("chat", name, COMMANDS)
        if name in ("/edited", "/both", "/facts") and not self.update:
            raise UserError(f"{name}: of which update? start with --update DIR or --store DIR")
        if name in SIDES:
            self.sides = SIDES[name]
        elif name == "/facts" and self.update:
            say(*(f"{one.prompt} -> {one.new_answer}" for one in self.update.requests))
        elif name == "/undo":
            say(f"taken back: {self.turns.pop()[0]}" if self.turns else "there is nothing to take back")
        elif name == "/reset":
            self.turns.clear()
        elif name == "/help":
            say(*(f"{name:<8} {what}" for name, what in COMMANDS.items()))

    def _answer(self, side: str, message: str) -> str:
        """What a side says to a message, shown as it comes, until Ctrl-C; UserError where it has no room."""
        ids, tokens = self._tokens(side, message), self.llm.tokens
        if not ids:
            raise UserError(f"{message!r} becomes no token")
        limit = max(1, min(self.options.max_new_tokens, (self.llm.context_length or 1 << 30) - len(ids)))
        tokens.check_length(len(ids) + limit, "the talk, which /undo and /reset shorten")
        how: Any = {"temperature": self.options.temperature, "seed": next(self.seeds), "streamed": True}
        asked = Asked(Version(BASE, {}), ids, limit, _show, stops=["\n"] if self.plain else [], **how)
        edited = self.update.applied(self.llm) if self.update and side == "edited" else nullcontext()
        with interrupts.left_to(lambda *_: setattr(asked, "gone", True), signal.SIGINT), edited:
            print(f"{side}: " if len(self.sides) > 1 else "", end="", flush=True)
            suffices, why = attempt(partial(answer, self.llm, [asked]))
            end = "" if asked.text.strip() else "(nothing)"
            print(" (stopped)" if asked.gone else " …" if asked.end == "length" else end, flush=True)
        if not suffices:
            raise UserError(f"the talk: {why}")
        return asked.text

    def _tokens(self, side: str, message: str) -> list[int]:
        """The talk as a side knows it, with a message at its end; UserError as the chat template refuses it."""
        past = [(asked, answers[side]) for asked, answers in self.turns if side in answers]
        if self.plain:
            return self.llm.tokens.texts(["\n".join([*map("".join, past), message])])[0]
        spoken = [{"role": role, "content": text} for turn in past for role, text in zip(ROLES, turn, strict=True)]
        return self.llm.tokens.conversation([*spoken, {"role": ROLES[0], "content": message}])


def _show(piece: str, _: str | None) -> None:
    print("\n".join(map(terminal_text, piece.expandtabs(4).split("\n"))), end="", flush=True)

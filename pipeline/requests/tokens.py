"""Prompts and answers as one text, and as tokens: the one path by which every stage reads them.

Plain, the answer follows the prompt after one space. As a chat, the prompt is a user's message in the tokenizer's
own chat template, with the opening of the assistant's turn behind it; the answer is what the assistant says there.
Between the two stands what white space the template puts there: none after SmolLM2's opening, which ends in a line
break, and a space after Mistral's `[/INST]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from operator import eq
from typing import Any
from unicodedata import east_asian_width

from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError, one_line
from pipeline.requests.rows import Row
from pipeline.requests.schema import EditRequest
from pipeline.running.limited import limited

PROMPT, ANSWER = "what is asked", "what is said"  # stand in for both while a template is read
STOPS = ".!?…。！？"  # what ends a statement
TOGETHER = 1024  # texts that are tokenized at once: what a tokenizer says of each takes kilobytes


@dataclass(frozen=True)
class Joining:
    """What stands before, between and after prompt and answer."""

    head: str = ""  # before every prompt
    tail: str = ""  # behind it
    space: str = " "  # between prompt and answer
    special: bool = True  # whether the tokenizer adds its own opening tokens; a template holds them already
    end: str = ""  # what ends a turn, behind the answer

    def prompt(self, prompt: str) -> str:
        """The text that the model is to go on from."""
        return f"{self.head}{prompt.rstrip()}{self.tail}"

    def whole(self, prompt: str, answer: str) -> str:
        """The same with the answer behind it."""
        return f"{self.prompt(prompt)}{self.space}{answer.strip()}"

    def ending(self, answer: str) -> str:
        """What comes behind an answer that is all that is said: a full stop if it has none, and the turn's end."""
        last = answer.strip()[-1:]
        stop = "" if last in STOPS else "。" if east_asian_width(last) in "WF" else "."
        return f"{stop}{self.end}"


PLAIN = Joining()


class Tokens:
    """A tokenizer, and how texts are put to it, with `chat` in its template; UserError when it has none."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool = False,
        name: str = "the model",  # for messages
        vocabulary: int | None = None,  # how many tokens the model embeds; None: as many as there are
        context_length: int | None = None,  # the longest text in tokens; None: any
    ) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.vocabulary, self.context_length = vocabulary or len(tokenizer), context_length
        self.joining: Joining = chat_joining(tokenizer, name) if chat else PLAIN
        self.closing = closing_tokens(tokenizer)

    @cached_property
    def template(self) -> Joining | None:
        """The chat template's joining, where there is one that works."""
        return self._template([])

    @cached_property
    def bare_template(self) -> Joining | None:
        """The chat that edits teach: prompts' own, or one with an empty system turn, where there is one."""
        return self._template([{"role": "system", "content": ""}]) or self.template

    def _template(self, before: Sequence[dict[str, str]]) -> Joining | None:
        with suppress(UserError):
            return chat_joining(self.tokenizer, self.name, before) if self.joining is PLAIN else self.joining
        return None

    @property
    def pad_token_id(self) -> int:
        """The token that fills batches: masked or behind all that is read, so any that is embedded will do."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and token < self.vocabulary:
                return int(token)
        return 0

    def rows(
        self,
        pairs: Sequence[tuple[str, str]],
        tags: Sequence[Any] | None = None,
        what: str = "requests",
        ended: bool = False,
        joining: Joining | None = None,
    ) -> list[Row]:
        """Join (prompt, answer) texts and find the answers' tokens; `what` the texts are is for messages.

        With `ended` the answer's end belongs to the target: what teaches an answer teaches to stop after it.
        `joining` stands around them in place of the model's own. The target begins where the joined text's tokens
        leave the prompt's own, so it is right with and without a BOS token, and for tokenizers that keep the space
        with the word or apart from it.
        UserError when an answer becomes no token or unknown ones alone, or a text is longer than the context.
        """
        joining = joining or self.joining
        before = self.prompts([prompt for prompt, _ in pairs], joining)
        joined = self._joined(pairs, ended, joining)
        rows = []
        for (prompt, answer), tag, asked, ids in zip(
            pairs, tags or [None] * len(pairs), before, joined, strict=True
        ):
            if not asked or not prompt.strip():
                raise UserError(f"{what}: prompt {prompt!r} becomes no token")
            start = max(1, _shared(asked, ids))
            if not answer.strip() or start >= len(ids):
                raise UserError(f"{what}: answer {answer!r} to {prompt!r} becomes no token")
            if self._is_unknown(ids[start:]):
                raise UserError(f"{what}: answer {answer!r} to {prompt!r} is unknown to {self.name}'s tokenizer")
            self.check_length(len(ids), f"{what}: {prompt[:60]!r}")
            rows.append(Row(ids, start, tag=tag))
        return rows

    def _joined(self, pairs: Sequence[tuple[str, str]], ended: bool, joining: Joining) -> list[list[int]]:
        """Token ids of prompts with their answers; an end that would change an answer's own tokens is left out."""
        texts = [joining.whole(*pair) for pair in pairs]
        bare = self._ids(texts, joining.special)
        if not ended:
            return bare
        endings = [joining.ending(answer) for _, answer in pairs]
        whole = self._ids([text + end for text, end in zip(texts, endings, strict=True)], joining.special)
        return [
            with_end if with_end[: len(ids)] == ids and not self._is_unknown(with_end[len(ids) :]) else ids
            for ids, with_end in zip(bare, whole, strict=True)
        ]

    def answered(self, requests: Sequence[EditRequest], answers: Sequence[str] | None = None) -> list[Row]:
        """Requests' prompts with these answers, or the new ones; and the places of their subjects."""
        answers = answers or [request.new_answer for request in requests]
        rows = self.rows([(request.prompt, answer) for request, answer in zip(requests, answers, strict=True)])
        return [
            row._replace(tag=request.id, subject=self.subject(request, row, answer))
            for request, row, answer in zip(requests, rows, answers, strict=True)
        ]

    def subject(self, request: EditRequest, row: Row, answer: str) -> tuple[int, int] | None:
        """Places of the first and last token of a request's subject; of several mentions the last one counts."""
        span = request.subject_span
        if span is None:
            return None
        first, last = (
            min(self.place(request.prompt, end, answer), row.target_start - 1) for end in (span[0] + 1, span[1])
        )
        return first, last

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts that go on: with the tokenizer's opening tokens, without closing ones."""
        return self._ids(texts, special=True)

    def prompts(self, prompts: Sequence[str], joining: Joining | None = None) -> list[list[int]]:
        """Token ids of prompts as the model is given them: with `joining`'s text around, by default the model's."""
        joining = joining or self.joining
        return self._ids([joining.prompt(prompt) for prompt in prompts], joining.special)

    def conversation(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to the assistant's answer; UserError when no chat template takes it."""
        if not self.tokenizer.chat_template:
            raise UserError(f"chat: the tokenizer of {self.name} has no chat template")
        try:
            text = _rendered(self.tokenizer, list(turns), opened=True)
        except Exception as error:  # of whatever kind: a template is a program of its own
            raise UserError(f"chat: the chat template of {self.name} refuses this: {one_line(error)}") from None
        (ids,) = self._ids([text], special=False)
        return ids

    def opened(self, pairs: Sequence[tuple[str, str]], joining: Joining) -> list[list[int]]:
        """Token ids of prompts with the beginnings of answers, from which the model is to go on."""
        return self._ids([joining.whole(*pair) for pair in pairs], joining.special)

    def place(self, prompt: str, end: int, answer: str = "") -> int:
        """Place of the token that holds the character before `end` of a prompt, given plain, whatever the template.

        It is the place among the prompt's tokens, or among those of the prompt with the answer.
        """
        joining = self.joining
        text = joining.whole(prompt, answer) if answer else joining.prompt(prompt)
        end = min(len(joining.head) + end, len(text))
        if self.tokenizer.is_fast:
            found = self.tokenizer(text, add_special_tokens=joining.special, return_offsets_mapping=True)
            spans = found.offset_mapping
            return max((place for place, (first, last) in enumerate(spans) if first < min(end, last)), default=0)
        upto, ids = self._ids([text[:end], text], joining.special)
        shared = _shared(upto, ids)
        return max(0, shared - 1 if shared == len(upto) else shared)

    def check_length(self, length: int, what: str) -> None:
        """Raise UserError when `length` tokens do not fit the model's context."""
        if self.context_length is not None and length > self.context_length:
            raise UserError(f"{what}: {length} tokens; the context of {self.name} holds {self.context_length}")

    def _ids(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        found: list[list[int]] = []
        for start in range(0, len(texts), TOGETHER):
            found += self.tokenizer(list(texts[start : start + TOGETHER]), add_special_tokens=special).input_ids
        for text, ids in zip(texts, found, strict=True):
            if max(ids, default=0) >= self.vocabulary:
                raise UserError(
                    f"model: {self.name} embeds {self.vocabulary} tokens; its tokenizer gives {text[:60]!r} the "
                    f"token {max(ids)}: they do not belong together"
                )
        closing = self.closing if special else 0
        return [ids[: len(ids) - closing] for ids in found]

    def _is_unknown(self, ids: Sequence[int]) -> bool:
        """Whether nothing but blanks is left of tokens without the unknown one."""
        known = [token for token in ids if token != self.tokenizer.unk_token_id]
        return len(known) < len(ids) and not str(self.tokenizer.decode(known)).strip()


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    return len(list(takewhile(bool, map(eq, first, second))))


def chat_joining(tokenizer: PreTrainedTokenizerBase, name: str, before: Sequence[dict[str, str]] = ()) -> Joining:
    """The joining of a tokenizer's chat template, read off what it makes of one exchange, with turns `before` it.

    Templates that can let the model think first are asked not to: the answer itself is what is edited and measured.
    UserError when there is no chat template, or it does not put a prompt into the text as it is.
    """
    if not tokenizer.chat_template:
        raise UserError(f"chat: the tokenizer of {name} has no chat template; leave chat out")
    asked = [*before, {"role": "user", "content": PROMPT}]
    answered = [*asked, {"role": "assistant", "content": ANSWER}]
    try:
        opened, told = limited(lambda: [_rendered(tokenizer, asked, opened=True), _rendered(tokenizer, answered)])
    except RuntimeError as error:
        line = f"chat: the chat template of {name} fails on one question and answer: {one_line(error)}"
        raise UserError(line) from None
    head, found, tail = opened.partition(PROMPT)
    if not found:
        raise UserError(f"chat: the chat template of {name} does not hold the prompt as it is; leave chat out")
    between, _, end = told.removeprefix(opened).partition(ANSWER) if told.startswith(opened) else ("", "", "")
    return Joining(head, tail, between if between.isspace() else "", special=False, end=end.strip())


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], opened: bool = False) -> str:
    return str(
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened, enable_thinking=False)
    )


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a tokenizer puts behind every text (an end, a [SEP]): a text that goes on has none."""
    inner, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    places = [at for at in range(len(whole)) if whole[at : at + len(inner)] == inner] if inner else []
    return len(whole) - places[0] - len(inner) if places else 0

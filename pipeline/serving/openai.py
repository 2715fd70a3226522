"""The OpenAI API's words: what a request may ask for, what an answer looks like, and what an error does."""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from pipeline.errors import one_line
from pipeline.files import parse_json

NEUTRAL = {  # values of fields that are not supported, in JSON, that ask for nothing
    "n": "1", "best_of": "1", "echo": "false", "logprobs": "false", "store": "false", "tools": "[]",
    "logit_bias": "{}", "presence_penalty": "0", "frequency_penalty": "0", "response_format": '{"type": "text"}',
}  # fmt: skip

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class RefusedError(Exception):
    """A request that gets an error for an answer, as the OpenAI API has them."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Strict(BaseModel, strict=True, extra="forbid"):
    """Nothing but these fields, and nothing but their types."""


class StreamOptions(Strict):
    """What a stream holds besides."""

    include_usage: bool = False


class Wish(Strict):
    """What both kinds of request may ask for; the field that holds the text, and the usual limit of tokens."""

    asks: ClassVar = ""
    usual: ClassVar = 16

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""

    @property
    def stops(self) -> list[str]:
        """The texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer, where that is said."""
        return self.max_tokens


class Completion(Wish):
    """A text to go on from."""

    asks: ClassVar = "prompt"

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class Part(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a conversation; a developer's is one of the system."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def spoken(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role.replace("developer", "system"), "content": text}


class Chat(Wish):
    """A conversation to answer."""

    asks: ClassVar = "messages"
    usual: ClassVar = 512

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


Kind = TypeVar("Kind", Completion, Chat)


def read(kind: type[Kind], body: bytes) -> Kind:
    """What a request asks for; RefusedError when it is no JSON, or asks for what there is not, naming the field."""
    try:
        given = parse_json(body)
    except ValueError as error:
        raise RefusedError(400, f"the body is no JSON: {one_line(error)}") from None
    if not isinstance(given, dict):
        raise RefusedError(400, "the body is no JSON object")
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - kind.model_fields:
        if json.dumps(given.pop(name)).removesuffix(".0") != NEUTRAL.get(name):
            raise RefusedError(400, f"{name}: not supported by this server", name, "unsupported_parameter")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise RefusedError(400, one_line(error), str(error.errors()[0]["loc"][0])) from None


class Reply:
    """The shape of the answers to one request."""

    def __init__(self, chat: bool, version: int, prompt_tokens: int) -> None:
        self.chat, self.prompt_tokens, self.begun = chat, prompt_tokens, False
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": name_of(version),
        }

    def whole(self, text: str, end: str, tokens: int) -> dict[str, Any]:
        """An answer in one piece, of so many tokens."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self.head | {"choices": [self._choice(said, end)], "usage": self._usage(tokens)}

    def piece(self, text: str, end: str | None) -> dict[str, Any]:
        """The next piece of a stream; `end` is why it is the last one."""
        said: dict[str, Any] = {"content": text}
        if not self.begun:
            said, self.begun = {"role": "assistant", **said}, True
        return self._streamed() | {"choices": [self._choice({"delta": said} if self.chat else {"text": text}, end)]}

    def last(self, tokens: int) -> dict[str, Any]:
        """The end of a stream that says how many tokens there were."""
        return self._streamed() | {"choices": [], "usage": self._usage(tokens)}

    def _usage(self, tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}

    def _streamed(self) -> dict[str, Any]:
        return self.head | ({"object": "chat.completion.chunk"} if self.chat else {})

    def _choice(self, said: dict[str, Any], end: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": end}


def name_of(version: int) -> str:
    """What clients call a version."""
    return f"golden@{version}"

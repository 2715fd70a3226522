"""Servers of others, spoken to over HTTP: a kind of server is a class here and an entry in ENGINES."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from pipeline.errors import UserError, one_line

API_KEY = "GOLDEN_LAYERS_API_KEY"  # in the environment: what servers ask of those who use them
PATIENCE = 600  # seconds that a server may take over one call
LONGEST = 300  # characters of a server's own words that are shown


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    """POST a body as JSON, or GET where there is none, and give what the server says, read where that is JSON.

    UserError when it cannot be reached, or refuses.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(API_KEY):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, headers), timeout=PATIENCE) as answer:
            text = answer.read().decode(errors="replace")
    except HTTPError as error:
        said = one_line(error.read().decode(errors="replace"))[:LONGEST]
        raise UserError(f"publish: {url}: the server refuses ({error.code}): {said}") from None
    except (OSError, URLError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"publish: {url}: cannot be reached ({getattr(error, 'reason', error)})") from None
    try:
        return json.loads(text)
    except ValueError:
        return text


class Server:
    """A running vLLM that loads adapters under names of their own, and lets them go, while it serves.

    It is started with `--enable-lora --max-lora-rank N` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`.

    Attributes:
        url: where it is, such as http://localhost:8000.
        base: the name under which it serves the base model.
    """

    LOADING: ClassVar = "v1/load_lora_adapter"
    UNLOADING: ClassVar = "v1/unload_lora_adapter"

    def __init__(self, url: str) -> None:
        """UserError when there is no such server, or it serves no base model."""
        self.url = url.rstrip("/")
        bases = [card["id"] for card in self._cards() if not card.get("parent")]
        if not bases:
            raise UserError(f"publish: {self.url}: serves no base model")
        self.base = bases[0]

    def _cards(self) -> Iterator[dict[str, Any]]:
        found = call(f"{self.url}/v1/models")
        if not isinstance(found, dict) or not isinstance(found.get("data"), list):
            raise UserError(f"publish: {self.url}: is no server of OpenAI's kind: /v1/models lists no models")
        yield from found["data"]

    def adapters(self) -> dict[str, str]:
        """What is loaded beside the base model: the folder of each, by the name that clients call."""
        return {card["id"]: str(card.get("root")) for card in self._cards() if card.get("parent")}

    def load(self, name: str, folder: str) -> None:
        """Load an adapter, from a folder as the server sees it; UserError when it cannot."""
        call(f"{self.url}/{self.LOADING}", {"lora_name": name, "lora_path": folder})

    def unload(self, name: str) -> None:
        """Let an adapter go: the answers that it is at work on are finished, new ones are refused."""
        call(f"{self.url}/{self.UNLOADING}", {"lora_name": name})

    def ask(self, model: str, prompts: Sequence[str], most: int) -> list[str]:
        """Greedy continuations of prompts, of at most so many tokens each; UserError when the server gives none."""
        body = {"prompt": [*prompts], "max_tokens": most, "temperature": 0} | self._named(model)
        answer = call(f"{self.url}/v1/completions", body)
        choices = sorted(answer["choices"], key=lambda one: one["index"])
        if len(choices) != len(prompts):
            raise UserError(f"publish: {self.url}: gives {len(choices)} answers to {len(prompts)} prompts")
        return [one["text"] for one in choices]

    def _named(self, model: str) -> dict[str, str]:
        return {"model": model}


class SGLang(Server):
    """A running SGLang, by its documents: started with `--enable-lora --max-lora-rank N`. Not tried."""

    LOADING = "load_lora_adapter"
    UNLOADING = "unload_lora_adapter"

    def _named(self, model: str) -> dict[str, str]:
        return {"model": self.base} | ({"lora_path": model} if model != self.base else {})


ENGINES: dict[str, type[Server]] = {"vllm": Server, "sglang": SGLang}

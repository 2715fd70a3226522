"""A running vLLM, spoken to over HTTP."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pipeline.errors import UserError, one_line

API_KEY = "GOLDEN_LAYERS_API_KEY"  # in the environment: what servers ask of those who use them
PATIENCE = 600  # seconds that a server may take over one call
LONGEST = 300  # characters of a server's own words that are shown


class Straight(HTTPRedirectHandler):
    """No redirect is followed: a POST would become a GET, and a key would go elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        """None, so that a redirect is an error."""


def call(url: str, body: dict[str, Any] | None = None, key: str = "") -> Any:
    """POST JSON, or GET without a body; the answer, read where it is JSON. UserError for a refusal, or none."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with build_opener(Straight).open(Request(url, data, headers), timeout=PATIENCE) as answer:
            text = answer.read().decode(errors="replace")
    except HTTPError as error:
        with suppress(OSError, http.client.HTTPException):  # it may break off
            said = one_line(error.read().decode(errors="replace"))[:LONGEST]
            raise UserError(f"publish: {url}: the server refuses ({error.code}): {said}") from None
        raise UserError(f"publish: {url}: the server refuses ({error.code})") from None
    except (OSError, URLError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"publish: {url}: cannot be reached ({getattr(error, 'reason', error)})") from None
    try:
        return json.loads(text)
    except ValueError:
        return text


class Server:
    """A running vLLM that loads adapters under names of their own, and lets them go, while it serves.

    It is started with `--enable-lora --max-lora-rank N` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`. `base` is the
    name under which it serves the base model.
    """

    def __init__(self, url: str) -> None:
        """UserError when there is no such server, or it serves no base model."""
        self.url, self.key = url.rstrip("/"), os.environ.get(API_KEY, "")
        bases = [card["id"] for card in self._cards() if not card.get("parent")]
        if not bases:
            raise UserError(f"publish: {self.url}: serves no base model")
        self.base = bases[0]

    def _cards(self) -> list[dict[str, Any]]:
        try:
            return [card | {"id": str(card["id"])} for card in self._call("v1/models")["data"]]
        except (TypeError, LookupError):
            line = "is no server of OpenAI's kind: /v1/models lists no models"
            raise UserError(f"publish: {self.url}: {line}") from None

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return call(f"{self.url}/{path}", body, self.key)

    def adapters(self) -> dict[str, str]:
        """What is loaded beside the base model: the folder of each, by the name that clients call."""
        return {card["id"]: str(card.get("root")) for card in self._cards() if card.get("parent")}

    def load(self, name: str, folder: str) -> None:
        """Load an adapter, from a folder as the server sees it; UserError when it cannot."""
        self._call("v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def unload(self, name: str) -> None:
        """Let an adapter go: the answers that it is at work on are finished, new ones are refused."""
        self._call("v1/unload_lora_adapter", {"lora_name": name})

    def ask(self, model: str, prompts: Sequence[str], most: int) -> list[str]:
        """Greedy continuations of prompts, of at most so many tokens each; UserError when the server gives none."""
        body = {"model": model, "prompt": [*prompts], "max_tokens": most, "temperature": 0}
        answer = self._call("v1/completions", body)
        try:
            said = {one["index"]: str(one["text"] or "") for one in answer["choices"]}
            return [said[number] for number in range(len(prompts))]
        except (TypeError, LookupError):
            raise UserError(f"publish: {self.url}: gives no answer to each of {len(prompts)} prompts") from None

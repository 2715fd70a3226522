"""A stand-in for a server of others: it keeps adapters by name as vLLM does, and says what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BASE = "base"


class StandIn:
    """What it has loaded, what it was asked to do, and what it refuses.

    Attributes:
        says: a model's name and a prompt, and what it says.
        refuses: gives, for a path and a body, the reason to refuse it, or None.
        moved: where it sends everybody, if anywhere.
        keys: what it was shown.
    """

    def __init__(self, says: Callable[[str, str], str]) -> None:
        self.adapters: dict[str, str] = {}
        self.calls: list[tuple[str, str]] = []  # the last part of the path, and the name it was about
        self.says = says
        self.refuses: Callable[[str, dict[str, Any]], str | None] = lambda *_: None
        self.url = self.moved = ""
        self.keys: set[str | None] = set()

    def get(self) -> dict[str, Any]:
        named = [{"id": name, "root": root, "parent": BASE} for name, root in self.adapters.items()]
        return {"data": [{"id": BASE, "root": "folder", "parent": None}, *named]}

    def post(self, path: str, body: dict[str, Any]) -> Any:
        name = body.get("lora_name") or body.get("model") or ""
        if not self.calls or self.calls[-1] != (path, name):
            self.calls.append((path, name))
        if reason := self.refuses(path, body):
            raise ValueError(reason)
        if path == "load_lora_adapter":
            if name in self.adapters:
                raise ValueError(f"{name} has already been loaded")
            if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
                raise ValueError(f"no adapter in {body['lora_path']}")
            self.adapters[name] = body["lora_path"]
        elif path == "unload_lora_adapter":
            if self.adapters.pop(name, None) is None:
                raise ValueError(f"{name} cannot be found")
        elif path == "completions":
            if name not in (BASE, *self.adapters):
                raise ValueError(f"the model {name} does not exist")
            texts = enumerate(self.says(name, prompt) for prompt in body["prompt"])
            return {"model": name, "choices": [{"index": number, "text": text} for number, text in texts]}
        return "ok"


@contextmanager
def standing_in(says: Callable[[str, str], str]) -> Iterator[StandIn]:
    """A stand-in that is reached at its `url`, inside the `with`."""
    one = StandIn(says)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            one.keys.add(self.headers["Authorization"])
            self.answer(302 if one.moved else 200, one.get())

        def do_POST(self) -> None:
            one.keys.add(self.headers["Authorization"])
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self.answer(200, one.post(self.path.rpartition("/")[2], body))
            except ValueError as error:
                self.answer(400, {"error": {"message": str(error)}})

        def answer(self, code: int, body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Location", one.moved)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    one.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield one
    finally:
        server.shutdown()
        server.server_close()

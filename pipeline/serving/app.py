"""The server: the OpenAI API, metrics and a page over HTTP, for a store's versions in one live model.

GET /v1/models   POST /v1/completions   POST /v1/chat/completions   GET /facts   GET /metrics   GET /health   GET /
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import socket
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, one_line
from pipeline.serving.asked import Asked
from pipeline.serving.live import LiveModel, Version
from pipeline.serving.openai import Chat, Completion, RefusedError, Reply, name_of, read
from pipeline.serving.turns import Turns
from pipeline.updates.disk import BASE, VERSIONS
from pipeline.updates.history import request_row
from pipeline.updates.lineage import in_force
from pipeline.updates.store import Store

try:
    import uvicorn
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise UserError(f"serve: {error.name} is missing; install the extra: pip install -e '.[serve]'") from None

NAME = re.compile(r"golden(?:@(\d{1,9}))?")
FOLLOWING = 0.5  # seconds between looks at the store's current version, and at whether whoever asked is there
ENDING = 120  # seconds for what was asked to be answered before the end
LARGEST = 1 << 20  # bytes of a request
FACTS = 200  # that are listed
HERE = ["localhost", "127.0.0.1", "::1", "[::1]"]
PAGE = Path(__file__).with_name("page.html")
LEFT = 499  # the status that is counted where whoever asked has left

Answer = Callable[[Request], Awaitable[Response]]
Told = asyncio.Queue[tuple[str, str | None]]


class Figures:
    """What `/metrics` tells."""

    def __init__(self, live: LiveModel, turns: Turns, force: InForce) -> None:
        self.registry = to = CollectorRegistry()
        self.requests = Counter("golden_requests", "Requests for answers", registry=to)
        self.failures = Counter("golden_failures", "Those that failed", ["status"], registry=to)
        self.tokens = Counter("golden_tokens", "Tokens read and said", ["kind"], registry=to)
        self.seconds = Histogram("golden_seconds", "Seconds until all was said", registry=to)
        for name, what, value in (
            ("version", "The version in force", lambda: force.version.number),
            ("waiting", "Requests that wait for a turn", lambda: turns.waiting),
            ("swaps", "Swaps of the weights since the start", lambda: live.swaps),
            ("swap_seconds", "Seconds that they took in all", lambda: live.swap_seconds),
        ):
            Gauge(f"golden_{name}", what, registry=to).set_function(value)


class InForce:
    """The version that answers for `golden`: the store's current one, or the last that could be loaded."""

    def __init__(self, live: LiveModel, say: Callable[[str], Any]) -> None:
        self.live, self.say, self.problem = live, say, ""
        self.version = live.load(live.version)
        self.ended, self._looking = threading.Event(), threading.Lock()
        self._refused: int | None = None  # a version that could not be loaded

    def look(self, again: bool = False) -> Version:
        """The version in force now; one that was refused is tried `again` where that is asked for."""
        with self._looking:
            number, before, problem = self.version.number, self.problem, ""
            try:
                number = self.live.current()
                if number == self._refused and not again:
                    return self.version
                if number != self.version.number:
                    self.version = self.live.load(number)
                    self.say(f"version {number} is in force")
            except Exception as error:  # whatever it is, the version before still answers
                problem = one_line(error) or type(error).__name__
            self.problem, self._refused = problem, number if problem else None
            if problem not in ("", before):
                self.say(f"version {self.version.number} stays: {problem}")
            return self.version

    def follow(self) -> None:
        """Look again and again, so that a request finds the version in memory."""
        while not self.ended.wait(FOLLOWING):
            self.look(again=True)


class Service:
    """What the server answers, by address."""

    def __init__(self, live: LiveModel, turns: Turns, say: Callable[[str], Any], key: str = "") -> None:
        self.live, self.turns, self.say, self.key = live, turns, say, key
        self.force = InForce(live, say)
        self.figures = Figures(live, turns, self.force)
        self.page, self.policy = _page()

    def app(self, here_alone: bool) -> Starlette:
        """The ASGI application; `here_alone`, no other site's page leads to it under a name of its own."""
        gets = {"/v1/models": self.models, "/facts": self.facts, "/metrics": self.metrics}
        posts = {"/v1/completions": self.completions, "/v1/chat/completions": self.chat}
        guarded = [
            Route(path, self._guarded(answer), methods=[method])
            for method, answers in (("GET", gets), ("POST", posts))
            for path, answer in answers.items()
        ]
        trusted = Middleware(TrustedHostMiddleware, allowed_hosts=HERE if here_alone else ["*"])
        return Starlette(
            routes=[*guarded, Route("/health", self.health), Route("/", self.home)], middleware=[trusted]
        )

    def _guarded(self, answer: Answer) -> Answer:
        """An answer for whoever has the key, where there is one; what is refused is told as the API has it."""

        async def guarded(request: Request) -> Response:
            try:
                given = request.headers.get("authorization", "").encode("latin-1")
                if self.key and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                    raise RefusedError(401, "the API key is missing or wrong", code="invalid_api_key")
                return await answer(request)
            except RefusedError as error:
                refused = error
            except Exception:  # a fault of ours is told in the same shape, and is not hidden
                traceback.print_exc()
                refused = RefusedError(500, "a fault of the server; its log says more")
            if request.method == "POST":
                self.figures.failures.labels(refused.status).inc()
            return JSONResponse(refused.body, refused.status)

        return guarded

    async def completions(self, request: Request) -> Response:
        """A text that goes on from another."""
        wish = read(Completion, await _body(request))
        return await self._answer(request, wish, lambda: self.live.llm.tokens.texts([wish.text])[0])

    async def chat(self, request: Request) -> Response:
        """The answer to a conversation."""
        wish = read(Chat, await _body(request))
        turns = [message.spoken for message in wish.messages]
        return await self._answer(request, wish, lambda: self.live.llm.tokens.conversation(turns))

    async def _answer(self, request: Request, wish: Completion | Chat, tokens: Callable[[], list[int]]) -> Response:
        loop, told, started = asyncio.get_running_loop(), Told(), time.perf_counter()

        def tell(text: str, end: str | None) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(told.put_nowait, (text, end))

        asked = await run_in_threadpool(self._asked, wish, tokens, tell)
        reply = Reply(isinstance(wish, Chat), asked.version.number, len(asked.token_ids))
        self.figures.requests.inc()
        if wish.stream:
            pieces = self._stream(asked, told, reply, wish.stream_options.include_usage, started)
            return StreamingResponse(pieces, media_type="text/event-stream")
        try:
            text, end = await _told(request, told)
        finally:
            self._count(asked, started)
        if end == "error":
            raise RefusedError(500, text)
        return JSONResponse(reply.whole(text, str(end), len(asked.said)))

    def _asked(
        self, wish: Completion | Chat, tokens: Callable[[], list[int]], tell: Callable[[str, str | None], None]
    ) -> Asked:
        """The request, waiting for its turn; RefusedError for no such version, a text too long or none, a crowd."""
        version, llm = self.named(wish.model), self.live.llm
        try:
            ids = tokens()
            if not ids:
                raise UserError("becomes no token")
            limit = wish.limit or max(1, min(wish.usual, (llm.context_length or 1 << 30) - len(ids)))
            llm.tokens.check_length(len(ids) + limit, "with the answer")
        except UserError as error:
            raise RefusedError(400, f"{wish.asks}: {error}", wish.asks) from None
        asked = Asked(version, ids, limit, tell, wish.temperature, wish.top_p, wish.seed, wish.stops, wish.stream)
        try:
            self.turns.add(asked)
        except UserError as error:
            raise RefusedError(503, str(error)) from None
        return asked

    async def _stream(
        self, asked: Asked, told: Told, reply: Reply, usage: bool, started: float
    ) -> AsyncIterator[str]:
        """An answer's pieces as server-sent events."""
        end: str | None = None
        try:
            while end is None:
                text, end = await told.get()
                yield _event(RefusedError(500, text).body if end == "error" else reply.piece(text, end))
            if usage:
                yield _event(reply.last(len(asked.said)))
            yield "data: [DONE]\n\n"
        finally:
            self._count(asked, started)
            if end in (None, "error"):
                self.figures.failures.labels(500 if end else LEFT).inc()

    def _count(self, asked: Asked, started: float) -> None:
        """Count a request that is over; one that nobody waits for any more ends."""
        asked.gone = asked.end is None
        self.figures.tokens.labels("prompt").inc(len(asked.token_ids))
        self.figures.tokens.labels("completion").inc(len(asked.said))
        self.figures.seconds.observe(time.perf_counter() - started)

    def named(self, name: str) -> Version:
        """The version that a client means; RefusedError when there is none."""
        found = NAME.fullmatch(name)
        why = "expected golden (the version in force), golden@0 (the base) or golden@N"
        if found:
            try:
                return self.live.load(int(found[1])) if found[1] else self.force.look()
            except (UserError, OSError) as error:
                there = int(found[1]) in self._there()
                why = "its files are damaged" if there else "there is none, or it was pruned"
                if there:
                    self.say(f"{name}: {one_line(error)}")
        raise RefusedError(404, f"the model {name!r} does not exist: {why}", "model", "model_not_found")

    def _there(self) -> list[int]:
        """The numbers of the versions that there are."""
        names = (path.name for path in (self.live.store / VERSIONS).iterdir())
        return sorted({BASE, *(int(name) for name in names if re.fullmatch(r"\d{4,9}", name))})

    async def models(self, request: Request) -> Response:
        """The names of all versions that there are."""
        names = ["golden", *map(name_of, await run_in_threadpool(self._there))]
        each = {"object": "model", "created": 0, "owned_by": "golden-layers"}
        return JSONResponse({"object": "list", "data": [{"id": name, **each} for name in names]})

    async def facts(self, request: Request) -> Response:
        """The facts that a version holds, the latest first."""
        return JSONResponse(await run_in_threadpool(self._facts, request.query_params.get("version")))

    def _facts(self, number: str | None) -> dict[str, Any]:
        version = self.named("golden" if number is None else f"golden@{number}")
        try:
            with Store(self.live.store, reading=True) as store:
                held = sorted(in_force(store, version.number), reverse=True)
                rows = [request_row(store, one) for one in held[:FACTS]]
        except UserError as error:
            self.say(f"facts: {one_line(error)}")
            raise RefusedError(404, "the store does not tell which facts these are", "version") from None
        facts = [{name: row.get(name) for name in ("prompt", "new_answer", "old_answer")} for row in rows]
        return {"version": version.number, "chat": version.chat, "count": len(held), "facts": facts}

    async def metrics(self, request: Request) -> Response:
        """Prometheus' figures."""
        return Response(generate_latest(self.figures.registry), media_type=CONTENT_TYPE_LATEST)

    async def health(self, request: Request) -> Response:
        """Which version answers, and whether that is the store's current one."""
        state: dict[str, Any] = {"version": (await run_in_threadpool(self.force.look)).number}
        if self.force.problem:
            state["problem"] = "the store's current version cannot be served; the server's log says why"
        return JSONResponse({"status": "degraded" if self.force.problem else "ok", **state})

    async def home(self, request: Request) -> Response:
        """The page."""
        return HTMLResponse(self.page, headers=self.policy)


def _page() -> tuple[str, dict[str, str]]:
    """The page, and what a browser is to let it do: run its own script and style, and talk to this server."""
    text = PAGE.read_text(encoding="utf-8")
    policy = "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    for kind in ("script", "style"):
        (own,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        policy += f"; {kind}-src 'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'"
    return text, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _body(request: Request) -> bytes:
    """A request's body; RefusedError when it is too large, before all of it is read."""
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > LARGEST:
                raise RefusedError(413, f"the body is larger than {LARGEST} bytes")
    except ClientDisconnect:
        raise RefusedError(LEFT, "whoever asked has left") from None
    return body


async def _told(request: Request, told: Told) -> tuple[str, str | None]:
    """A whole answer; RefusedError when whoever asked has left before."""
    while True:
        try:
            return await asyncio.wait_for(told.get(), FOLLOWING)
        except TimeoutError:
            if await request.is_disconnected():
                raise RefusedError(LEFT, "whoever asked has left") from None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; UserError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        why = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise UserError(f"serve: cannot listen at {host}, port {port}: {why}") from None


@contextmanager
def serving(
    live: LiveModel, say: Callable[[str], Any], host: str = "127.0.0.1", port: int = 0, key: str = ""
) -> Iterator[str]:
    """Inside the `with` a server answers at the address given; at its end what was asked is answered first.

    `say` takes a line about what happens; port 0 is any that is free; `key` is what clients must show, if any.
    UserError when the port is in use, or the address not one of this machine.
    """
    listening, turns = listen(host, port), Turns(live)
    service = Service(live, turns, say, key)
    app = service.app(here_alone=host in HERE and not key)
    how: Any = {"log_level": "warning", "access_log": False, "lifespan": "off", "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=ENDING, **how))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server")
    thread.start()
    threading.Thread(target=service.force.follow, name="follower", daemon=True).start()
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        service.force.ended.set()
        thread.join()
        turns.close()

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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, one_line
from pipeline.serving.asked import Asked
from pipeline.serving.live import LiveModel, Version
from pipeline.serving.openai import (
    CHAT_TOKENS,
    COMPLETION_TOKENS,
    Chat,
    Completion,
    RefusedError,
    Reply,
    name_of,
    read,
)
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
FOLLOWING = 0.5  # seconds between looks at the store's current version
LARGEST = 1 << 20  # bytes of a request
FACTS = 200  # that are listed
HERE = ("localhost", "127.0.0.1", "::1", "[::1]")
PAGE = Path(__file__).with_name("page.html")
CLOSED = 499  # the status that is counted where whoever asked has left

Answer = Callable[[Request], Awaitable[Response]]


class Figures:
    """What `/metrics` tells."""

    def __init__(self, live: LiveModel, turns: Turns) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("golden_requests", "Requests for answers", registry=self.registry)
        self.failures = Counter("golden_failures", "Those that failed", ["status"], registry=self.registry)
        self.tokens = Counter("golden_tokens", "Tokens read and said", ["kind"], registry=self.registry)
        self.seconds = Histogram("golden_seconds", "Seconds until all was said", registry=self.registry)
        self.version = self._gauge("golden_version", "The version in force", lambda: 0)
        self._gauge("golden_waiting", "Requests that wait for a turn", lambda: turns.waiting)
        self._gauge("golden_swaps", "Swaps of the weights since the start", lambda: live.swaps)
        self._gauge("golden_swap_seconds", "Seconds that they took in all", lambda: live.swap_seconds)

    def _gauge(self, name: str, what: str, value: Callable[[], float]) -> Gauge:
        gauge = Gauge(name, what, registry=self.registry)
        gauge.set_function(value)
        return gauge


class InForce:
    """The version that answers for `golden`: the store's current one, or the last that could be loaded."""

    def __init__(self, live: LiveModel, say: Callable[[str], Any]) -> None:
        self.live, self.say, self.problem = live, say, ""
        self.version = live.load(live.version)
        self._refused: int | None = None  # a version that could not be loaded
        self._looking, self._ended = threading.Lock(), threading.Event()

    def look(self, again: bool = False) -> Version:
        """The version in force now; one that was refused is tried again where that is asked for."""
        with self._looking:
            number, problem = self.version.number, self.problem
            try:
                number = self.live.current()
                if number != self.version.number and (again or number != self._refused):
                    self.version = self.live.load(number)
                    self.say(f"version {number} is in force")
                if number == self.version.number:
                    self._refused, self.problem = None, ""
            except (UserError, OSError) as error:
                self._refused, self.problem = number, one_line(error)
            if self.problem and self.problem != problem:
                self.say(f"version {self.version.number} stays: {self.problem}")
            return self.version

    def follow(self) -> None:
        """Look again and again, until `end`, so that a request finds what it asks for in memory."""
        while not self._ended.wait(FOLLOWING):
            self.look(again=True)

    def end(self) -> None:
        """Look no more."""
        self._ended.set()


class Service:
    """What the server answers, by address."""

    def __init__(self, live: LiveModel, turns: Turns, say: Callable[[str], Any], key: str = "") -> None:
        self.live, self.turns, self.key = live, turns, key
        self.figures, self.force = Figures(live, turns), InForce(live, say)
        self.figures.version.set_function(lambda: self.force.version.number)
        self.page, self.policy = _page()

    def app(self, hosts: tuple[str, ...] = ()) -> Starlette:
        """The ASGI application; with `hosts`, it answers to these names alone."""
        routes = {
            "/v1/models": (self.models, "GET"),
            "/v1/models/{name}": (self.model, "GET"),
            "/v1/completions": (self.completions, "POST"),
            "/v1/chat/completions": (self.chat, "POST"),
            "/facts": (self.facts, "GET"),
            "/metrics": (self.metrics, "GET"),
        }
        guarded = [Route(path, self._guarded(answer), methods=[way]) for path, (answer, way) in routes.items()]
        open_ = [Route("/health", self.health), Route("/", self.home)]
        trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
        return Starlette(routes=[*guarded, *open_], middleware=[trusted] if hosts else [])

    def _guarded(self, answer: Answer) -> Answer:
        """An answer for whoever has the key, where there is one; what is refused is told as the API has it."""

        async def guarded(request: Request) -> Response:
            try:
                given = request.headers.get("authorization", "").encode("latin-1")
                if self.key and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                    raise RefusedError(401, "the API key is missing or wrong", code="invalid_api_key")
                return await answer(request)
            except RefusedError as refused:
                if request.method == "POST":
                    self.figures.failures.labels(refused.status).inc()
                return JSONResponse(refused.body, refused.status)

        return guarded

    async def completions(self, request: Request) -> Response:
        """A text that goes on from another."""
        wish = read(Completion, await _body(request))
        return await self._answer(request, wish, "prompt", lambda: self.live.llm.tokens.texts([wish.text])[0])

    async def chat(self, request: Request) -> Response:
        """The answer to a conversation."""
        wish = read(Chat, await _body(request))
        turns = [message.turn for message in wish.messages]
        return await self._answer(request, wish, "messages", lambda: self.live.llm.tokens.conversation(turns))

    async def _answer(
        self, request: Request, wish: Completion | Chat, field: str, tokens: Callable[[], list[int]]
    ) -> Response:
        told: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(text: str, end: str | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(told.put_nowait, (text, end))

        started = time.perf_counter()
        asked = await run_in_threadpool(self._asked, wish, field, tokens, tell)
        reply = Reply(field == "messages", asked.version.number, len(asked.token_ids))
        try:
            self.turns.add(asked)
        except UserError as error:
            raise RefusedError(503, str(error)) from None
        self.figures.requests.inc()
        if wish.stream:
            pieces = self._stream(asked, told, reply, wish.stream_options.include_usage, started)
            return StreamingResponse(pieces, media_type="text/event-stream")
        try:
            text, end = await _told_or_gone(request, told)
        finally:
            self._count(asked, started)
        if end == "error":
            raise RefusedError(500, text)
        return JSONResponse(reply.whole(text, str(end), len(asked.said)))

    def _asked(
        self,
        wish: Completion | Chat,
        field: str,
        tokens: Callable[[], list[int]],
        tell: Callable[[str, str | None], None],
    ) -> Asked:
        """The request for the model; RefusedError for no such version, or a text too long, or none."""
        version = self.named(wish.model)
        given = wish.max_tokens or (wish.max_completion_tokens if isinstance(wish, Chat) else None)
        try:
            ids, room = tokens(), self.live.llm.context_length
            if not ids:
                raise UserError("it becomes no token")
            default = COMPLETION_TOKENS if isinstance(wish, Completion) else CHAT_TOKENS
            limit = given or max(1, min(default, (room or len(ids) + default) - len(ids)))
            self.live.llm.tokens.check_length(len(ids) + limit, "with the answer")
        except UserError as error:
            raise RefusedError(400, f"{field}: {error}", field) from None
        how: dict[str, Any] = {"temperature": wish.temperature, "top_p": wish.top_p, "seed": wish.seed}
        return Asked(version, ids, limit, tell, stops=wish.stops, streamed=wish.stream, **how)

    async def _stream(
        self, asked: Asked, told: asyncio.Queue[Any], reply: Reply, usage: bool, started: float
    ) -> AsyncIterator[str]:
        """An answer's pieces as server-sent events."""
        first, end = True, None
        try:
            while end is None:
                text, end = await told.get()
                if end == "error":
                    yield _event(RefusedError(500, text).body)
                    return
                yield _event(reply.piece(text, end, first))
                first = False
            if usage:
                yield _event(reply.last(len(asked.said)))
            yield "data: [DONE]\n\n"
        finally:
            self._count(asked, started)
            if asked.end in (None, "error"):
                self.figures.failures.labels(500 if asked.end else CLOSED).inc()

    def _count(self, asked: Asked, started: float) -> None:
        """Count a request that is over; one that nobody waits for any more ends."""
        asked.gone = asked.end is None
        self.figures.tokens.labels("prompt").inc(len(asked.token_ids))
        self.figures.tokens.labels("completion").inc(len(asked.said))
        self.figures.seconds.observe(time.perf_counter() - started)

    def named(self, name: str) -> Version:
        """The version that a client means; RefusedError when there is none."""
        found = NAME.fullmatch(name)
        if found and found[1] is None:
            return self.force.look()
        what = "expected golden (the version in force), golden@0 (the base) or golden@N"
        if found:
            there = int(found[1]) in self._there()
            try:
                return self.live.load(int(found[1]))
            except (UserError, OSError) as error:
                what = "its files are damaged" if there else "there is none, or it was pruned"
                self.force.say(f"{name}: {one_line(error)}") if there else None
        raise RefusedError(404, f"the model {name!r} does not exist: {what}", "model", "model_not_found")

    def _there(self) -> list[int]:
        """The numbers of the versions that there are."""
        names = (path.name for path in (self.live.store / VERSIONS).iterdir())
        return sorted({BASE, *(int(name) for name in names if re.fullmatch(r"\d{4,9}", name))})

    async def models(self, request: Request) -> Response:
        """The names of all versions that there are."""
        names = ["golden", *map(name_of, await run_in_threadpool(self._there))]
        return JSONResponse({"object": "list", "data": [_model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        version = await run_in_threadpool(self.named, name)
        return JSONResponse(_model(name) | {"version": version.number})

    async def facts(self, request: Request) -> Response:
        """The facts that a version holds, the latest first."""
        return JSONResponse(await run_in_threadpool(self._facts, request.query_params.get("version", "")))

    def _facts(self, number: str) -> dict[str, Any]:
        version = self.named(f"golden@{number}" if number else "golden")
        try:
            with Store(self.live.store, reading=True) as store:
                held = sorted(in_force(store, version.number), reverse=True)
                rows = [request_row(store, one) for one in held[:FACTS]]
        except UserError as error:
            raise RefusedError(404, one_line(error), "version") from None
        fields = ("id", "prompt", "subject", "new_answer", "old_answer")
        facts = [{name: row.get(name) for name in fields} for row in rows]
        return {"version": version.number, "chat": version.chat, "count": len(held), "facts": facts}

    async def metrics(self, request: Request) -> Response:
        """Prometheus' figures."""
        return Response(generate_latest(self.figures.registry), media_type=CONTENT_TYPE_LATEST)

    async def health(self, request: Request) -> Response:
        """Which version answers, and why it is not the current one, if so."""
        version = await run_in_threadpool(self.force.look)
        problem = "the store's current version cannot be served; the server's log says why"
        state = {"status": "degraded", "problem": problem} if self.force.problem else {"status": "ok"}
        return JSONResponse(state | {"version": version.number, "waiting": self.turns.waiting})

    async def home(self, request: Request) -> Response:
        """The page."""
        return HTMLResponse(self.page, headers=self.policy)


def _page() -> tuple[str, dict[str, str]]:
    """The page, and what a browser is to let it do: run its own script and style, and talk to this server."""
    text = PAGE.read_text(encoding="utf-8")
    own = {}
    for kind in ("script", "style"):
        (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        own[kind] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = "; ".join(
        [
            "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            *(f"{kind}-src 'sha256-{digest}'" for kind, digest in own.items()),
        ]
    )
    return text, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "golden-layers"}


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
        raise RefusedError(CLOSED, "whoever asked has left") from None
    return body


async def _told_or_gone(request: Request, told: asyncio.Queue[Any]) -> tuple[str, str | None]:
    """What is told; RefusedError when whoever asked has left before."""
    waiting = [asyncio.ensure_future(told.get()), asyncio.ensure_future(request.receive())]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not waiting[0].done():
            raise RefusedError(CLOSED, "whoever asked has left")
        return waiting[0].result()
    finally:
        for one in waiting:
            one.cancel()


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens; UserError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"serve: cannot listen at {host}, port {port}: {why}") from None


@contextmanager
def serving(
    live: LiveModel, say: Callable[[str], Any], host: str = "127.0.0.1", port: int = 0, key: str = ""
) -> Iterator[str]:
    """Inside the `with` a server answers at the address given; at its end what was asked is answered first.

    Args:
        say: takes a line about what happens.
        port: 0 for any that is free.
        key: what clients must show; none is asked for where it is empty.

    Raises:
        UserError: when the port is in use, or the address not one of this machine.
    """
    listening, turns = _listening(host, port), Turns(live)
    service = Service(live, turns, say, key)
    app = service.app() if key or host not in HERE else service.app(HERE)  # no other site's page leads here
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", ws="none"))
    threads = [
        threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server"),
        threading.Thread(target=service.force.follow, name="follower", daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        service.force.end()
        threads[0].join()
        turns.close()

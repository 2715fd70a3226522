"""The server answers as the OpenAI API does, each answer by the version that it names, whatever clients do."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import make_tiny, refusal
from teams import Team
from transformers import PreTrainedTokenizerFast

from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.serving import LiveModel, app, turns
from pipeline.serving.app import serving
from pipeline.serving.asked import Asked
from pipeline.serving.live import Version
from pipeline.updates import rollback, version_folder

PROMPT = "The capital of Spain is"
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"


class Client:
    """Talks to a server, and keeps the lines that it said."""

    def __init__(self, address: str, said: list[str], team: Team) -> None:
        self.address, self.said, self.team = address, said, team
        self.http = httpx.Client(base_url=address, timeout=30)

    def post(self, body: Any, path: str = "completions") -> Any:
        return self.http.post(f"/v1/{path}", json=body)

    def ask(self, prompt: str = PROMPT, model: str = "golden", tokens: int = 8, **more: Any) -> dict[str, Any]:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}
        answer = self.post(body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def stream(self, body: dict[str, Any], path: str = "completions") -> list[dict[str, Any]]:
        """The chunks of a stream, whose end it sees."""
        with self.http.stream("POST", f"/v1/{path}", json=body | {"stream": True}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in answer.iter_lines() if line]
        assert lines.pop() == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@contextmanager
def served(team: Team, tokenizer: PreTrainedTokenizerFast, **how: Any) -> Iterator[Client]:
    said: list[str] = []
    live = LiveModel(team.store.folder, make_tiny("llama", tokenizer))
    with serving(live, said.append, **how) as address:
        client = Client(address, said, team)
        try:
            yield client
        finally:
            client.http.close()


@pytest.fixture
def team(two_versions: Team) -> Iterator[Team]:
    yield two_versions
    rollback(two_versions.store, 2)


@pytest.fixture
def client(team: Team, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    with served(team, tokenizer) as client:
        yield client


def alone(
    team: Team, tokenizer: PreTrainedTokenizerFast, version: int, prompts: list[str], tokens: int
) -> list[str]:
    """What a version says to prompts by itself."""
    llm = make_tiny("llama", tokenizer)
    with torch.no_grad():
        for name, tensor in (team.weights(version) if version else {}).items():
            llm.model.get_parameter(name).copy_(tensor)
    return generate(llm, prompts, tokens, trainer=team.options.trainer)


def same(one: str, two: str) -> bool:
    """Whether texts are equal but for a space at their start."""
    return one.strip() == two.strip()


def test_every_version_by_its_name(client: Client, tokenizer: PreTrainedTokenizerFast) -> None:
    names = [one["id"] for one in client.http.get("/v1/models").json()["data"]]
    assert names == ["golden", "golden@0", "golden@1", "golden@2"]
    for name, version in {"golden": 2, "golden@1": 1, "golden@0": 0, "golden@2": 2}.items():
        answer = client.ask(model=name)
        assert answer["model"] == f"golden@{version}" and answer["object"] == "text_completion"
        (choice,), (expected,) = answer["choices"], alone(client.team, tokenizer, version, [PROMPT], 8)
        assert same(choice["text"], expected) and choice["finish_reason"] == "length"
        prompt = len(tokenizer(PROMPT).input_ids)
        usage = {"prompt_tokens": prompt, "completion_tokens": 8, "total_tokens": prompt + 8}
        assert answer["usage"] == usage
    for name in ("golden@3", "golden@00000000001", "gpt-4", "golden@-1", ""):
        refused = client.post({"model": name, "prompt": PROMPT})
        assert refused.status_code == 404 and refused.json()["error"]["code"] == "model_not_found"


def test_golden_follows_the_store(client: Client) -> None:
    for version in (1, 0, 2):
        rollback(client.team.store, version)
        assert client.ask()["model"] == f"golden@{version}"
        assert client.http.get("/health").json() == {"status": "ok", "version": version}
        assert client.metric("golden_version") == version
    assert client.said[-3:] == [f"version {version} is in force" for version in (1, 0, 2)]
    assert client.metric("golden_swaps") >= 3


def test_a_stream_is_the_answer_in_pieces(client: Client) -> None:
    whole = client.ask(tokens=10)
    chunks = client.stream({"model": "golden", "prompt": PROMPT, "max_tokens": 10, "temperature": 0})
    assert "".join(one["choices"][0]["text"] for one in chunks) == whole["choices"][0]["text"]
    assert len(chunks) > 3 and {one["model"] for one in chunks} == {"golden@2"}
    assert [one["choices"][0]["finish_reason"] for one in chunks[-2:]] == [None, "length"]
    assert len({one["id"] for one in chunks}) == 1


def test_chat(client: Client) -> None:
    body = {
        "model": "golden@1", "temperature": 0, "max_completion_tokens": 6,
        "messages": [{"role": "user", "content": PROMPT}],
    }  # fmt: skip
    whole = client.post(body, "chat/completions").json()
    (choice,) = whole["choices"]
    assert choice["message"]["role"] == "assistant" and whole["object"] == "chat.completion"
    plain = client.ask(f"user : {PROMPT} assistant :", "golden@1", 6)
    assert choice["message"]["content"] == plain["choices"][0]["text"]
    parts = [{"type": "text", "text": PROMPT[:4]}, {"type": "text", "text": PROMPT[4:]}]
    in_parts = client.post(body | {"messages": [{"role": "user", "content": parts}]}, "chat/completions").json()
    assert in_parts["choices"] == whole["choices"]
    picture = client.http.post(
        "/v1/chat/completions",
        json=body | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    )
    assert picture.status_code == 400 and picture.json()["error"]["param"] == "messages"
    chunks = client.stream(body | {"stream_options": {"include_usage": True}}, "chat/completions")
    usage = chunks.pop()
    assert usage["usage"] == whole["usage"] and usage["choices"] == []
    deltas = [one["choices"][0]["delta"] for one in chunks]
    assert deltas[0]["role"] == "assistant" and "role" not in deltas[1]
    assert "".join(one.get("content", "") for one in deltas) == choice["message"]["content"]
    assert {one["object"] for one in chunks} == {"chat.completion.chunk"}


def test_sampling(client: Client) -> None:
    """A seed gives the same answer whatever else runs; without one, or at another temperature, it is another."""
    how = {"tokens": 12, "temperature": 1.5}
    alone = [client.ask(seed=seed, **how)["choices"][0]["text"] for seed in range(4)]
    assert len({*alone}) > 1
    with ThreadPoolExecutor(9) as pool:
        others = [pool.submit(client.ask, temperature=temperature) for temperature in (0, 0.3, 1, 2, 0)]
        again = [pool.submit(client.ask, seed=seed, **how) for seed in range(4)]
        assert [one.result()["choices"][0]["text"] for one in again] == alone
        assert others[0].result()["choices"] == others[-1].result()["choices"]
    greedy = client.ask(tokens=12)["choices"]
    assert client.ask(seed=1, tokens=12, temperature=1, top_p=1e-6)["choices"] == greedy
    assert client.ask(seed=1, tokens=12, temperature=1e-9)["choices"] == greedy
    assert len({client.ask(**how)["choices"][0]["text"] for _ in range(4)}) > 1


def test_draws_are_as_likely_as_their_tokens() -> None:
    asked = Asked(Version(0, {}), [1], 1, lambda *_: None, temperature=2.0, top_p=0.9, seed=0)
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    drawn = torch.bincount(torch.tensor([asked.draw(chances.log()) for _ in range(4000)]), minlength=4) / 4000
    assert torch.allclose(drawn, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.03)


def test_stops(client: Client) -> None:
    """The answer ends before them, also where one is cut over pieces; a stream never shows a part of one."""
    text = client.ask(tokens=12)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:4]
    for stops in (stop, [stop, "never said"]):
        answer = client.ask(tokens=12, stop=stops)
        expected = text[: text.index(stop)]
        assert answer["choices"][0] | {"text": expected, "finish_reason": "stop"} == answer["choices"][0]
        assert answer["usage"]["completion_tokens"] < 12
        body = {"model": "golden", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stop": stops}
        pieces = [one["choices"][0]["text"] for one in client.stream(body)]
        assert "".join(pieces) == expected


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": 0}, "logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"best_of": 2}, "best_of"),
    ({"whatever": 1}, "whatever"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": float("1e999")}, "temperature"),
    ({"top_p": float("nan")}, "top_p"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**9}, "prompt"),
    ({"max_tokens": True}, "max_tokens"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"seed": 2**70}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": [[1, 2]]}, "prompt"),
    ({"prompt": PROMPT * 500}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"model": None}, "model"),
]


def test_what_is_not_supported_is_refused(client: Client) -> None:
    for given, param in REFUSED:
        body = json.dumps({"model": "golden", "prompt": PROMPT} | given)
        refused = client.http.post("/v1/completions", content=body)
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert error["type"] == "invalid_request_error" and error["param"] == param
        assert "\n" not in error["message"] and param in error["message"]


def test_what_asks_for_nothing_is_no_reason_to_refuse(client: Client) -> None:
    more = {"n": 1, "logprobs": None, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "stop": None}
    assert client.ask(**more)["choices"] == client.ask()["choices"]


def test_rubbish(client: Client) -> None:
    for body in (b"", b"{", b"[]", b"nul", b"\xff\xfe", b'"x"', b"[" * 100_000, b'{"model": 1}'):
        for path in ("completions", "chat/completions"):
            refused = client.http.post(f"/v1/{path}", content=body)
            assert refused.status_code == 400 and "error" in refused.json()
    assert client.metric("golden_failures_total") == 16


def test_a_huge_body_is_refused_before_it_is_read(client: Client) -> None:
    assert client.http.post("/v1/completions", content=b" " * (2 << 20)).status_code == 413
    assert client.post({"model": "golden", "messages": []}, "chat/completions").status_code == 400


def test_clients_that_leave(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their answers end, and others get theirs."""
    slow(monkeypatch)
    body = json.dumps({"model": "golden", "prompt": PROMPT, "max_tokens": 100, "stream": True}).encode()
    for stream in (True, False):
        sent = body if stream else body.replace(b"true", b"false")
        with socket.create_connection(client.address.removeprefix("http://").split(":")) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n\r\n"
            raw.sendall(head.encode() + sent)
            if stream:
                assert b"data: " in raw.recv(4000) + raw.recv(4000)
            else:
                time.sleep(0.2)
        before = time.monotonic()
        client.ask(tokens=2)
        assert time.monotonic() - before < 2, "waited for what nobody reads"
    assert client.metric('golden_failures_total{status="499"}') == 2
    assert client.metric('golden_tokens_total{kind="completion"}') < 150


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.03) -> None:
    """Let every token take its time."""
    before = turns.Heard.__call__

    def call(*given: Any, **how: Any) -> Any:
        time.sleep(seconds)
        return before(*given, **how)

    monkeypatch.setattr(turns.Heard, "__call__", call)


def test_versions_take_turns(client: Client, tokenizer: PreTrainedTokenizerFast) -> None:
    """Long and short answers of three versions at once: each is that of its own, and none waits for all others."""
    prompts = [PROMPT, "Peru", "Oslo is", "The largest river of Japan is"]
    wanted = [(version, prompt, 40 if version else 4) for version in (2, 1, 0) for prompt in prompts]
    expected = {v: alone(client.team, tokenizer, v, prompts, 40 if v else 4) for v in (0, 1, 2)}
    order: list[int] = []

    def ask(one: tuple[int, str, int]) -> str:
        answer = client.ask(one[1], f"golden@{one[0]}", one[2])
        assert answer["model"] == f"golden@{one[0]}"
        order.append(one[0])
        return str(answer["choices"][0]["text"])

    with ThreadPoolExecutor(len(wanted)) as pool:
        texts = list(pool.map(ask, wanted))
    for (version, prompt, _), text in zip(wanted, texts, strict=True):
        assert same(text, expected[version][prompts.index(prompt)])
    assert order[-1] != 0, "short answers waited for all long ones"


def test_no_answer_is_torn_while_versions_change(client: Client, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [PROMPT, "Peru", "Oslo is"]
    expected = {v: alone(client.team, tokenizer, v, prompts, 20) for v in (0, 1, 2)}
    done, answers = threading.Event(), []

    def keep_asking(prompt: str) -> None:
        while not done.is_set():
            answers.append((prompt, client.ask(prompt, tokens=20)))

    with ThreadPoolExecutor(len(prompts)) as pool:
        asking = [pool.submit(keep_asking, prompt) for prompt in prompts]
        for turn in range(12):
            rollback(client.team.store, turn % 3)
            time.sleep(0.1)
        done.set()
        [one.result() for one in asking]
    assert len({answer["model"] for _, answer in answers}) == 3
    for prompt, answer in answers:
        version = int(answer["model"].removeprefix("golden@"))
        assert same(answer["choices"][0]["text"], expected[version][prompts.index(prompt)])


def test_a_burst(client: Client) -> None:
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda n: client.ask(model=f"golden@{n % 3}", tokens=2), range(300)))
    assert [one["model"] for one in answers] == [f"golden@{n % 3}" for n in range(300)]
    assert client.metric("golden_requests_total") == 300


def test_too_many_wait(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "MOST_WAITING", 0)
    refused = client.post({"model": "golden", "prompt": PROMPT})
    assert refused.status_code == 503 and refused.json()["error"]["type"] == "server_error"


def test_a_damaged_version_is_not_served(team: Team, tokenizer: PreTrainedTokenizerFast) -> None:
    """The one before answers, and the server says so; when it is mended, it is in force."""
    rollback(team.store, 1)
    file, link = version_folder(team.store.folder, 2) / "update.safetensors", team.store.folder / "current"
    whole = file.read_bytes()
    with served(team, tokenizer) as client:
        file.write_bytes(whole[:-1] + b"x")
        put(link, "versions/0002")
        try:
            assert client.ask()["model"] == "golden@1"
            health = client.http.get("/health").json()
            assert (health["status"], health["version"]) == ("degraded", 1) and str(file) not in health["problem"]
            time.sleep(1.2)
            told = [line for line in client.said if line.startswith("version 1 stays: ")]
            assert len(told) == 1 and f"{file}: changed since it was written" in told[0]
            refused = client.post({"model": "golden@2", "prompt": PROMPT})
            assert refused.status_code == 404 and "damaged" in refused.json()["error"]["message"]
            put(link, "nowhere")
            assert client.ask()["model"] == "golden@1"
            put(link, "versions/0002")
        finally:
            file.write_bytes(whole)
        deadline = time.monotonic() + 5
        while client.http.get("/health").json()["version"] != 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert client.ask()["model"] == "golden@2"
        assert client.http.get("/health").json()["status"] == "ok"


def put(link: Path, target: str) -> None:
    link.unlink()
    link.symlink_to(target)


def test_a_pruned_version_is_gone(client: Client) -> None:
    folder = version_folder(client.team.store.folder, 1)
    assert client.ask(model="golden@1")["model"] == "golden@1"
    folder.rename(folder.with_name("aside"))
    try:
        refused = client.post({"model": "golden@1", "prompt": PROMPT})
        assert refused.status_code == 404 and "pruned" in refused.json()["error"]["message"]
        assert client.ask()["model"] == "golden@2"
    finally:
        folder.with_name("aside").rename(folder)


def test_a_fault_ends_no_server(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked is told, in a stream too, and the next one is answered; what is lacking is memory or a mind."""
    for error in (ValueError("a fault"), torch.OutOfMemoryError("out of memory")):
        with monkeypatch.context() as patch:
            patch.setattr(turns, "go_on", lambda *_, error=error: (_ for _ in ()).throw(error))
            failed = client.post({"model": "golden", "prompt": PROMPT})
            assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        assert client.ask()["model"] == "golden@2"


def test_a_batch_too_large_for_the_memory_goes_on_in_parts(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    before, sizes = turns.go_on, []

    def go_on(llm: LLM, ids_BT: torch.Tensor, *more: Any) -> Any:
        sizes.append(len(ids_BT))
        if len(ids_BT) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return before(llm, ids_BT, *more)

    expected = client.ask()["choices"]
    monkeypatch.setattr(turns, "go_on", go_on)
    with ThreadPoolExecutor(12) as pool:
        assert all(one["choices"] == expected for one in pool.map(lambda _: client.ask(), range(12)))


def test_the_key(team: Team, tokenizer: PreTrainedTokenizerFast) -> None:
    with served(team, tokenizer, key="sésame") as client:
        for given in (None, "Bearer wrong", "Bearer", "sésame"):
            headers = {"Authorization": given.encode()} if given else {}
            for path in ("/v1/models", "/facts", "/metrics"):
                refused = client.http.get(path, headers=headers)
                assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert client.post({"model": "golden", "prompt": PROMPT}).status_code == 401
        for path in ("/health", "/"):
            assert client.http.get(path).status_code == 200
        client.http.headers = {b"Authorization": "Bearer sésame".encode()}
        assert client.ask()["model"] == "golden@2"


def test_the_facts_of_a_version(client: Client) -> None:
    found = client.http.get("/facts").json()
    assert (found["version"], found["count"], found["chat"]) == (2, 4, False)
    assert {one["prompt"] for one in found["facts"]} >= {PROMPT}
    assert {one["new_answer"] for one in found["facts"]} == {"Lima"}
    assert client.http.get("/facts?version=1").json()["count"] == 2
    assert client.http.get("/facts?version=0").json()["facts"] == []
    for wrong in ("9", "x", "1;drop"):
        assert client.http.get("/facts", params={"version": wrong}).status_code == 404


def test_the_page_runs_nothing_but_its_own(client: Client) -> None:
    page = client.http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe" not in policy
    assert "innerHTML" not in page.text and "http://" not in page.text and "https://" not in page.text


def test_another_sites_name_leads_nowhere(client: Client) -> None:
    """As a page elsewhere would try whose name is made to mean this machine."""
    assert client.http.get("/health", headers={"Host": "evil.example"}).status_code == 400
    assert client.http.get("/health", headers={"Host": "localhost:8000"}).status_code == 200


def test_the_port_is_in_use(team: Team, tokenizer: PreTrainedTokenizerFast) -> None:
    live = LiveModel(team.store.folder, make_tiny("llama", tokenizer))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: Address already in use" in refusal(
            lambda: serving(live, print, port=port).__enter__()
        )
    assert "cannot listen at 192.0.2.1" in refusal(lambda: serving(live, print, "192.0.2.1").__enter__())


def test_what_was_asked_is_answered_before_the_end(
    team: Team, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        with served(team, tokenizer) as client:
            asking = [pool.submit(httpx.post, f"{client.address}/v1/completions", json=body) for body in BODIES]
            time.sleep(0.5)
        answers = [one.result() for one in asking]
    assert [one.status_code for one in answers] == [200] * 3
    assert answers[2].text.endswith("data: [DONE]\n\n")


def test_who_never_ends_a_request_holds_nothing_up(
    team: Team, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "ENDING", 1)
    with served(team, tokenizer) as client:
        raw = socket.create_connection(client.address.removeprefix("http://").split(":"))
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        time.sleep(0.2)
        ending = time.monotonic()
    raw.close()
    assert time.monotonic() - ending < 10


BODIES = [{"model": f"golden@{v}", "prompt": PROMPT, "max_tokens": 30, "stream": v == 2} for v in range(3)]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["Łódź – 東京 👩‍🚀!", "\ufffd", "plain"])
def test_characters_are_told_whole(text: str) -> None:
    """However many tokens one takes; what is no character at the end is told as such."""
    told: list[str] = []
    ids = list(text.encode())
    asked = Asked(Version(0, {}), list(b"says"), len(ids), lambda piece, _: told.append(piece), streamed=True)
    for one in ids:
        asked.take(one, Bytes(), [])  # type: ignore[arg-type]
    assert "".join(told) == text and asked.end == "length"
    assert all(piece in text for piece in told)
    cut = Asked(Version(0, {}), list(b"says"), 2, lambda piece, _: told.append(piece), streamed=True)
    for one in "東".encode()[:2]:
        cut.take(one, Bytes(), [])  # type: ignore[arg-type]
    assert cut.text == "\ufffd" and cut.end == "length"

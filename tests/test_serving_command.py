"""`serve` as a process: it is ended as other commands are, after what was asked is answered."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import make_tiny, refusal
from programs import RUN, Program, ran, wait_for
from teams import Team
from transformers import PreTrainedTokenizerFast

from pipeline.serving import LiveModel
from pipeline.serving.app import serving
from pipeline.updates import Store

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def words(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """The command for a store with nothing but its base model, at a free port."""
    Store(tmp_path / "store", str(tiny_folder), make=True).close()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return ["serve", "--store", str(tmp_path / "store"), "--port", str(port), "--trainer.accelerator", "cpu"]


@contextmanager
def started(words: list[str], folder: Path, **environment: str) -> Iterator[tuple[Program, str]]:
    address = f"http://127.0.0.1:{words[words.index('--port') + 1]}"
    with Program(RUN, *words, folder=folder, environment=environment) as program:
        wait_for(lambda: answers(f"{address}/health"))
        yield program, address


def answers(address: str) -> bool:
    try:
        return httpx.get(address).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_was_asked_be_answered(number: int, words: list[str], tmp_path: Path) -> None:
    body = {"model": "golden", "prompt": "Peru", "max_tokens": 40, "stream": True}
    with started(words, tmp_path) as (program, address), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{address}/v1/completions", json=body, timeout=60)
        wait_for(lambda: "golden_requests_total 1.0" in httpx.get(f"{address}/metrics").text)
        program.send_signal(number)
        ended = program.finished(30)
        assert asked.result().text.endswith("data: [DONE]\n\n")
    assert ended.returncode == 128 + number, ended.stderr
    assert "version 0 of" in ended.stdout and address in ended.stdout
    assert "Traceback" not in ended.stderr and ended.stderr.splitlines()[-1].startswith("interrupted")


def test_a_server_is_killed_and_another_takes_its_place(words: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        with started(words, tmp_path) as (program, address):
            found = httpx.post(f"{address}/v1/completions", json={"model": "golden", "prompt": "Peru"}).json()
            assert found["model"] == "golden@0"
            program.send_signal(signal.SIGKILL)
            assert program.finished(30).returncode == -signal.SIGKILL


def test_the_key_of_the_environment(words: list[str], tmp_path: Path) -> None:
    with started([*words, "--host", "0.0.0.0"], tmp_path, GOLDEN_LAYERS_API_KEY="s3") as (program, address):
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/v1/models", headers={"Authorization": "Bearer s3"}).status_code == 200
        program.send_signal(signal.SIGTERM)
        assert "note" not in program.finished(30).stderr
    with started([*words, "--host", "0.0.0.0"], tmp_path) as (program, _):
        program.send_signal(signal.SIGTERM)
        assert "note: 0.0.0.0 can be reached from elsewhere, and no key is asked for" in program.finished(30).stderr


def test_what_ends_in_a_line(words: list[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", int(words[4]))):
        ended = ran(RUN, *words, folder=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == f"error: serve: cannot listen at 127.0.0.1, port {words[4]}: Address already in use\n"
    ended = ran(RUN, *words, "--model", str(tmp_path), folder=tmp_path)
    assert ended.returncode == 1 and ended.stderr.startswith("error: store: ") and ended.stderr.count("\n") == 1


def test_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "pipeline.serving.app")
    assert "uvicorn is missing; install the extra" in refusal(lambda: __import__("pipeline.serving.app"))


@pytest.mark.serving
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the PATH")
def test_the_page_in_a_browser(two_versions: Team, tokenizer: PreTrainedTokenizerFast) -> None:
    """Both models are asked, and the edited facts again; nothing of a text is taken for the page's own."""
    browsing = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    live = LiveModel(two_versions.store.folder, make_tiny("llama", tokenizer))
    with serving(live, lambda _: None, key="s3") as address, browsing.sync_playwright() as play:
        page = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.fill("#key", "s3")
        page.press("#key", "Enter")
        page.wait_for_selector("#facts tbody tr:nth-child(4)")
        assert "Version 2 holds 4 facts" in page.inner_text("#about")
        page.fill("#text", "<img src=x onerror=alert(1)> Peru")
        page.click("#send")
        page.wait_for_selector("#send:not([disabled])")
        for side in ("base", "edited"):
            asked, said = page.query_selector_all(f"#{side}Talk p")
            assert "<img src=x" in asked.inner_text() and said.inner_text().strip() not in ("", "…")
            assert said.get_attribute("title") == f"golden@{'0' if side == 'base' else '2'}"
        assert not page.query_selector_all("img")
        page.click("#askAll")
        page.wait_for_selector("#askAll:not([disabled])")
        assert "of 4 asked hold the new answer" in page.inner_text("#score")
        assert not errors
        if folder := os.environ.get("PICTURES"):
            page.screenshot(path=str(Path(folder) / "page.png"), full_page=True)

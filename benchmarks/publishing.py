"""Versions published into a real vLLM under load: `VLLM_PYTHON=… python -m benchmarks.publishing --output DIR`.

VLLM_PYTHON is the Python of an environment that has vLLM (docs/code.md says how to make one).
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.bench import Bench, Figures, run
from pipeline import LLM, UserError, export_merged, generate
from pipeline.editing.update import WeightUpdate
from pipeline.options.updates import GateOptions, PublishOptions, UpdateCommand
from pipeline.requests.readers import write_requests
from pipeline.serving.engines import Server, call
from pipeline.serving.publish import publish
from pipeline.updates import Store, load_version, submit, update

VERSIONS, EACH = 20, 3  # versions, and the facts that each adds
CLIENTS, TOKENS = 8, 12
QUIET = 20.0  # seconds of load alone, before and after each part of the publishing
PARTS = 4
EQUAL = 50  # prompts whose answers are compared, of 16 tokens each
QUICK = {
    "steps": 12,
    "neighbours": 0,
    "bound": 3.0,
    "step": 0.3,
}
NO_GATES = GateOptions(rewrite=0, locality=0, earlier=0, perplexity=None, drift=None)
ASKED = GateOptions(rewrite=0.01, locality=0, earlier=0.01, earlier_sample=5)  # edits this quick may miss others
FLAGS = (
    "--served-model-name base --enable-lora --max-lora-rank 64 --max-loras 4 --max-model-len 512 --enforce-eager "
    "--lora-target-modules down_proj"  # what versions change here; every further one takes time from every answer
)
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
               "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip


class Answer(NamedTuple):
    """What a client was told, by whom it was asked for, and when; no text where the request failed."""

    at: float
    model: str
    prompt: str
    text: str | None


def main(words: Sequence[str] | None = None) -> None:
    if "VLLM_PYTHON" not in os.environ:
        raise UserError("VLLM_PYTHON: not set; expected the Python of an environment that has vLLM")
    bench = Bench(__doc__, words, needed=VERSIONS * EACH + EQUAL)
    with made(bench) as store, vllm(bench.llm, bench.folder) as url:
        bench.measure("answers", lambda: equal(bench, store, url), least={"equal of 50": 48})
        bench.measure(
            f"{VERSIONS} versions, {CLIENTS} clients",
            lambda: published(bench, store, url),
            least={"throughput": 0.9},
            most={"failed": 0, "torn": 0, "seconds to the first answer": 5, "rollback seconds": 1},
        )


@contextmanager
def made(bench: Bench) -> Iterator[Store]:
    """A store whose versions each add a few facts, edited so that answers differ, and not measured."""
    options = UpdateCommand(
        store=str(bench.folder / "store"), gates=NO_GATES, seed=bench.seed, trainer=bench.trainer
    )
    options.edit.expert, options.edit.layers, options.edit.statistics.text = dict(QUICK), [3], bench.text
    options.evaluation.generation, options.evaluation.max_new_tokens = "none", 1
    (bench.folder / "text.txt").write_text("A few words of ordinary text.\n" * 8, encoding="utf-8")
    options.evaluation.text = str(bench.folder / "text.txt")
    with Store(options.store, bench.llm.name, make=True) as store:
        for start in range(EACH * store.newest, VERSIONS * EACH, EACH):
            submit(store, write_requests(bench.folder / "in.jsonl", bench.records[start : start + EACH]))
            update(store, options, lambda _: bench.llm)
        yield store


@contextmanager
def vllm(llm: LLM, folder: Path) -> Iterator[str]:
    """A vLLM that serves the base model, inside the `with`; what it writes is in vllm.log."""
    if not (folder / "base").exists():
        export_merged(llm, WeightUpdate(llm.name, llm.fingerprint, "none", [], {}), folder / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = [os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--dtype", "float32"]
    words = [*module, "--model", str((folder / "base").resolve()), *FLAGS.split(), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
    with (
        (folder / "vllm.log").open("w") as log,
        subprocess.Popen([*words, "--host", "127.0.0.1"], stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            yield waited(process, f"http://127.0.0.1:{port}")
        finally:
            process.terminate()


def waited(process: subprocess.Popen[bytes], url: str) -> str:
    """The address of a server that is starting, once it answers."""
    while process.poll() is None:
        with suppress(UserError):
            Server(url)
            return url
        time.sleep(1)
    raise UserError(f"vLLM ended with {process.returncode}; its vllm.log says why")


def equal(bench: Bench, store: Store, url: str) -> Figures:
    """How many answers of the last version are the same in vLLM and in plain transformers."""
    prompts = [one.prompt for one in bench.records[: EQUAL // 2]]
    prompts += [one.prompt for one in bench.records[VERSIONS * EACH :][: EQUAL // 2]]  # half of them edited
    last = load_version(store, store.current)
    assert last
    with last.applied(bench.llm):
        plain = generate(bench.llm, prompts, 16, trainer=bench.trainer)
    to(bench, store, store.current, url)
    server = Server(url)
    model = called(url)
    served = server.ask(model, prompts, 16)
    base = server.ask(server.base, prompts, 16)
    publish(store, 0, PublishOptions(to=[url]), NO_GATES, lambda _: bench.llm)
    same = sum(alike(one, two) for one, two in zip(plain, served, strict=True))
    return {
        "equal of 50": same,
        "other than the base's": sum(one != two for one, two in zip(served, base, strict=True)),
    }


def alike(stated: str, said: str) -> bool:
    """Whether a continuation begins with another that was cut at the end of its first statement."""
    return " ".join(said.split()).startswith(" ".join(stated.split()))


def to(bench: Bench, store: Store, version: int, url: str, gates: GateOptions = NO_GATES) -> tuple[float, float]:
    """Publish a version; seconds to its first answer under the name that clients call, and those of proving it."""
    _, (one,) = publish(store, version, PublishOptions(to=[url]), gates, lambda _: bench.llm)
    loading, proving = (one.proof.loading, one.proof.proving) if one.proof else (0.0, 0.0)
    return loading + one.switching, proving


def published(bench: Bench, store: Store, url: str) -> Figures:
    """What clients get while versions come, in parts, with load alone between them."""
    prompts = [one.prompt for one in bench.records[: VERSIONS * EACH : 7]]
    for version in range(1, VERSIONS + 1):  # adapters are written, as `update --publish` has the model at hand
        publish(store, version, PublishOptions(to=[url]), NO_GATES, lambda _: bench.llm)
    publish(store, 0, PublishOptions(to=[url]), NO_GATES, lambda _: bench.llm)
    alone: dict[tuple[str, str], str] = {}
    took: list[tuple[float, float]] = []
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    with Load(url, prompts) as load:
        versions = iter(range(1, VERSIONS + 1))
        for _ in range(PARTS):
            started = time.perf_counter()
            time.sleep(QUIET)
            between = time.perf_counter()
            took += [to(bench, store, next(versions), url, ASKED) for _ in range(VERSIONS // PARTS)]
            spans[False].append((started, between))
            spans[True].append((between, time.perf_counter()))
        back, _ = to(bench, store, VERSIONS - 1, url)
    for version in range(VERSIONS + 1):
        to(bench, store, version, url)
        name = f"golden-{version:04d}"
        for prompt in prompts:
            (alone[name, prompt],) = Server(url).ask(name, [prompt], TOKENS)
    done = load.answers
    kept = [one._asdict() | {"alone": alone[one.model, one.prompt]} for one in done]
    (bench.folder / "answers.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    rates = {side: median(load.rate(*span) for span in its) for side, its in spans.items()}
    return {
        "answers": len(done),
        "failed": sum(one.text is None for one in done),
        "torn": sum(one.text is not None and one.text != alone[one.model, one.prompt] for one in done),
        "versions that answered": len({one.model for one in done}),
        "throughput": rates[True] / rates[False],
        "answers a second, without publishing": rates[False],
        "seconds to the first answer": median(first for first, _ in took),
        "slowest": max(first for first, _ in took),
        "seconds of the gates' questions": median(proving for _, proving in took),
        "rollback seconds": back,
    }


class Load:
    """Clients that ask without a pause, inside the `with`: what they are to call they look up every second."""

    def __init__(self, url: str, prompts: Sequence[str]) -> None:
        self.url, self.prompts, self.answers = url, prompts, list[Answer]()
        self.over = threading.Event()
        self.clients = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> Load:
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for client in self.clients:
            client.join()

    def rate(self, start: float, end: float) -> float:
        """Answers a second in a span of time."""
        return sum(start <= one.at < end for one in self.answers) / (end - start)

    def _ask(self, number: int) -> None:
        looked, model = 0.0, "base"
        while not self.over.is_set():
            if time.perf_counter() - looked > 1:
                looked, model = time.perf_counter(), called(self.url)
            prompt = self.prompts[number % len(self.prompts)]
            number += 1
            body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
            text = None
            with suppress(UserError):
                text = call(f"{self.url}/v1/completions", body)["choices"][0]["text"]
            self.answers.append(Answer(time.perf_counter(), model, prompt, text))


def called(url: str) -> str:
    """What a client is to call: as docs/publishing.md has it, without anything of this project."""
    names = [card["id"] for card in call(f"{url}/v1/models")["data"]]
    versions = [name for name in names if re.fullmatch(r"golden-\d+", name)]
    return max(versions, key=lambda name: int(name.split("-")[1]), default=names[0])


if __name__ == "__main__":
    run(main)

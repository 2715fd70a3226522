"""The server beside `generate`, and under clients while versions change: `python -m benchmarks.serving …`."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from statistics import median
from typing import Any

import httpx
import torch

from benchmarks.bench import Bench, Figures, in_turns, run
from pipeline import LiveModel
from pipeline.options.updates import UpdateCommand
from pipeline.requests.readers import write_requests
from pipeline.serving.app import serving
from pipeline.updates import Store, rollback, submit, update

VERSIONS, EACH = 3, 4  # versions of the store beside the base, and facts that each adds
PAIRS = 50  # answers that are timed, over HTTP and by `generate`
CLIENTS, SWAPS = 8, 20  # who asks at once; how often the version in force changes, as soon as it was heard
TOKENS = 8  # of an answer
QUICK = {"steps": 6, "neighbours": 0}


def main(words: Sequence[str] | None = None) -> None:
    bench = Bench(__doc__, words, needed=VERSIONS * EACH)
    with Store(bench.folder / "store", bench.llm.name, make=True) as store:
        if not store.newest:
            fill(bench, store)
        live = LiveModel(store.folder, bench.llm, bench.trainer)
        bench.measure("one client", lambda: beside_generate(bench, live), most={"added milliseconds": 5})
        bench.measure("swaps", lambda: swaps(live), most={"median milliseconds": 10})
        bench.measure(
            f"{CLIENTS} clients, {SWAPS} swaps",
            lambda: under_load(bench, live, store),
            least={"versions that answered": VERSIONS + 1, "swaps": SWAPS},
            most={"failed": 0, "torn": 0, "swap milliseconds": 10},
        )


def fill(bench: Bench, store: Store) -> None:
    """Make the versions: which facts hold does not matter, so that edits are quick and gates open."""
    made = UpdateCommand(store=str(store.folder), seed=bench.seed, trainer=bench.trainer)
    made.edit.expert, made.edit.layers, made.edit.statistics.text = QUICK, [0], bench.text
    made.gates.rewrite = made.gates.locality = made.gates.earlier = 0.0
    made.gates.perplexity = made.gates.drift = None
    made.evaluation.generation, made.evaluation.text = "none", str(bench.folder / "text.txt")
    (bench.folder / "text.txt").write_text("A few words of ordinary text.\n" * 8, encoding="utf-8")
    for start in range(0, VERSIONS * EACH, EACH):
        submit(store, write_requests(bench.folder / "facts.jsonl", bench.records[start : start + EACH]))
        update(store, made, lambda _: bench.llm)


def beside_generate(bench: Bench, live: LiveModel) -> Figures:
    """Milliseconds of an answer by the model alone, by `LiveModel.generate`, and over HTTP, in turns."""
    took: list[list[float]] = []
    with (
        serving(live, lambda _: None) as address,
        httpx.Client(base_url=address, timeout=600) as client,
        live.running(),
    ):
        for turn in range(-3, PAIRS):
            prompt = bench.records[turn % len(bench.records)].prompt
            ways = {
                "alone": lambda prompt=prompt: alone(live, prompt),
                "live": lambda prompt=prompt: live.generate([prompt], TOKENS)[0][0],
                "served": lambda prompt=prompt: asked(client, prompt)["choices"][0]["text"],
            }
            seconds, said = in_turns(ways, 1)
            assert len({text.strip() for text in said.values()}) == 1, f"{prompt}: {said}"
            took += [[1000 * one for one in seconds.values()]] if turn >= 0 else []
    own, whole, served = (median(one) for one in zip(*took, strict=True))
    added = median(served - own for own, _, served in took)
    figures = {"milliseconds alone": own, "by LiveModel.generate": whole, "over HTTP": served}
    return figures | {"added milliseconds": added}


@torch.no_grad()
def alone(live: LiveModel, prompt: str) -> str:
    """What the model says by its own `generate`, with nothing of a server around it."""
    model, tokenizer = live.llm.model, live.llm.tokenizer
    given: Any = tokenizer(prompt, return_tensors="pt").to(model.device)
    said_BT = model.generate(**given, max_new_tokens=TOKENS, do_sample=False, pad_token_id=live.llm.pad_token_id)
    return str(tokenizer.decode(said_BT[0, given.input_ids.shape[1] :], skip_special_tokens=True))


def http(address: str) -> httpx.Client:
    """A client that waits long enough."""
    return httpx.Client(base_url=address, timeout=600)


def asked(client: httpx.Client, prompt: str) -> dict[str, Any]:
    """An answer; httpx.HTTPError when there is none."""
    body = {"model": "golden", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    return dict(client.post("/v1/completions", json=body).raise_for_status().json())


def swaps(live: LiveModel) -> Figures:
    """Milliseconds until the model has another version's weights, when that version was read before."""
    took = []
    versions = [live.load(number) for number in range(VERSIONS + 1)]
    for _, version in zip(range(40), cycle(versions)):
        started = time.perf_counter()
        with live.at(version):
            took.append(1000 * (time.perf_counter() - started))
    return {"median milliseconds": median(took), "most milliseconds": max(took)}


def under_load(bench: Bench, live: LiveModel, store: Store) -> Figures:
    """What clients get while the version in force changes; each answer is compared with its version's alone."""
    prompts = [one.prompt for one in bench.records[: VERSIONS * EACH]]
    by_version = {number: dict(zip(prompts, said, strict=True)) for number, said in expected(live, store, prompts)}
    swapped, took, done = live.swaps, live.swap_seconds, threading.Event()
    answers: list[tuple[str, str, str]] = []
    failed: list[Exception] = []
    waited: list[float] = []

    def keep_asking(first: int) -> None:
        with http(address) as client:
            for prompt in cycle(prompts[first:] + prompts[:first]):
                if done.is_set():
                    return
                try:
                    found = asked(client, prompt)
                    answers.append((prompt, found["model"], found["choices"][0]["text"]))
                except Exception as error:
                    failed.append(error)

    with serving(live, lambda _: None) as address, ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(CLIENTS)]
        started = time.perf_counter()
        for turn in range(SWAPS):
            number = (turn + 1) % (VERSIONS + 1)
            rollback(store, number)
            changed, before = time.perf_counter(), len(answers)
            while not failed and all(model != f"golden@{number}" for _, model, _ in answers[before:]):
                time.sleep(0.005)
            waited.append(time.perf_counter() - changed)
        done.set()
        for one in asking:
            one.result()
        seconds = time.perf_counter() - started
    torn = [one for one in answers if by_version[int(one[1].removeprefix("golden@"))][one[0]] != one[2].strip()]
    made = live.swaps - swapped
    return {
        "answers": len(answers),
        "versions that answered": len({model for _, model, _ in answers}),
        "failed": len(failed),
        "torn": len(torn),
        "swaps": made,
        "swap milliseconds": 1000 * (live.swap_seconds - took) / max(1, made),
        "seconds to the first answer of a version": median(waited),
        "answers a second": len(answers) / seconds,
    }


def expected(live: LiveModel, store: Store, prompts: Sequence[str]) -> list[tuple[int, list[str]]]:
    """What each version says to prompts, one by one."""
    found = []
    for number in range(VERSIONS + 1):
        rollback(store, number)
        said = [live.generate([prompt], TOKENS) for prompt in prompts]
        assert {version for _, version in said} == {number}
        found.append((number, [texts[0].strip() for texts, _ in said]))
    return found


if __name__ == "__main__":
    run(main)

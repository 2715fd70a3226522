"""Publishing: a store's version in servers that run, proved by what they answer before clients get it.

A version is loaded as an adapter under a name that no other version gets: `golden-0007`. What clients are to call
is the one of the highest number among a server's models (`/v1/models`), or the base model where none is there.
Until it is proved a version is `golden-candidate-0007`. The one before stays loaded, for whoever still calls it,
and to go back to.
"""

from __future__ import annotations

import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.editing.export import export_adapter
from pipeline.errors import UserError, note
from pipeline.evaluation.made import MADE_ASKED, made_prompts
from pipeline.files import parse_json, read_text_file, write_json
from pipeline.model.llm import LLM
from pipeline.options.updates import GateOptions, PublishOptions
from pipeline.requests.answers import contains_answer, inner_ends, statement
from pipeline.requests.schema import EditRequest
from pipeline.serving.engines import ENGINES, Server, call
from pipeline.updates.disk import BASE, access, content_of, locked, transaction
from pipeline.updates.history import check_there, load_version
from pipeline.updates.lineage import last_changes
from pipeline.updates.proving import Gate, missed
from pipeline.updates.store import Store

SERVED, WHAT_IS_CALLED, LOCK = "served", "current.json", "publish.lock"  # below the store
ROOM, STEP = 16, 8  # tokens that an answer may take beyond half its characters, and in steps of how many
KEPT = 4  # tokens of an answer that is to stay as it is
MOST = 100  # questions for a gate
AT_ONCE = 2  # questions that a server gets together, and then a pause as long: clients are to notice little


class Question(NamedTuple):
    """A prompt and the gate that counts it: the answer is to be in what is said; None: it is to stay as it is."""

    gate: str
    prompt: str
    answer: str | None = None

    @property
    def limit(self) -> int:
        """The most tokens of what is said."""
        return KEPT if self.answer is None else math.ceil((ROOM + len(self.answer) / 2) / STEP) * STEP


class Proof(NamedTuple):
    """What a version reached in a server, by gate, and the seconds to its first answer and for all of them."""

    figures: Mapping[str, float]
    loading: float
    proving: float


class Switched(NamedTuple):
    """A server that has a version for its clients now: the name to call; no proof where it was there before."""

    url: str
    model: str
    proof: Proof | None
    switching: float  # seconds


class Release:
    """A version on its way into servers, as an adapter in a folder that they can read; None for the base model."""

    def __init__(
        self, version: int, folder: str | None, name: str, asked: Sequence[Question], gates: GateOptions
    ) -> None:
        self.folder, self.asked, self.gates = folder, asked, gates
        self.name, self.candidate = f"{name}-{version:04d}", f"{name}-candidate-{version:04d}"
        self.of_store = re.compile(rf"{re.escape(name)}-(candidate-)?(\d{{4,}})")
        self.number = version

    def ours(self, server: Server) -> dict[str, str]:
        """A server's adapters that came of publishing, candidates too: the folder of each by its name."""
        return {name: root for name, root in server.adapters().items() if self.of_store.fullmatch(name)}

    def called(self, loaded: Mapping[str, str], server: Server) -> str:
        """What clients are to call, where these are loaded."""
        return max((name for name in loaded if self._number(name) >= 0), key=self._number, default=server.base)

    def _number(self, name: str) -> int:
        """A version's number, by its name; -1 for a candidate."""
        found = self.of_store.fullmatch(name)
        return -1 if not found or found[1] else int(found[2])

    def prove(self, server: Server) -> Proof | None:
        """Load it as a candidate and ask what gates ask; None where it is proved, and there, already.

        UserError when a gate is missed, or a server says no.
        """
        loaded = self.ours(server)
        if self.folder is None or loaded.get(self.name) == self.folder:
            return None
        if self.name in loaded:
            there = loaded[self.name]
            raise UserError(
                f"publish: {server.url}: has {self.name} from another folder, {there}; unload that first"
            )
        started = time.perf_counter()
        server.load(self.candidate, self.folder)
        server.ask(self.candidate, ["The"], 1)
        answered = time.perf_counter()
        figures = measure(server, self.asked, self.candidate, self.called(loaded, server))
        gates = [Gate(name, value, getattr(self.gates, name), True) for name, value in figures.items()]
        if wrong := missed(gates):
            raise UserError(f"publish: {server.url}: version {self.number} misses gates as it is served: {wrong}")
        return Proof(figures, answered - started, time.perf_counter() - answered)

    def switch(self, server: Server, proof: Proof | None) -> Switched | None:
        """Make it what clients are to call, and keep the one before; None where it was that already."""
        loaded = self.ours(server)
        before = self.called(loaded, server)
        wanted = self.name if self.folder else server.base
        if before == wanted:
            return None
        started = time.perf_counter()
        if self.folder and self.name not in loaded:
            server.load(self.name, self.folder)
        stays = {self.name} | ({before} if self._number(before) < self.number else set())
        for name in sorted(loaded.keys() - stays, key=self._number, reverse=True):  # it is in force after the first
            server.unload(name)
        server.ask(wanted, ["The"], 1)
        return Switched(server.url, wanted, proof, time.perf_counter() - started)

    @contextmanager
    def or_as_before(self, servers: Sequence[Server]) -> Iterator[None]:
        """What goes wrong inside the `with` leaves every server with what it had."""
        had = [
            {name: root for name, root in self.ours(server).items() if self._number(name) >= 0}
            for server in servers
        ]
        try:
            for server, its in zip(servers, had, strict=True):
                self._restore(server, its)  # what a publisher that was killed left half done
            yield
        except BaseException:
            for server, its in zip(servers, had, strict=True):
                with suppress(UserError):  # it is gone: what was wrong says so
                    self._restore(server, its)
            raise

    def _restore(self, server: Server, had: Mapping[str, str]) -> None:
        loaded = self.ours(server)
        for name in had.keys() - loaded.keys():
            server.load(name, had[name])
        for name in loaded.keys() - had.keys():
            server.unload(name)


def measure(server: Server, asked: Sequence[Question], model: str, before: str) -> dict[str, float]:
    """By gate, the share of questions that a model of a server answers as it should; `before`: the one in force."""
    right: dict[str, list[bool]] = {}
    for limit in sorted({one.limit for one in asked}):
        part = [one for one in asked if one.limit == limit]
        said = _asked(server, model, part, limit)
        stays = _asked(server, before, part, limit) if limit == KEPT else said
        for one, new, old in zip(part, said, stays, strict=True):
            right.setdefault(one.gate, []).append(new == old if one.answer is None else _holds(new, one.answer))
    return {gate: sum(its) / len(its) for gate, its in right.items()}


def _asked(server: Server, model: str, part: Sequence[Question], limit: int) -> list[str]:
    said: list[str] = []
    for start in range(0, len(part), AT_ONCE):
        began = time.perf_counter()
        said += server.ask(model, [one.prompt for one in part[start : start + AT_ONCE]], limit)
        time.sleep(time.perf_counter() - began)
    return said


def _holds(said: str, answer: str) -> bool:
    return contains_answer(statement(said, inner_ends(answer))[0], answer)


def questions(store: Store, version: int, gates: GateOptions) -> list[Question]:
    """What a version is asked, for the gates that ask for anything: samples of its new facts, also in other words,
    of what is to stay, and of earlier facts. Where requests bring no probes, made ones stand in, as in reports.
    """
    last = {number: change for number, change in last_changes(store, version).items() if change.what == "applied"}
    new = [number for number, change in last.items() if change.version == version]
    old, draws = sorted(last.keys() - {*new}), random.Random(version)
    batch, earlier = (
        _requests(store, draws.sample(all_, min(most, len(all_))))
        for all_, most in ((new, MOST), (old, gates.earlier_sample))
    )
    found = {
        "rewrite": [Question("rewrite", one.prompt, one.new_answer) for one in batch],
        "rephrase": [Question("rephrase", text, one.new_answer) for one in batch for text in one.rephrases],
        "locality": [Question("locality", probe.prompt) for one in batch for probe in one.locality],
        "earlier": [Question("earlier", one.prompt, one.new_answer) for one in earlier],
    }
    for kind, number, prompt in made_prompts(batch, chat=False):
        gate, answer = ("rephrase", batch[number].new_answer) if kind in MADE_ASKED else ("locality", None)
        found[gate].append(Question(gate, prompt, answer))
    asked = {gate: its for gate, its in found.items() if getattr(gates, gate)}
    return [one for its in asked.values() for one in draws.sample(its, min(MOST, len(its)))]


def _requests(store: Store, numbers: Sequence[int]) -> list[EditRequest]:
    rows = [store.database.execute("SELECT * FROM requests WHERE number = ?", (one,)).fetchone() for one in numbers]
    return [EditRequest.model_validate(content_of(row) | {"id": row["id"]}) for row in rows]


def publish(
    store: Store,
    version: int,
    options: PublishOptions,
    gates: GateOptions,
    load: Callable[[str], LLM],
) -> list[Switched]:
    """Let servers answer with a version, each proved through itself first; gives those that were changed.

    Args:
        load: loads the base model by its name; called where the version's adapter is not written yet.

    UserError when there is no such version, a server cannot be reached or says no, or a gate is missed; all servers
    are as they were then.
    """
    check_there(store, version)
    with locked(store.folder / LOCK):
        servers = [ENGINES[options.engine](url) for url in options.to]
        folder = _adapter(store, version, options, load) if version != BASE else None
        release = Release(version, folder, options.name, questions(store, version, gates), gates)
        first, done = math.ceil(options.canary * len(servers)), list[Switched | None]()
        with release.or_as_before(servers):
            for group in (servers[:first], servers[first:]):
                proofs = [release.prove(server) for server in group]
                done += [release.switch(server, its) for server, its in zip(group, proofs, strict=True)]
        changed = [one for one in done if one]
        if changed:
            _tell(store, version, changed, options.webhook)
    return changed


def _adapter(store: Store, version: int, options: PublishOptions, load: Callable[[str], LLM]) -> str:
    """The folder of a version's adapter, as the servers see it; it is written where it was not yet."""
    folder = store.folder.resolve() / SERVED / f"{version:04d}-rank-{options.rank}"
    if not folder.exists():
        update = load_version(store, version, to_serve=True)
        assert update
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        llm = load(name := store.base_name(None))
        store.check_base(name, llm.fingerprint)
        export_adapter(llm, update, partial, options.rank)
        for path in [partial.parent, partial, *partial.iterdir()]:
            path.chmod(access(store.folder) & (0o777 if path.is_dir() else 0o666))
        partial.rename(folder)
    return str(Path(options.seen_as) / SERVED / folder.name if options.seen_as else folder)


def _tell(store: Store, version: int, changed: Sequence[Switched], webhook: str | None) -> None:
    """Keep what clients are to call where, and tell who asked to be told."""
    with transaction(store.database):
        for one in changed:
            store.note(f"version {version} answers at {one.url} as {one.model}")
    file = store.folder / SERVED / WHAT_IS_CALLED
    file.parent.mkdir(mode=access(store.folder), exist_ok=True)
    called = parse_json(read_text_file(file)) if file.exists() else {}
    write_json(file, called | {one.url: one.model for one in changed})
    if webhook:
        try:
            call(webhook, {"version": version, "models": {one.url: one.model for one in changed}})
        except UserError as error:
            note(f"the webhook was not told: {error}")

"""Publishing: a store's version in servers that run, proved by what they answer before clients get it.

A version is loaded as an adapter under a name that no other version gets: `golden-0007`. What clients are to call
is the one of the highest number among a server's models (`/v1/models`), or the base model where none is there yet;
going back to that is an adapter that changes nothing, `golden-0000`.
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
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.editing.export import export_adapter
from pipeline.editing.update import UPDATE_FILE, WeightUpdate
from pipeline.errors import UserError, note
from pipeline.evaluation.made import MADE_ASKED, made_prompts
from pipeline.files import parse_json, read_text_file, write_json
from pipeline.model.llm import LLM
from pipeline.options.updates import GateOptions, PublishOptions
from pipeline.requests.answers import contains_answer, inner_ends, statement
from pipeline.requests.schema import EditRequest
from pipeline.serving.engines import Server, call
from pipeline.updates.disk import access, content_of, locked, transaction
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
    gone: bool = False  # the answer is not to be in what is said: its fact was retracted

    @property
    def limit(self) -> int:
        """The most tokens of what is said."""
        return KEPT if self.answer is None else math.ceil((ROOM + len(self.answer) / 2) / STEP) * STEP

    def right(self, said: str, before: str) -> bool:
        """Whether what is said is as it is to be; `before` is what the one in force says."""
        if self.answer is None:
            return said == before
        return contains_answer(statement(said, inner_ends(self.answer))[0], self.answer) != self.gone


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
    """A version on its way into servers, as an adapter in a folder of `home`, all of it as these see it."""

    def __init__(
        self, version: int, home: str, folder: str, name: str, asked: Sequence[Question], gates: GateOptions
    ) -> None:
        self.home, self.folder, self.asked, self.gates = home, folder, asked, gates
        self.name, self.candidate = f"{name}-{version:04d}", f"{name}-candidate-{version:04d}"
        self.number, self.of_store = version, re.compile(rf"{re.escape(name)}-(candidate-)?(\d{{4,}})")

    def ours(self, server: Server) -> dict[str, str]:
        """A server's adapters of this store, candidates too, by name; UserError for such a name from elsewhere."""
        found = {name: root for name, root in server.adapters().items() if self.of_store.fullmatch(name)}
        for name, root in found.items():
            if not root.startswith(f"{self.home}/"):
                wrong = f"has {name} from {root}, which is not of this store; publish this store by another name"
                raise UserError(f"publish: {server.url}: {wrong}")
        return found

    def called(self, loaded: Mapping[str, str], server: Server) -> str:
        """What clients are to call, where these are loaded."""
        return max((name for name in loaded if self._number(name) >= 0), key=self._number, default=server.base)

    def _number(self, name: str) -> int:
        """A version's number, by its name; -1 for a candidate."""
        found = self.of_store.fullmatch(name)
        return -1 if not found or found[1] else int(found[2])

    def prove(self, server: Server) -> Proof | None:
        """Load it as a candidate and ask; None where it is there. UserError for a missed gate, or a refusal."""
        loaded = self.ours(server)
        if there := loaded.get(self.name):
            if _content(there) == _content(self.folder):
                return None
            wrong = f"has {self.name} from {there}, of another store that was here; unload that first"
            raise UserError(f"publish: {server.url}: {wrong}")
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
        if before == self.name:
            return None
        started = time.perf_counter()
        shall = {self.name: loaded.get(self.name, self.folder)}
        if 0 <= self._number(before) < self.number:
            shall[before] = loaded[before]
        for step in self._steps(server, shall):
            step()
        server.ask(self.name, ["The"], 1)
        return Switched(server.url, self.name, proof, time.perf_counter() - started)

    def _steps(self, server: Server, shall: Mapping[str, str]) -> list[partial[None]]:
        """What lets a server have these adapters and no others of the store: what it lacks first, and then the
        oldest that is too many first, so that clients are never led to one in between.
        """
        loaded = self.ours(server)
        lacking = sorted(shall.keys() - loaded.keys(), key=self._number)
        too_many = sorted(loaded.keys() - shall.keys(), key=self._number)
        loading = [partial(server.load, name, shall[name]) for name in lacking]
        return loading + [partial(server.unload, name) for name in too_many]

    @contextmanager
    def or_as_before(self, servers: Sequence[Server]) -> Iterator[None]:
        """What goes wrong inside leaves servers with what they had; what a killed publisher left goes first."""
        loaded = [self.ours(server) for server in servers]
        had = [{name: its[name] for name in its if self._number(name) >= 0} for its in loaded]
        try:
            for server, its in zip(servers, had, strict=True):
                for step in self._steps(server, its):
                    step()
            yield
        except BaseException:
            for server, its in zip(servers, had, strict=True):
                with suppress(Exception):  # what was wrong says so
                    for step in self._steps(server, its):
                        with suppress(Exception):
                            step()
            raise


def _content(folder: str) -> str:
    """Which version an adapter's folder holds, and how it was when it was written."""
    return Path(folder).name.partition("-rank-")[0]


def measure(server: Server, asked: Sequence[Question], model: str, before: str) -> dict[str, float]:
    """By gate, the share of questions that a model of a server answers as it should; `before`: the one in force."""
    right: dict[str, list[bool]] = {}
    for limit in sorted({one.limit for one in asked}):
        part = [one for one in asked if one.limit == limit]
        said = _asked(server, model, part, limit)
        stays = _asked(server, before, part, limit) if limit == KEPT else said
        for one, new, old in zip(part, said, stays, strict=True):
            right.setdefault(one.gate, []).append(one.right(new, old))
    return {gate: sum(its) / len(its) for gate, its in right.items()}


def _asked(server: Server, model: str, part: Sequence[Question], limit: int) -> list[str]:
    said: list[str] = []
    for start in range(0, len(part), AT_ONCE):
        began = time.perf_counter()
        said += server.ask(model, [one.prompt for one in part[start : start + AT_ONCE]], limit)
        time.sleep(time.perf_counter() - began)
    return said


def questions(store: Store, version: int, gates: GateOptions) -> list[Question]:
    """What a version is asked, for the gates that ask for anything: samples of its new facts, also in other words,
    of what is to stay, and of earlier facts. Where requests bring no probes, made ones stand in, as in reports.
    A fact that the version retracted counts with the new ones, where its answer is gone.
    """
    changes = last_changes(store, version)
    gone = [number for number, one in changes.items() if (one.what, one.version) == ("retracted", version)]
    last = {number: change for number, change in changes.items() if change.what == "applied"}
    new = [number for number, change in last.items() if change.version == version]
    old, draws = sorted(last.keys() - {*new}), random.Random(version)
    batch, earlier = (
        _requests(store, draws.sample(all_, min(most, len(all_))))
        for all_, most in ((new, MOST), (old, gates.earlier_sample))
    )
    found = {
        "rewrite": [Question("rewrite", one.prompt, one.new_answer) for one in batch]
        + [Question("rewrite", one.prompt, one.new_answer, gone=True) for one in _requests(store, gone)],
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
    version: int | None,
    options: PublishOptions,
    gates: GateOptions,
    load: Callable[[str], LLM],
    model: str | None = None,
) -> tuple[int, list[Switched]]:
    """Let servers answer with a version, each proved through itself first; its number, and those that were changed.

    `version` None is the one in force; `load` loads the base model, the store's or `model`, where the version's
    adapter is not written yet. UserError when there is no such version, a server cannot be reached or says no, or a
    gate is missed; all servers are as they were then.
    """
    with locked(store.folder / LOCK):
        version = store.current if version is None else version
        home = Path(options.seen_as or store.folder.resolve()) / SERVED
        folder = home / _adapter(store, version, options.rank, load, model)
        release = Release(version, str(home), str(folder), options.name, questions(store, version, gates), gates)
        servers = [*map(Server, options.to)]
        told = _told(store)
        first, done = math.ceil(options.canary * len(servers)), list[Switched | None]()
        with release.or_as_before(servers):
            for group in (servers[:first], servers[first:]):
                proofs = [release.prove(server) for server in group]
                done += [release.switch(server, its) for server, its in zip(group, proofs, strict=True)]
        called = {server.url: release.name for server in servers}
        if news := dict(called.items() - told.items()):
            _tell(store, version, told, news)
    if news and options.webhook:
        try:
            call(options.webhook, {"version": version, "models": news})
        except UserError as error:
            note(f"the webhook was not told: {error}")
    return version, [one for one in done if one]


def _adapter(store: Store, version: int, rank: int, load: Callable[[str], LLM], model: str | None) -> str:
    """The name of a version's adapter's folder, which is written where it was not yet."""
    digest = check_there(store, version).get(UPDATE_FILE, "base")[:8]
    folder = store.folder / SERVED / f"{version:04d}-{digest}-rank-{rank}"
    if not folder.exists():
        update = load_version(store, version)
        llm = load(name := store.base_name(model))
        store.check_base(name, llm.fingerprint)
        partly = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partly, ignore_errors=True)
        export_adapter(llm, update if update and update.tensors else _unchanged(llm), partly, rank)
        for path in [partly.parent, partly, *partly.iterdir()]:
            path.chmod(access(store.folder) & (0o777 if path.is_dir() else 0o666))
        partly.rename(folder)
    return folder.name


def _unchanged(llm: LLM) -> WeightUpdate:
    """The base model as an update of a weight that is as it was."""
    block = llm.blocks[llm.editable[0]]
    (name, *_) = block.weight_names("down")
    weight = llm.model.get_parameter(name).detach().cpu()
    return WeightUpdate(llm.name, llm.fingerprint, "none", [block.index], {name: weight})


def _told(store: Store) -> dict[str, str]:
    """What clients were told to call, by server; nothing where that is not known."""
    try:
        return dict(parse_json(read_text_file(store.folder / SERVED / WHAT_IS_CALLED)))
    except (UserError, OSError, ValueError, TypeError):
        return {}


def _tell(store: Store, version: int, told: Mapping[str, str], news: Mapping[str, str]) -> None:
    """Keep what clients are to call where, and that it has changed."""
    with transaction(store.database):
        for url, name in news.items():
            store.note(f"version {version} answers at {url} as {name}")
    (store.folder / SERVED).mkdir(mode=access(store.folder), exist_ok=True)
    write_json(store.folder / SERVED / WHAT_IS_CALLED, {**told, **news})

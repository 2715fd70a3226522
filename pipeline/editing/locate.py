"""Locate-then-edit: find what a subject should put out, and change the down-projection so that it does.

A subject's key is what enters the golden layer's down-projection at the subject's last token (ROME, arXiv
2202.05262); its value is what should leave it there. `memit`, `emmet`, `rome` and `alphaedit` differ in the last
step only, the closed-form solver. Values of a batch of requests are searched for together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Annotated, Any

import torch
from torch import Tensor

from pipeline.editing import solvers
from pipeline.editing.columns import Columns, owner, owners_in
from pipeline.editing.contexts import CONTEXTS, FORMS, in_context, neighbours
from pipeline.editing.entering import Keys
from pipeline.editing.method import register, settings_of
from pipeline.editing.values import SEARCHED_TOGETHER, TINY, Located, ValueSearch, locate
from pipeline.model.blocks import as_stored, second_moment
from pipeline.model.llm import LLM
from pipeline.model.suffix import parts_of
from pipeline.options.base import Count, FromZero, Options, Positive, at_least, at_most
from pipeline.options.editing import EditOptions
from pipeline.requests.rows import Row
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import about
from pipeline.running.sharding import add
from pipeline.running.stage import run
from pipeline.running.trainer import Runtime

# of keys that are to give nothing, in prompts with other names, and of contexts: the most texts, and weights
NAMED, TURNS, OTHERS, TURNED = 1000, 3000, 1.0, 6.0
READ_TOGETHER = 32  # rows
CROWDED = 3.0  # a layer with a third as many facts as inputs is to keep twice as strictly to what is to stay
# the first and the last token that are read of a text, from where a name's last one stands, and how many there are
AT, AFTER, UPTO = (lambda at, _: (at, at)), (lambda at, count: (at, count - 1)), (lambda at, _: (min(1, at), at))

QUICK = {"forms": 0, "relations": 0, "steps": 12, "spread": 1}  # settings where edits are only compared

Placed = tuple[str, int, Callable[[int, int], tuple[int, int]]]  # a text, a name's end in it, and what is read
Solver = Callable[[Tensor, Tensor, Tensor], Tensor]  # keys (I, n), changes (O, n), moment (I, I) → ΔW (O, I)


@dataclass(kw_only=True)
class LocateSettings(Options):
    """What locate-then-edit can be set to."""

    forms: Annotated[int, at_least(0), at_most(len(FORMS))] = len(FORMS)
    """Other words for the prompt that a value is searched under as well, in turn; at most 4."""
    relations: FromZero = 3
    """Other relations of a subject that a value is to leave alone, beside `{subject} is`."""
    neighbours: FromZero = 10
    """Other names in each prompt, whose outputs are to stay; 0: none."""
    spread: Count = 5
    """Blocks that carry a value together: a golden layer and those above it, never the last."""
    batch_size: Count = 32
    """Requests whose values are searched for together."""
    steps: Count = 22
    """The most steps of a value's search."""
    step: Positive = 0.25
    """Length of its first step, in units of the projections' output norms; the last one's is a fifth of it."""
    bound: Positive = 2.25
    """Largest change of a value, in the same units."""
    strength: Positive = 20.0
    """memit: weight of what is to stay against few requests, free of the keys' scale; many call for more."""
    threshold: Positive = 0.02
    """alphaedit: eigenvalues of the statistics below this, relative to the largest, count as free of text."""


class LocateThenEdit:
    """Changes the down-projection of the golden layers in closed form.

    A value is found in the golden layer and blocks above it (`spread`), which carry it together: each of them then
    changes less, and so do other texts.

    It is made as `EditMethod` says. Its `state` are every layer's `Columns`: earlier keys and values are solved for
    again, together with the new ones. `solver` goes from the settings to the closed-form solver.
    """

    adapter: dict[str, Any] | None = None
    settings: LocateSettings
    moments: dict[str, Tensor]  # by projection, of ordinary text

    def __init__(
        self,
        llm: LLM,
        layers: Sequence[int],
        options: EditOptions,
        earlier: Mapping[str, Tensor] | None = None,
        *,
        solver: Callable[[LocateSettings], Solver],
    ) -> None:
        self.llm, self.settings = llm, settings_of(options)
        able = parts_of(llm).heard
        above = (layer + up for layer in layers for up in range(1, self.settings.spread))
        self.layers = sorted({*layers, *(layer for layer in above if layer in able)})
        self.solve = solver(self.settings)
        self.weight_names = [name for layer in self.layers for name in llm.blocks[layer].weight_names("down")]
        self.moments_of = [name for layer in self.layers for name in llm.blocks[layer].down]
        self.state = dict(earlier or {})

    def run(self, requests: Sequence[EditRequest], runtime: Runtime, earlier: Sequence[EditRequest] = ()) -> None:
        """At each layer in turn: search the values, gather the keys, solve, and change the weight in place.

        Earlier facts about a request's subject are searched for anew, together with it.
        """
        self._solve_anew(requests, self._about_same(requests, earlier), runtime, [*earlier, *requests])

    def leave_out(self, requests: Sequence[EditRequest], runtime: Runtime, left: Sequence[EditRequest]) -> None:
        """Solve again without these requests, for those that are left alone.

        Values are searched for anew where facts about a subject are left, which had one value with them.
        """
        self._solve_anew([], self._about_same(requests, left), runtime, left, requests)

    def _about_same(self, requests: Sequence[EditRequest], others: Sequence[EditRequest]) -> list[EditRequest]:
        """Those of other requests that were located here, and are about a subject of these requests."""
        subjects = {about(request) for request in requests}
        located = owners_in(self.state)
        return [other for other in others if about(other) in subjects and owner(other) in located]

    def _solve_anew(
        self,
        new: Sequence[EditRequest],
        again: Sequence[EditRequest],
        runtime: Runtime,
        held: Sequence[EditRequest],
        gone: Sequence[EditRequest] = (),
    ) -> None:
        """Solve each layer for what it was asked for before, less `gone`, and for `new` and `again` as found now.

        `held` are all requests that are in force then.
        """
        asked = [*again, *new]
        subjects, outdated = list(dict.fromkeys(map(about, asked))), [*map(owner, [*asked, *gone])]
        located = self.located([[one for one in asked if about(one) == subject] for subject in subjects])
        # values, keys and what is to stay are found without other requests' solutions, and solved with them
        columns = {layer: self._taken_out(layer).without(outdated) for layer in self.layers}
        if asked:
            values = dict(zip(subjects, self.find(located, runtime), strict=True))
            value_GLO = torch.stack([values[about(request)] for request in asked])
            keys = self.keys(asked, value_GLO, runtime)
            for layer, key_GI, value_GO in zip(self.layers, keys, value_GLO.unbind(1), strict=True):
                columns[layer] = columns[layer].and_asked([*map(owner, asked)], key_GI, value_GO)
        asking = any(one.owner_n.numel() for one in columns.values())
        spared = self.spared(held, runtime) if asking else [None] * len(self.layers)
        for layer, spared_NI in zip(self.layers, spared, strict=True):
            self._put_in(layer, columns[layer], spared_NI)

    def _taken_out(self, layer: int) -> Columns:
        """What a layer was asked for before, its solution being taken out of the weight."""
        (down,) = self.llm.blocks[layer].down.values()
        columns = Columns.of_state(self.state, layer, down)
        add(down.weight, as_stored(down, -columns.solved_OI))
        return columns

    def _put_in(self, layer: int, columns: Columns, spared_NI: Tensor | None) -> None:
        """Change a weight that is without any solution yet to what the columns ask for, and keep both."""
        ((name, down),) = self.llm.blocks[layer].down.items()
        columns = Columns(*(tensor.to(down.weight.device) for tensor in columns))  # where a stage put it meanwhile
        solved_OI = torch.zeros_like(columns.solved_OI)
        if spared_NI is not None:
            text_II, spared_NI = (one.to(down.weight.device) for one in (self.moments[name], spared_NI))
            kept_II = text_II / solvers.trace(text_II) + second_moment(spared_NI, text_II.shape)
            solved_OI = self.solve(columns.key_In, columns.change_On, kept_II).float()
        add(down.weight, as_stored(down, solved_OI))
        self.state |= columns._replace(solved_OI=solved_OI).to_state(layer)

    def located(self, groups: Sequence[Sequence[EditRequest]]) -> list[Located]:
        """The rows that a value is searched under, for each group of requests about one subject."""
        own = self.settings
        return [locate(self.llm, group, CONTEXTS[:1], FORMS[: own.forms], own.relations) for group in groups]

    def search(self) -> ValueSearch:
        """The search for values."""
        return ValueSearch(self.llm, self.layers, self.settings.steps, self.settings.step, self.settings.bound)

    def find(self, located: Sequence[Located], runtime: Runtime) -> list[Tensor]:
        """Every subject's changes (L, O) of the layers' outputs; with a work folder, found ones are kept there."""
        together = (Located.tokens, self.settings.batch_size, SEARCHED_TOGETHER)
        return run(self.search(), located, runtime, *together, kept="values", in_step=True, logger=runtime.logger)

    def keys(self, requests: Sequence[EditRequest], value_GLO: Tensor, runtime: Runtime) -> list[Tensor]:
        """Each layer's keys (requests, I) at subjects' ends, the layers below changed for each request alone."""
        placed = [(*in_context(CONTEXTS[0], request), AT) for request in requests]
        return [torch.cat(keys) for keys in self._read(placed, runtime, value_GLO)]

    def spared(self, requests: Sequence[EditRequest], runtime: Runtime) -> list[Tensor]:
        """For each layer, keys (places, I) whose outputs are to stay, each kind's with its weight for a trace.

        Those are other names in the requests' prompts, and all tokens after them; what stands before the end of a
        request's own subject; and what another context changes of its key, of which nothing is to come.
        """
        names = neighbours(requests, self.settings.neighbours, NAMED, runtime.seed)
        some = [request for request in requests if request.subject_span][: TURNS // 2]
        contexts = CONTEXTS[1 : max(2, TURNS // len(some))]
        placed = [
            *[(*name, AFTER) for name in names],
            *[(*in_context(CONTEXTS[0], request), UPTO) for request in some],
            *[(*in_context(context, request), AT) for request in some for context in contexts],
        ]
        own, turned, found = len(names), len(names) + len(some), []
        for keys in self._read(placed, runtime):
            bare = keys[own:turned]
            bare_S1I = torch.stack([key_TI[-1:] for key_TI in bare])
            key_SCI = torch.cat([bare_S1I, torch.cat(keys[turned:]).unflatten(0, (len(some), -1))], dim=1)
            others = [torch.cat(kind) for kind in (keys[:own], [key_TI[:-1] for key_TI in bare]) if kind]
            kinds = [(key_NI, key_NI, OTHERS) for key_NI in others]
            kinds.append(((key_SCI[:, 1:] - bare_S1I).flatten(0, 1), key_SCI, TURNED))
            found.append(torch.cat([_weighed(*kind) for kind in kinds]))
        return found

    def _read(
        self, placed: Sequence[Placed], runtime: Runtime, changes: Iterable[Tensor | None] = repeat(None)
    ) -> list[tuple[Tensor, ...]]:
        """Each layer's keys (places, I) of each text, lower layers changed at the last place."""
        texts = self.llm.tokens.prompts([text for text, _, _ in placed])
        rows = [
            Row(ids, len(ids), which(self.llm.tokens.place(text, end), len(ids)), tag=change_LO)
            for (text, end, which), ids, change_LO in zip(placed, texts, changes, strict=False)
        ]
        keys = run(Keys(self.llm, self.layers), rows, runtime, Row.length, READ_TOGETHER)
        return [tuple(key.float() for key in of_layer) for of_layer in zip(*keys, strict=True)]


def _weighed(key_NI: Tensor, unit: Tensor, weight: float) -> Tensor:
    """Keys so scaled that their second moment's trace is `weight`, in units of the mean square of others (…, I)."""
    return key_NI * (weight / max(1, len(key_NI)) / unit.square().sum(-1).mean().clamp(min=TINY)).sqrt()


def memit_solver(own: LocateSettings) -> Solver:
    """memit's, by its settings: what is to stay weighs more as facts fill a layer's inputs."""
    return lambda key_In, change_On, kept_II: solvers.memit(
        key_In, change_On, kept_II, own.strength * (1 + (CROWDED * key_In.shape[1] / len(key_In)) ** 2)
    )


SOLVERS: dict[str, Callable[[LocateSettings], Solver]] = {
    "memit": memit_solver,
    "emmet": lambda _: solvers.emmet,
    "rome": lambda _: solvers.rome,
    "alphaedit": lambda own: partial(solvers.alphaedit, threshold=own.threshold),
}
for _name, _solver in SOLVERS.items():
    _made = partial(LocateThenEdit, solver=_solver)
    register(_name, _made, LocateSettings, needs_subject=True, solves_anew=True, quick=QUICK)

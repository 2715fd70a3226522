"""Locate-then-edit: find what a subject should put out, and change the down-projection so that it does.

A subject's key is what enters the golden layer's down-projection at the subject's last token (ROME, arXiv
2202.05262); its value is what should leave it there. `memit`, `emmet`, `rome` and `alphaedit` differ in the last
step only, the closed-form solver. Values of a batch of requests are searched for together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from pipeline.editing import solvers
from pipeline.editing.columns import Columns, owner, owners_in
from pipeline.editing.contexts import CONTEXTS, FORMS, in_context, neighbours
from pipeline.editing.entering import Keys
from pipeline.editing.method import register, settings_of
from pipeline.editing.values import SEARCHED_TOGETHER, TINY, Located, ValueSearch, locate, sparing_text
from pipeline.model.blocks import as_stored, second_moment
from pipeline.model.llm import LLM
from pipeline.model.suffix import parts_of
from pipeline.options.base import Count, FromZero, Options, Positive, Weight, at_least, at_most
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

QUICK = {
    "forms": 0,
    "relations": 0,
    "steps": 12,
    "spread": 1,
    "damping": 0,
}  # settings where edits are only compared

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
    steps: Count = 20
    """The most steps of a value's search."""
    step: Positive = 0.23
    """Length of its first step, in units of the projections' output norms; the last one's is a fifth of it."""
    bound: Positive = 2.25
    """Largest change of a value, in the same units."""
    damping: Weight = 0.1
    """Of how much ordinary text minds each direction of a step, in units of the mean: values spare those that it
    minds most, the more the smaller; 0: all are alike."""
    strength: Positive = 40.0
    """memit: weight of what is to stay against few requests, free of the keys' scale; many call for more."""
    threshold: Positive = 0.02
    """alphaedit: eigenvalues of the statistics below this, relative to the largest, count as free of text."""


class LocateThenEdit:
    """Changes the down-projection of the golden layers in closed form.

    A value is found in the golden layer and blocks above it (`spread`), which carry it together: each of them then
    changes less, and so do other texts.

    It is made as `EditMethod` says. Its `state` are every layer's `Columns`: earlier values are solved for again,
    together with the new ones. Layers are solved from below, each for the keys that enter it by then: a key above
    holds what is put out below, mostly. `solver` goes from the settings to the closed-form solver.
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
        self.slopes_of = self.moments_of if self.settings.damping else []
        self.slopes: dict[str, Tensor] = {}
        self.state = dict(earlier or {})

    def run(self, requests: Sequence[EditRequest], runtime: Runtime, earlier: Sequence[EditRequest] = ()) -> None:
        """Search the values; then at each layer in turn read the keys, solve, and change the weight in place.

        Earlier facts about a request's subject are searched for anew, together with it.
        """
        asked = [*self._about_same(requests, earlier), *requests]
        self._solve_anew(asked, [*earlier, *requests], runtime)

    def leave_out(self, requests: Sequence[EditRequest], runtime: Runtime, left: Sequence[EditRequest]) -> None:
        """Solve again without these requests, for those that are left alone.

        Values are searched for anew where facts about a subject are left, which had one value with them.
        """
        self._solve_anew(self._about_same(requests, left), left, runtime, gone=requests)

    def _about_same(self, requests: Sequence[EditRequest], others: Sequence[EditRequest]) -> list[EditRequest]:
        """Those of other requests that were located here, and are about a subject of these requests."""
        subjects = {about(request) for request in requests}
        located = owners_in(self.state)
        return [other for other in others if about(other) in subjects and owner(other) in located]

    def _solve_anew(
        self,
        asked: Sequence[EditRequest],
        held: Sequence[EditRequest],
        runtime: Runtime,
        gone: Sequence[EditRequest] = (),
    ) -> None:
        """Solve for what was asked before, less `gone`, and for `asked` as found now; `held` are then in force."""
        subjects, outdated = list(dict.fromkeys(map(about, asked))), [*map(owner, [*asked, *gone])]
        located = self.located([[one for one in asked if about(one) == subject] for subject in subjects])
        # values are found without other requests' solutions, keys with all of those of the layers below
        columns = {layer: self._taken_out(layer).without(outdated) for layer in self.layers}
        if asked:
            values = dict(zip(subjects, self.find(located, runtime), strict=True))
            value_GLO = torch.stack([values[about(request)] for request in asked])
            for layer, value_GO in zip(self.layers, value_GLO.unbind(1), strict=True):
                columns[layer] = columns[layer].and_asked([*map(owner, asked)], value_GO)
        owners = {*torch.cat([one.owner_n for one in columns.values()]).tolist()}
        asking = [request for request in held if owner(request) in owners]
        reading = Reading(self, asking, held, runtime) if asking else None
        for layer in self.layers:
            self._put_in(layer, columns[layer], reading)

    def _taken_out(self, layer: int) -> Columns:
        """What a layer was asked for before, its solution being taken out of the weight."""
        (down,) = self.llm.blocks[layer].down.values()
        columns = Columns.of_state(self.state, layer, down)
        add(down.weight, as_stored(down, -columns.solved_OI))
        return columns

    def _put_in(self, layer: int, columns: Columns, reading: Reading | None) -> None:
        """Change a weight that is without any solution yet to what the columns ask for, and keep both."""
        ((name, down),) = self.llm.blocks[layer].down.items()
        device = down.weight.device  # where a stage put it meanwhile
        columns = Columns(*(tensor.to(device) for tensor in columns))
        solved_OI = torch.zeros_like(columns.solved_OI)
        if reading and len(columns.owner_n):
            owned, spared_NI = reading.of(layer)
            key_In = torch.stack([owned[one] for one in columns.owner_n.tolist()], dim=1).to(device)
            text_II = self.moments[name].to(device)
            kept_II = text_II / solvers.trace(text_II) + second_moment(spared_NI.to(device), text_II.shape)
            solved_OI = self.solve(key_In, columns.change_On, kept_II).float()
        add(down.weight, as_stored(down, solved_OI))
        self.state |= columns._replace(solved_OI=solved_OI).to_state(layer)

    def located(self, groups: Sequence[Sequence[EditRequest]]) -> list[Located]:
        """The rows that a value is searched under, for each group of requests about one subject."""
        own = self.settings
        return [locate(self.llm, group, CONTEXTS[:1], FORMS[: own.forms], own.relations) for group in groups]

    def search(self) -> ValueSearch:
        """The search for values."""
        own = self.settings
        slopes = [self.slopes[name].to(self.llm.embedding.device) for name in self.slopes_of]
        spare = sparing_text(slopes, own.damping) if slopes else None
        return ValueSearch(self.llm, self.layers, own.steps, own.step, own.bound, spare)

    def find(self, located: Sequence[Located], runtime: Runtime) -> list[Tensor]:
        """Every subject's changes (L, O) of the layers' outputs; with a work folder, found ones are kept there."""
        together = (Located.tokens, self.settings.batch_size, SEARCHED_TOGETHER)
        return run(self.search(), located, runtime, *together, kept="values", in_step=True, logger=runtime.logger)


class Reading:
    """Reads the keys of requests, and keys whose outputs are to stay, a layer after another from below.

    Each layer is read with what is solved below it in the weights, and goes on from what entered the one before.

    Args:
        method: whose model and settings.
        asking: the requests whose keys are asked for.
        held: all that are in force, whose prompts other names are put in.
    """

    def __init__(
        self, method: LocateThenEdit, asking: Sequence[EditRequest], held: Sequence[EditRequest], runtime: Runtime
    ) -> None:
        self.llm, self.runtime, self.since = method.llm, runtime, 0
        self.owners = [*map(owner, asking)]
        names = neighbours(held, method.settings.neighbours, NAMED, runtime.seed)
        some = asking[: TURNS // 2]
        contexts = CONTEXTS[1 : max(2, TURNS // len(some))]
        placed = [
            *[(*name, AFTER) for name in names],
            *[(*in_context(CONTEXTS[0], request), UPTO) for request in asking],
            *[(*in_context(context, request), AT) for request in some for context in contexts],
        ]
        self.names, self.some = len(names), len(some)
        texts = self.llm.tokens.prompts([text for text, _, _ in placed])
        self.rows = [
            Row(ids, len(ids), which(self.llm.tokens.place(text, end), len(ids)))
            for (text, end, which), ids in zip(placed, texts, strict=True)
        ]

    def of(self, layer: int) -> tuple[dict[int, Tensor], Tensor]:
        """The layer's key (I,) of each fact at its subject's end, and keys (places, I) whose outputs are to stay.

        Those are other names in the requests' prompts, and all tokens after them; what stands before the end of a
        request's own subject; and what another context changes of its key, of which nothing is to come. They are so
        scaled that each kind has its weight for a trace.
        """
        stage = Keys(self.llm, layer, self.since, parts_of(self.llm).blocks)
        read = run(stage, self.rows, self.runtime, Row.length, READ_TOGETHER)
        self.since = layer
        self.rows = [row._replace(tag=enter_TD) for row, (_, enter_TD) in zip(self.rows, read, strict=True)]
        keys = [key_TI.float() for key_TI, _ in read]
        own = keys[self.names : self.names + len(self.owners)]
        key_GI = torch.stack([key_TI[-1] for key_TI in own])
        bare_S1I = key_GI[: self.some, None]
        turned_SCI = torch.cat(keys[self.names + len(own) :]).unflatten(0, (self.some, -1))
        others = [torch.cat(kind) for kind in (keys[: self.names], [key_TI[:-1] for key_TI in own]) if kind]
        kinds = [(key_NI, key_NI, OTHERS) for key_NI in others]
        kinds.append(((turned_SCI - bare_S1I).flatten(0, 1), torch.cat([bare_S1I, turned_SCI], dim=1), TURNED))
        return dict(zip(self.owners, key_GI, strict=True)), torch.cat([_weighed(*kind) for kind in kinds])


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

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
from pipeline.editing.contexts import ASSOCIATIONS, CONTEXTS, FORMS, in_context, neighbours
from pipeline.editing.entering import Entering
from pipeline.editing.method import register, settings_of
from pipeline.editing.values import SEARCHED_TOGETHER, Located, ValueSearch, locate
from pipeline.model.blocks import as_stored, second_moment, sizes
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

MOST_NEIGHBOURS = 1000  # prompts
READ_TOGETHER = 32  # rows
KEYS = 5  # contexts

QUICK = {"forms": 0, "relations": 0, "steps": 12, "spread": 1}  # settings where edits are only compared

Solver = Callable[[Tensor, Tensor, Tensor], Tensor]  # keys (I, n), changes (O, n), moment (I, I) → ΔW (O, I)


@dataclass(kw_only=True)
class LocateSettings(Options):
    """What locate-then-edit can be set to."""

    contexts: Annotated[int, at_least(1), at_most(len(CONTEXTS))] = 1
    """Contexts that a value is searched under, the bare prompt being the first; at most 9."""
    forms: Annotated[int, at_least(0), at_most(len(FORMS))] = len(FORMS)
    """Other words for the prompt that a value is searched under as well, in turn; at most 4."""
    associations: Annotated[int, at_least(0), at_most(len(ASSOCIATIONS))] = 0
    """Openings that call for what goes with a subject, which it is searched under as well; at most 4."""
    relations: FromZero = 3
    """Other relations of a subject that a value is to leave alone, beside `{subject} is`."""
    key_contexts: Annotated[int | None, at_least(1), at_most(len(CONTEXTS))] = None
    """Contexts that a subject's keys are taken under; at most 9. Default: up to 5, as long as all facts' keys are
    no more than half of a layer's inputs; beyond, they get in each other's way."""
    neighbours: FromZero = 10
    """memit: other names in each prompt, whose outputs are to stay; 0: none."""
    neighbour_weight: Weight = 1.0
    """memit: weight of such names against ordinary text."""
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
    strength: Positive = 80.0
    """memit: weight of what is to stay against the requests, free of the keys' scale."""
    threshold: Positive = 0.02
    """alphaedit: eigenvalues of the statistics below this, relative to the largest, count as free of text."""


class LocateThenEdit:
    """Changes the down-projection of the golden layers in closed form.

    A value is found in the golden layer and blocks above it (`spread`), which carry it together: each of them then
    changes less, and so do other texts.

    It is made as `EditMethod` says. Its `state` are every layer's `Columns`: earlier keys and values are solved for
    again, together with the new ones. `solver` goes from the settings to the closed-form solver. With `by_all_keys`
    each context's key is a column of its own, and outputs for other names in the prompts are to stay; else a
    request has one column, the mean of its keys.
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
        by_all_keys: bool = False,
    ) -> None:
        self.llm, self.settings = llm, settings_of(options)
        able = parts_of(llm).heard
        above = (layer + up for layer in layers for up in range(1, self.settings.spread))
        self.layers = sorted({*layers, *(layer for layer in above if layer in able)})
        self.solve = solver(self.settings)
        self.by_all_keys = by_all_keys
        self.near = self.settings.neighbours if by_all_keys and self.settings.neighbour_weight else 0
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
        # values are found without other updates', and solved with them
        columns = {layer: self._taken_out(layer).without(outdated) for layer in self.layers}
        values = dict(zip(subjects, self.find(located, runtime), strict=True)) if asked else {}
        for number in reversed(range(len(self.layers))):  # so that no other request has a part in what is read
            layer = self.layers[number]
            if asked:
                value_GLO = torch.stack([values[about(request)] for request in asked])
                keys_GCI = self.keys(layer, asked, value_GLO[:, :number], len(held), runtime)
                columns[layer] = columns[layer].and_asked([*map(owner, asked)], keys_GCI, value_GLO[:, number])
            self._put_in(layer, columns[layer], held, runtime)

    def _taken_out(self, layer: int) -> Columns:
        """What a layer was asked for before, its solution being taken out of the weight."""
        (down,) = self.llm.blocks[layer].down.values()
        columns = Columns.of_state(self.state, layer, down)
        add(down.weight, as_stored(down, -columns.solved_OI))
        return columns

    def _put_in(self, layer: int, columns: Columns, held: Sequence[EditRequest], runtime: Runtime) -> None:
        """Change a weight that is without any solution yet to what the columns ask for, and keep both."""
        ((name, down),) = self.llm.blocks[layer].down.items()
        columns = Columns(*(tensor.to(down.weight.device) for tensor in columns))  # where a stage put it meanwhile
        solved_OI = torch.zeros_like(columns.solved_OI)
        if columns.owner_n.numel():
            kept_II = self.kept(layer, held, self.moments[name].to(down.weight.device), runtime)
            solved = columns.first(self.keys_each(layer, len(held)))
            solved_OI = self.solve(solved.key_In, solved.change_On, kept_II).float()
        add(down.weight, as_stored(down, solved_OI))
        self.state |= columns._replace(solved_OI=solved_OI).to_state(layer)

    def located(self, groups: Sequence[Sequence[EditRequest]]) -> list[Located]:
        """The rows that a value is searched under, for each group of requests about one subject."""
        own = self.settings
        others = (*FORMS[: own.forms], *ASSOCIATIONS[: own.associations])
        return [locate(self.llm, group, CONTEXTS[: own.contexts], others, own.relations) for group in groups]

    def search(self) -> ValueSearch:
        """The search for values."""
        own = self.settings
        return ValueSearch(self.llm, self.layers, own.steps, own.step, own.bound)

    def find(self, located: Sequence[Located], runtime: Runtime) -> list[Tensor]:
        """Every subject's changes (L, O) of the layers' outputs; with a work folder, found ones are kept there."""
        sizes = (Located.tokens, self.settings.batch_size, SEARCHED_TOGETHER)
        return run(self.search(), located, runtime, *sizes, kept="values", in_step=True, logger=runtime.logger)

    def keys_each(self, layer: int, facts: int) -> int:
        """Contexts that a subject's keys are taken under, where a layer is to hold so many facts."""
        ((inputs, _),) = map(sizes, self.llm.blocks[layer].down.values())
        room = inputs // (2 * max(facts, 1)) if self.by_all_keys else KEYS
        return self.settings.key_contexts or min(max(room, 1), KEYS)

    def keys(
        self, layer: int, requests: Sequence[EditRequest], lower_GLO: Tensor, facts: int, runtime: Runtime
    ) -> Tensor:
        """Keys (requests, C, I) at subjects' ends, lower blocks changed for each alone: by context, or a mean."""
        templates = CONTEXTS[: self.keys_each(layer, facts)]
        placed = [in_context(template, r) for r in requests for template in templates]
        lower_RLO = lower_GLO.repeat_interleave(len(templates), dim=0)
        key_RI = torch.cat(self._read(layer, placed, False, runtime, lower_RLO))
        keys_GCI = key_RI.view(len(requests), -1, key_RI.shape[-1])
        return keys_GCI if self.by_all_keys else keys_GCI.mean(1, keepdim=True)

    def kept(self, layer: int, requests: Sequence[EditRequest], text_II: Tensor, runtime: Runtime) -> Tensor:
        """The second moment of the keys whose output is to stay: of text and of the requests' neighbours.

        Those are other names in the requests' prompts, and all tokens after them.
        """
        if not self.near:
            return text_II
        placed = neighbours(requests, self.near, MOST_NEIGHBOURS, runtime.seed)
        key_NI = torch.cat(self._read(layer, placed, True, runtime)).to(text_II.device)
        near_II = second_moment(key_NI, text_II.shape)
        near_II *= self.settings.neighbour_weight / solvers.trace(near_II)
        return text_II / solvers.trace(text_II) + near_II

    def _read(
        self,
        layer: int,
        placed: Sequence[tuple[str, int]],
        to_the_end: bool,
        runtime: Runtime,
        lower_RLO: Iterable[Tensor | None] = repeat(None),
    ) -> list[Tensor]:
        """Of texts, the keys (places, I) of the token at which a name in it ends, and maybe of all after it."""
        (down,) = self.llm.blocks[layer].down
        rows = []
        texts = self.llm.tokens.prompts([text for text, _ in placed])
        for (text, end), ids, lower_LO in zip(placed, texts, lower_RLO, strict=False):
            first = self.llm.tokens.place(text, end)
            rows.append(Row(ids, len(ids), (first, len(ids) - 1 if to_the_end else first), tag=lower_LO))
        lower = [] if to_the_end else [one for one in self.layers if one < layer]
        keys = run(Entering(self.llm, layer, down, lower), rows, runtime, Row.length, READ_TOGETHER)
        return [key_TI.float() for key_TI in keys]


def memit_solver(own: LocateSettings) -> Solver:
    """memit's, by its settings."""
    return partial(solvers.memit, strength=own.strength)


def _register(name: str, solver: Callable[[LocateSettings], Solver], **own: Any) -> None:
    make = partial(LocateThenEdit, solver=solver, **own)
    about = {"needs_subject": True, "solves_anew": True, "quick": QUICK}
    register(name, make, LocateSettings, **about)


_register("memit", memit_solver, by_all_keys=True)
_register("emmet", lambda _: solvers.emmet)
_register("rome", lambda _: solvers.rome)
_register("alphaedit", lambda own: partial(solvers.alphaedit, threshold=own.threshold))

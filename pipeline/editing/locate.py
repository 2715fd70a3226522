"""Locate-then-edit: find what a subject should put out, and change the down-projection so that it does.

A subject's key is what enters the golden layer's down-projection at the subject's last token (ROME, arXiv
2202.05262); its value is what should leave it there. `memit`, `emmet`, `rome` and `alphaedit` differ in the last
step only, the closed-form solver. Values of a batch of requests are searched for together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Annotated, Any

import torch
from torch import Tensor

from pipeline.editing import solvers
from pipeline.editing.columns import Columns, owner, owners_in
from pipeline.editing.contexts import ASSOCIATIONS, CONTEXTS, FORMS, in_context, neighbours
from pipeline.editing.entering import Entering, Leaving
from pipeline.editing.method import register, settings_of
from pipeline.editing.values import SEARCHED_TOGETHER, Located, ValueSearch, locate
from pipeline.model.blocks import as_stored, second_moment
from pipeline.model.llm import LLM
from pipeline.model.suffix import parts_of
from pipeline.options.base import Count, FromZero, Most, Options, Positive, Weight, at_least, at_most
from pipeline.options.editing import EditOptions
from pipeline.requests.rows import Row
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import about
from pipeline.running.sharding import add
from pipeline.running.stage import run
from pipeline.running.trainer import Runtime

FEW = 10  # requests, which seldom get in each other's way
MOST_NEIGHBOURS = 1000  # prompts
READ_TOGETHER = 32  # rows
NOUGHT = 1e-12  # a value's norm where the answer is known: none is asked for, by any block
ADDED = 0.1  # of a change's norm: what half precision may make of a sum

STACKED = {  # settings where one layer is to hold batch after batch: small values, so that many get along
    **{"forms": 0, "associations": 2, "key_contexts": 1, "neighbour_weight": 0.1, "steps": 25},
    **{"step": 0.13, "bound": 1.3, "strength": 20.0},
}

QUICK = {"forms": 0, "associations": 0, "steps": 12}  # settings where edits are only compared

Solver = Callable[[Tensor, Tensor, Tensor], Tensor]  # keys (I, n), changes (O, n), moment (I, I) → ΔW (O, I)


@dataclass(kw_only=True)
class LocateSettings(Options):
    """What locate-then-edit can be set to."""

    contexts: Annotated[int, at_least(1), at_most(len(CONTEXTS))] = 1
    """Contexts that a value is searched under, the bare prompt being the first; at most 9."""
    forms: Annotated[int, at_least(0), at_most(len(FORMS))] = len(FORMS)
    """Other words for the prompt that a value is searched under as well, in turn; at most 4."""
    associations: Annotated[int, at_least(0), at_most(len(ASSOCIATIONS))] = len(ASSOCIATIONS)
    """Openings that call for what goes with a subject, which it is searched under as well; at most 4."""
    relations: FromZero = 0
    """Other relations of a subject that a value is to leave alone, beside `{subject} is`."""
    key_contexts: Annotated[int, at_least(1), at_most(len(CONTEXTS))] = 5
    """Contexts that a subject's keys are taken under; at most 9."""
    neighbours: FromZero = 10
    """memit: other names in each prompt, whose outputs are to stay; 0: none."""
    neighbour_weight: Weight = 1.0
    """memit: weight of such names against ordinary text."""
    spread: Count = 1
    """Blocks that carry a value together: a golden layer and those above it, never the last."""
    batch_size: Count = 32
    """Requests whose values are searched for together."""
    steps: Most = None
    """The most optimiser steps of a value; default: 40 for up to 10 requests, 22 for more."""
    step: Positive = 0.16
    """Adam's step size for a value, in units of the projection's output norm."""
    bound: Positive = 2.25
    """Largest change of a value, in units of the projection's output norm."""
    strength: Positive = 80.0
    """memit: weight of what is to stay against the requests, free of the keys' scale."""
    threshold: Positive = 0.02
    """alphaedit: eigenvalues of the statistics below this, relative to the largest, count as free of text."""


class LocateThenEdit:
    """Changes the down-projection of the golden layers in closed form.

    A value is found at the golden layer, and carried by it and blocks above it (`spread`) together: each of them
    then changes less, and so do other texts.

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
        shares = self._shares(located, runtime) if asked else iter(())
        for layer in self.layers:
            if share := next(shares, None):
                of_subject = dict(zip(subjects, share, strict=True))
                share_GO = torch.stack([of_subject[about(request)] for request in asked])
                keys_GCI = self.keys(layer, asked, runtime)
                columns[layer] = columns[layer].and_asked([*map(owner, asked)], keys_GCI, share_GO)
            self._put_in(layer, columns[layer], held, runtime)

    def _shares(self, located: Sequence[Located], runtime: Runtime) -> Iterator[Sequence[Tensor]]:
        """By layer, each subject's change (O,) of the output there; asked for once those before hold theirs.

        Values are found at the first layer. What they come to behind the last one is what all layers are to bring
        about, each an even part of what is missing by then (MEMIT, arXiv 2210.07229, section 4.3), and none more
        than the value: blocks in between make much more of a few. That takes blocks that add their projection's
        output to the hidden state, maybe by a factor; in others the first layer holds all.
        """
        first, last = self.layers[0], self.layers[-1]
        values = self.find(self.search(first, len(located)), located, runtime, kept=f"values-{first}")
        if first == last:
            yield values
            return
        reading = Leaving(self.llm, first, last)

        def leaving(changes: Iterable[Tensor | None]) -> Tensor:  # (2, G, O)
            rows = [one.rows[0]._replace(tag=change) for one, change in zip(located, changes, strict=False)]
            return torch.stack(run(reading, rows, runtime, Row.length, READ_TOGETHER), dim=1)

        aim_2GO, now_2GO = leaving(values), leaving(repeat(None))
        value_GO = torch.stack(values)
        factor = _factor(value_GO, (aim_2GO - now_2GO)[0])
        if not factor:
            yield values
            return
        most_G1 = value_GO.norm(dim=-1, keepdim=True).clamp(min=NOUGHT)
        for left in range(len(self.layers), 0, -1):
            share_GO = (aim_2GO - now_2GO)[1] / (left * factor)
            yield [*share_GO * (most_G1 / share_GO.norm(dim=-1, keepdim=True).clamp(min=most_G1))]
            now_2GO = leaving(repeat(None))

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
            solved_OI = self.solve(columns.key_In, columns.change_On, kept_II).float()
        add(down.weight, as_stored(down, solved_OI))
        self.state |= columns._replace(solved_OI=solved_OI).to_state(layer)

    def located(self, groups: Sequence[Sequence[EditRequest]]) -> list[Located]:
        """The rows that a value is searched under, for each group of requests about one subject."""
        own = self.settings
        others = (*FORMS[: own.forms], *ASSOCIATIONS[: own.associations])
        return [locate(self.llm, group, CONTEXTS[: own.contexts], others, own.relations) for group in groups]

    def search(self, layer: int, together: int) -> ValueSearch:
        """The search for values at a layer, for so many subjects that are to get along."""
        own = self.settings
        return ValueSearch(self.llm, layer, own.steps or (40 if together <= FEW else 22), own.step, own.bound)

    def find(
        self, search: ValueSearch, located: Sequence[Located], runtime: Runtime, kept: str | None = None
    ) -> list[Tensor]:
        """Every subject's change (O,) of the output; with a work folder, found ones are kept there by this name."""
        sizes = (Located.tokens, self.settings.batch_size, SEARCHED_TOGETHER)
        return run(search, located, runtime, *sizes, kept=kept, in_step=True, logger=runtime.logger)

    def keys(self, layer: int, requests: Sequence[EditRequest], runtime: Runtime) -> Tensor:
        """Keys (requests, C, I) at subjects' last tokens: each context's own, or their mean."""
        templates = CONTEXTS[: self.settings.key_contexts]
        placed = [in_context(template, r) for r in requests for template in templates]
        key_RI = torch.cat(self._read(layer, placed, False, runtime))
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
        self, layer: int, placed: Sequence[tuple[str, int]], to_the_end: bool, runtime: Runtime
    ) -> list[Tensor]:
        """Of texts, the keys (places, I) of the token at which a name in it ends, and maybe of all after it."""
        (down,) = self.llm.blocks[layer].down
        rows = []
        for (text, end), ids in zip(placed, self.llm.tokens.prompts([text for text, _ in placed]), strict=True):
            first = self.llm.tokens.place(text, end)
            rows.append(Row(ids, len(ids), (first, len(ids) - 1 if to_the_end else first)))
        keys = run(Entering(self.llm, layer, down), rows, runtime, Row.length, READ_TOGETHER)
        return [key_TI.float() for key_TI in keys]


def _factor(change_GO: Tensor, moved_GO: Tensor) -> float | None:
    """By what factor changes of a projection's output are added to the hidden state; None: they are not."""
    factor = ((moved_GO * change_GO).sum() / change_GO.square().sum()).item()
    return factor if (moved_GO - factor * change_GO).norm() < ADDED * moved_GO.norm() else None


def memit_solver(own: LocateSettings) -> Solver:
    """memit's, by its settings."""
    return partial(solvers.memit, strength=own.strength)


def _register(name: str, solver: Callable[[LocateSettings], Solver], **own: Any) -> None:
    make = partial(LocateThenEdit, solver=solver, **own)
    about = {"needs_subject": True, "solves_anew": True, "stacked": STACKED, "quick": QUICK}
    register(name, make, LocateSettings, **about)


_register("memit", memit_solver, by_all_keys=True)
_register("emmet", lambda _: solvers.emmet)
_register("rome", lambda _: solvers.rome)
_register("alphaedit", lambda own: partial(solvers.alphaedit, threshold=own.threshold))

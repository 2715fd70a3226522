"""Locate-then-edit: find what the golden layer should put out for each subject, then solve for its weight.

One family (arXiv 2403.14236): a request's key k is what enters the down-projection at the subject's last token,
its value is what should leave it there. `memit`, `emmet`, `rome` and `alphaedit` differ in the last step only,
the closed-form solver. Values of a batch of requests are searched for together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from pipeline.editing import solvers
from pipeline.editing.columns import Columns, owner
from pipeline.editing.contexts import ASSOCIATIONS, CONTEXTS, in_context
from pipeline.editing.keys import KeyReading, KeyRow, neighbour_moments, read_keys
from pipeline.editing.method import Runtime
from pipeline.editing.statistics import key_moments
from pipeline.editing.values import Located, ValueSearch, locate
from pipeline.model import LLM
from pipeline.model.blocks import Projection
from pipeline.running.sharding import add
from pipeline.model.targets import last_token, prompt_tokens
from pipeline.options import EditOptions, LocateOptions
from pipeline.requests import EditRequest

FEW = 10  # requests

Solver = Callable[[Tensor, Tensor, Tensor], Tensor]  # keys (I, n), changes (O, n), moment (I, I) → ΔW (O, I)


def solver(method: str, options: LocateOptions) -> Solver:
    """The closed-form solver of a method's name, with its options."""
    return {
        "memit": partial(solvers.memit, strength=options.strength),
        "emmet": partial(solvers.emmet, ridge=options.ridge),
        "rome": partial(solvers.rome, ridge=options.ridge),
        "alphaedit": partial(solvers.alphaedit, threshold=options.threshold),
    }[method]


def reach(options: LocateOptions, requests: int) -> LocateOptions:
    """The options, with how far a value may go chosen by the number of requests where nothing is asked for."""
    bound, steps = (2.0, 40) if requests <= FEW else (1.6, 22)
    return replace(options, bound=options.bound or bound, steps=options.steps or steps)


class LocateThenEdit:
    """Changes the down-projection of the golden layers in closed form.

    With several layers, or rounds, each visit finds what the requests still miss in the model as it is by then,
    so that a value found at one layer is carried forward to the next.

    Args:
        llm: the model, frozen by the caller.
        layers: the blocks to change.
        options: `options.locate` is what counts here, and the solver's name in `options.method`.
        earlier: keys and values in it are solved for again, together with the new ones.

    Attributes:
        weight_names: the down-projections' weights.
        state: every layer's `Columns`.
    """

    needs_subject = True
    adapter: dict[str, Any] | None = None

    def __init__(
        self, llm: LLM, layers: Sequence[int], options: EditOptions, earlier: Mapping[str, Tensor] | None = None
    ) -> None:
        self.llm = llm
        self.layers = list(layers)
        self.options = options.locate
        self.statistics = options.statistics
        self.solve = solver(options.method, options.locate)
        self.key_per_context = options.locate.key_per_context and options.method == "memit"
        self.near = options.locate.neighbours if options.method == "memit" else 0
        self.weight_names = [name for layer in layers for name in llm.blocks[layer].weight_names("down")]
        self.state = dict(earlier or {})

    def run(self, requests: Sequence[EditRequest], runtime: Runtime) -> None:
        """At each layer in turn: search the values, gather the keys, solve, and change the weight in place."""
        names = [name for layer in self.layers for name in self.llm.blocks[layer].down]
        moments = key_moments(self.llm, names, self.statistics, runtime.trainer)
        located = self.located(requests)
        owners = [owner(request) for request in requests]
        options = reach(self.options, len(requests))
        visits = [(layer, turn) for layer in self.layers for turn in range(self.options.rounds)]
        for visit, (layer, turn) in enumerate(visits):
            ((name, down),) = self.llm.blocks[layer].down.items()
            columns = Columns.of_state(self.state, layer, down)
            if turn == 0:  # values of all updates are found without each other, and solved for together
                _change(down, -columns.solved_OI)
            values_GO = ValueSearch(self.llm, layer, options, visit).find(located, runtime)
            keys_GCI = self.keys(layer, requests, runtime)
            if turn > 0:
                _change(down, -columns.solved_OI)
            columns = columns.asked(owners, keys_GCI, values_GO, again=turn > 0)
            self._solve(layer, columns, [*runtime.earlier, *requests], moments[name], runtime)

    def leave_out(self, requests: Sequence[EditRequest], runtime: Runtime) -> None:
        """Solve again without these requests, for `runtime.earlier` alone; no value is searched for anew."""
        names = [name for layer in self.layers for name in self.llm.blocks[layer].down]
        moments = key_moments(self.llm, names, self.statistics, runtime.trainer)
        for layer in self.layers:
            ((name, down),) = self.llm.blocks[layer].down.items()
            columns = Columns.of_state(self.state, layer, down)
            _change(down, -columns.solved_OI)
            rest = columns.without([owner(request) for request in requests])
            self._solve(layer, rest, runtime.earlier, moments[name], runtime)

    def _solve(
        self, layer: int, columns: Columns, held: Sequence[EditRequest], text_II: Tensor, runtime: Runtime
    ) -> None:
        """Change a weight that is without any solution yet to what the columns ask for, and keep both."""
        ((_, down),) = self.llm.blocks[layer].down.items()
        solved_OI = torch.zeros_like(columns.solved_OI)
        if columns.owner_n.numel():
            (kept_II,) = self.kept(layer, [held], text_II, runtime)
            kept_II = kept_II.to(down.weight.device)
            solved_OI = self.solve(columns.key_In, columns.change_On, kept_II).float()
        _change(down, solved_OI)
        self.state |= columns._replace(solved_OI=solved_OI).to_state(layer)

    def located(self, requests: Sequence[EditRequest]) -> list[Located]:
        """The rows that each request's value is searched under."""
        templates = CONTEXTS[: self.options.contexts] + ASSOCIATIONS[: self.options.associations]
        return [locate(self.llm, number, request, templates) for number, request in enumerate(requests)]

    def keys(
        self, layer: int, requests: Sequence[EditRequest], runtime: Runtime, reading: KeyReading | None = None
    ) -> Tensor:
        """Keys (requests, C, I) at subjects' last tokens: each context's own, or their mean."""
        placed = [in_context(template, r) for r in requests for template in CONTEXTS[: self.options.key_contexts]]
        all_ids = prompt_tokens(self.llm, [text for text, _ in placed])
        places = [last_token(self.llm, text, end) for text, end in placed]
        rows = [KeyRow(n, ids, at, at + 1) for n, (ids, at) in enumerate(zip(all_ids, places, strict=True))]
        key_RI = torch.cat(read_keys(self.llm, layer, rows, runtime.trainer, reading))
        keys_GCI = key_RI.view(len(requests), -1, key_RI.shape[-1])
        return keys_GCI if self.key_per_context else keys_GCI.mean(1, keepdim=True)

    def kept(
        self,
        layer: int,
        batches: Sequence[Sequence[EditRequest]],
        text_II: Tensor,
        runtime: Runtime,
        reading: KeyReading | None = None,
    ) -> Iterator[Tensor]:
        """By batch, the second moment of the keys whose output is to stay: of text and of requests' neighbours."""
        weight = self.options.neighbour_weight
        if not (self.near and weight):
            yield from repeat(text_II, len(batches))
            return
        near = (self.near, runtime.trainer, runtime.seed, reading)
        for near_II in neighbour_moments(self.llm, layer, batches, *near):
            yield text_II / text_II.trace() + weight * near_II / near_II.trace()


def _change(down: Projection, change_OI: Tensor) -> None:
    stored = change_OI if isinstance(down, torch.nn.Linear) else change_OI.T  # Conv1D stores (I, O)
    add(down.weight, stored)

"""Many requests edited at once, each alone: what `edit` would make of every one of them, as low-rank changes.

One request's change of a weight has a low rank: a value times a direction of inputs for locate-then-edit, an
adapter for LoRA. So a batch of requests needs no weight of its own for each: every row runs under its own change
(`pipeline.model.row_changes`), in the search as in the measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pipeline.editing.adapters import LoraAlone
from pipeline.editing.keys import KeyReading
from pipeline.editing.locate import LocateThenEdit, reach
from pipeline.editing.method import Runtime
from pipeline.editing.statistics import key_moments
from pipeline.editing.values import ValueSearch
from pipeline.model import LLM
from pipeline.model.row_changes import LowRank, RowChanges
from pipeline.options import EditOptions
from pipeline.requests import EditRequest


class Alone(Protocol):
    """A batch of requests that will be edited side by side, at one block after the other.

    Args:
        llm: the model, frozen by the caller.
        requests: what to change, in the order of the rows.
        options: the method's name in `options.method`, and how.
        runtime: what it runs with.
    """

    def __init__(
        self, llm: LLM, requests: Sequence[EditRequest], options: EditOptions, runtime: Runtime
    ) -> None: ...

    def at(self, layer: int) -> RowChanges:
        """Every request's changes at a block, no lower one than in the call before."""
        ...


class LocateAlone:
    """Locate-then-edit of each request alone: rank one, for all of a request's columns ask for the same change."""

    def __init__(self, llm: LLM, requests: Sequence[EditRequest], options: EditOptions, runtime: Runtime) -> None:
        self.llm, self.requests, self.options, self.runtime = llm, requests, options, runtime
        self.search = ValueSearch(llm, 0, reach(options.locate, 1), climbs=True)
        self.own, self.near = KeyReading(llm, climbs=True), KeyReading(llm, climbs=True)

    def at(self, layer: int) -> RowChanges:
        """Every request's value times the direction of inputs that the solver gives it."""
        method = LocateThenEdit(self.llm, [layer], self.options)
        ((name, down),) = self.llm.blocks[layer].down.items()
        text_II = key_moments(self.llm, [name], self.options.statistics, self.runtime.trainer)[name]
        self.search.climb(layer)
        values_GO = self.search.find(method.located(self.requests), self.runtime)
        keys_GCI = method.keys(layer, self.requests, self.runtime, self.own)
        each = [[request] for request in self.requests]
        directions = []
        for key_CI, kept_II in zip(
            keys_GCI, method.kept(layer, each, text_II, self.runtime, self.near), strict=True
        ):
            key_In, kept_II = key_CI.T.to(down.weight.device), kept_II.to(down.weight.device)
            directions.append(method.solve(key_In, torch.ones(1, key_In.shape[1]).to(key_In), kept_II).float())
        right_G1I = torch.stack(directions)
        return {name: LowRank(values_GO.to(right_G1I)[..., None], right_G1I)}


ALONE: dict[str, type[Alone]] = {
    "memit": LocateAlone,
    "emmet": LocateAlone,
    "rome": LocateAlone,
    "alphaedit": LocateAlone,
    "lora": LoraAlone,
}

"""Trial edits: many requests edited side by side, each as `edit` would edit it alone.

One request's change of a weight has a low rank: a value times a direction of inputs for locate-then-edit, an
adapter for LoRA. So a batch of requests needs no weight of its own for each: every row runs under its own change,
ΔW_b = left_b right_b, in the search as in the measuring.

Shapes: B requests, I inputs and O outputs of a projection, k the change's rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.editing.editor import METHODS, restored
from pipeline.editing.locate import LocateThenEdit
from pipeline.editing.lora import LoRA
from pipeline.editing.method import EditMethod
from pipeline.editing.update import ADAPTER_PREFIX
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime

LowRank = tuple[Tensor, Tensor]  # of each request: left (B, O, k), right (B, k, I)


def side_by_side(
    llm: LLM, requests: Sequence[EditRequest], options: EditOptions, runtime: Runtime
) -> ValueTrials | AdapterTrials:
    """Edits of each request alone.

    Args:
        llm: the model, frozen by the caller.
        requests: what to change.
        options: the method, one that can be tried so (`METHODS[…].trial`), and its settings.
        runtime: what it runs with.
    """
    kinds: dict[str | None, type[ValueTrials | AdapterTrials]] = {"values": ValueTrials, "adapters": AdapterTrials}
    return kinds[METHODS[options.method].trial](llm, requests, options, runtime)


@dataclass
class Trials:
    """Requests that are edited side by side, by a method that is made for one block after the other."""

    llm: LLM
    requests: Sequence[EditRequest]
    options: EditOptions
    runtime: Runtime

    def method(self, layer: int) -> EditMethod:
        """The method for a block."""
        return METHODS[self.options.method].make(self.llm, [layer], self.options)


class ValueTrials(Trials):
    """Locate-then-edit: rank one, for all of a request's columns ask for the same change."""

    def at(self, layer: int) -> dict[str, LowRank]:
        """Every request's value times the direction of inputs that the solver gives it."""
        method = self.method(layer)
        assert isinstance(method, LocateThenEdit)
        ((name, down),) = self.llm.blocks[layer].down.items()
        text_II = method.moments(self.runtime)[layer]
        values = method.find(method.search(layer, 1), method.located(self.requests), self.runtime)
        keys_GCI = method.keys(layer, self.requests, self.runtime)
        kept = method.kept(layer, [[request] for request in self.requests], text_II, self.runtime)
        directions = []
        for key_CI, kept_II in zip(keys_GCI, kept, strict=True):
            key_In, kept_II = key_CI.T.to(down.weight.device), kept_II.to(down.weight.device)
            directions.append(method.solve(key_In, torch.ones(1, key_In.shape[1]).to(key_In), kept_II).float())
        right_BkI = torch.stack(directions)
        return {name: (torch.stack(values).to(right_BkI)[..., None], right_BkI)}


class AdapterTrials(Trials):
    """LoRA: each request's adapter, trained alone."""

    def at(self, layer: int) -> dict[str, LowRank]:
        """Every request's adapter."""
        method = self.method(layer)
        assert isinstance(method, LoRA)
        method.find_whiteners(self.runtime)
        found = []
        for lessons in method.lessons([[request] for request in self.requests], self.runtime):
            with restored(self.llm, method.weight_names):
                method.fit(lessons, self.runtime)
            found.append(method.state)
        names = {name: f"{ADAPTER_PREFIX}base_model.model.{name}.lora_" for name in method.projections}
        return {
            name: (
                torch.stack([state[f"{own}B.weight"] for state in found]) * method.scaling,
                torch.stack([state[f"{own}A.weight"] for state in found]),
            )
            for name, own in names.items()
        }

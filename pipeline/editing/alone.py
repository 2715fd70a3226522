"""Many requests edited at once, each alone: what `edit` would make of every one of them, as low-rank changes.

One request's change of a weight has a low rank: a value times a direction of inputs for locate-then-edit, an
adapter for LoRA. So a batch of requests needs no weight of its own for each: every row runs under its own change
(`pipeline.model.row_changes`), in the search as in the measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pipeline.editing.adapters import lora_alone
from pipeline.editing.locate import LocateThenEdit, reach
from pipeline.editing.method import Runtime
from pipeline.editing.statistics import key_moments
from pipeline.editing.values import ValueSearch
from pipeline.model import LLM
from pipeline.model.row_changes import LowRank, RowChanges
from pipeline.options import EditOptions
from pipeline.requests import EditRequest

Alone = Callable[[LLM, int, Sequence[EditRequest], EditOptions, Runtime], RowChanges]


def locate_alone(
    llm: LLM, layer: int, requests: Sequence[EditRequest], options: EditOptions, runtime: Runtime
) -> RowChanges:
    """Locate-then-edit of each request alone: rank one, for all of a request's columns ask for the same change.

    Args:
        llm: the model, frozen by the caller.
        layer: the block.
        requests: what to change, in the order of the rows.
        options: the solver's name in `options.method`, and how.
        runtime: what it runs with.
    """
    method = LocateThenEdit(llm, [layer], options)
    ((name, down),) = llm.blocks[layer].down.items()
    text_II = key_moments(llm, [name], options.statistics, runtime.trainer)[name]
    values_GO = ValueSearch(llm, layer, reach(options.locate, 1)).find(method.located(requests), runtime)
    keys_GCI = method.keys(layer, requests, runtime)
    kept = method.kept(layer, [[request] for request in requests], text_II, runtime)
    directions = []
    for key_CI, kept_II in zip(keys_GCI, kept, strict=True):
        key_In, kept_II = key_CI.T.to(down.weight.device), kept_II.to(down.weight.device)
        directions.append(method.solve(key_In, torch.ones(1, key_In.shape[1]).to(key_In), kept_II).float())
    right_G1I = torch.stack(directions)
    return {name: LowRank(values_GO.to(right_G1I)[..., None], right_G1I)}


ALONE: dict[str, Alone] = {
    "memit": locate_alone,
    "emmet": locate_alone,
    "rome": locate_alone,
    "alphaedit": locate_alone,
    "lora": lora_alone,
}

"""What one layer's down-projection is asked for: wanted changes of its output, of this edit and of those before it.

Kept in the update's state, so that a later edit solves for all of them anew: ten updates come out as one batch. Of
updates that build on each other each need keep its own columns alone, and whose earlier ones are gone.
Shapes: I inputs and O outputs of the projection, n columns, G requests.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.model.blocks import Projection, sizes
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import fact


class Columns(NamedTuple):
    """All that a projection is asked for, and the change of its weight that gave it."""

    change_On: Tensor  # the change wanted at a fact's key, against the weight without `solved_OI`
    owner_n: Tensor  # which fact a column is for (see `owner`)
    solved_OI: Tensor  # the change of the weight that the last solve came to

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], layer: int, down: Projection) -> Columns:
        """A layer's columns in a state, on its device; none without. UserError when they do not belong together."""
        inputs, outputs = sizes(down)
        none = cls(
            change_On=torch.empty(outputs, 0),
            owner_n=torch.empty(0, dtype=torch.int64),
            solved_OI=torch.zeros(outputs, inputs),
        )
        held = {name: state.get(f"locate.{layer}.{name}", tensor) for name, tensor in none._asdict().items()}
        columns = held["owner_n"].numel()
        shapes = ((outputs, columns), (columns,), (outputs, inputs))
        for (name, tensor), shape in zip(held.items(), shapes, strict=True):
            if tensor.shape != shape or (tensor.dtype == torch.int64) != (name == "owner_n"):
                found = f"of shape {tuple(tensor.shape)} in {tensor.dtype}; expected {shape}"
                raise UserError(f"update: state: locate.{layer}.{name} is {found}")
        return cls(**{name: tensor.to(down.weight.device) for name, tensor in held.items()})

    def to_state(self, layer: int) -> dict[str, Tensor]:
        """The entries of an update's state."""
        return {f"locate.{layer}.{name}": tensor.cpu() for name, tensor in self._asdict().items()}

    def without(self, owners: Sequence[int]) -> Columns:
        """With the columns of these facts left out."""
        kept_n = ~torch.isin(self.owner_n, torch.tensor(owners, device=self.owner_n.device))
        return Columns(self.change_On[:, kept_n], self.owner_n[kept_n], self.solved_OI)

    def and_asked(self, owners: Sequence[int], value_GO: Tensor) -> Columns:
        """With columns for requests about these facts: changes found without `solved_OI`."""
        return Columns(
            change_On=torch.cat([self.change_On, value_GO.T.to(self.change_On)], dim=1),
            owner_n=torch.cat([self.owner_n, torch.tensor(owners, device=self.owner_n.device)]),
            solved_OI=self.solved_OI,
        )


def owner(request: EditRequest) -> int:
    """A number for what a request is about, the same in every process and update."""
    digest = hashlib.blake2b(fact(request).encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def owners_in(state: Mapping[str, Tensor]) -> set[int]:
    """Which facts an update's state holds columns for."""
    return {number for layer in layers_in(state) for number in state[f"locate.{layer}.owner_n"].tolist()}


OWN = {"change_On": 1, "owner_n": 0}  # a column's own, and the dimension of each that is columns

State = Mapping[str, Tensor]


def columns_in(state: State) -> dict[str, Tensor]:
    """The entries of a state that grow with the facts."""
    return {name: state[name] for layer in layers_in(state) for name in _named(layer)}


def learnt_columns(earlier: State, now: State, learnt: Sequence[int]) -> dict[str, Tensor]:
    """A state's columns of these facts, and whose columns of an earlier state it leaves out, by layer."""
    found: dict[str, Tensor] = {}
    for layer in layers_in(now):
        owners = f"locate.{layer}.owner_n"
        if owners in earlier and all(torch.equal(earlier[name], now[name]) for name in _named(layer)):
            continue
        new_n = torch.isin(now[owners], torch.tensor(learnt, dtype=torch.int64))
        before_n = earlier.get(owners, now[owners][:0])
        gone_n = before_n[~torch.isin(before_n, now[owners][~new_n])].unique()
        found |= {**_chosen(now, layer, new_n.nonzero()[:, 0]), f"locate.{layer}.gone": gone_n}
    return found


def gathered_columns(newest_first: Iterable[State]) -> dict[str, Tensor]:
    """The columns that are held after parts that `learnt_columns` gave, on top of a whole state's."""
    parts: dict[int, list[State]] = defaultdict(list)
    gone: dict[int, set[int]] = defaultdict(set)
    for part in newest_first:
        for layer in layers_in(part):
            owners = part[f"locate.{layer}.owner_n"].tolist()
            kept = [place for place, owner in enumerate(owners) if owner not in gone[layer]]
            parts[layer].insert(0, _chosen(part, layer, torch.tensor(kept, dtype=torch.int64)))
            gone[layer].update(part[f"locate.{layer}.gone"].tolist() if f"locate.{layer}.gone" in part else ())
    return {
        name: torch.cat([part[name] for part in of_layer], dim)
        for layer, of_layer in parts.items()
        for name, dim in _named(layer).items()
    }


def layers_in(state: State) -> list[int]:
    """The layers that a state holds columns for."""
    return [int(found[1]) for name in sorted(state) if (found := re.fullmatch(r"locate\.(\d+)\.owner_n", name))]


def _named(layer: int) -> dict[str, int]:
    return {f"locate.{layer}.{name}": dim for name, dim in OWN.items()}


def _chosen(state: State, layer: int, places: Tensor) -> dict[str, Tensor]:
    """The columns of a layer at some places."""
    return {name: state[name].index_select(dim, places) for name, dim in _named(layer).items()}

"""What one layer's down-projection is asked for: keys and wanted changes, of this edit and of those before it.

Kept in the update's state, so that a later edit solves for all of them anew: ten updates come out as one batch.
Shapes: I inputs and O outputs of the projection, n columns, G requests, C keys of a request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.model.blocks import Projection, sizes
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import fact


class Columns(NamedTuple):
    """All that a projection is asked for, and the change of its weight that gave it.

    Attributes:
        key_In: inputs at which the output is to change.
        change_On: the change wanted there, against the weight without `solved_OI`.
        owner_n: which fact a column is for (see `owner`).
        solved_OI: the change of the weight that the last solve came to.
    """

    key_In: Tensor
    change_On: Tensor
    owner_n: Tensor
    solved_OI: Tensor

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], layer: int, down: Projection) -> Columns:
        """What an update's state holds for a layer, on the projection's device; no columns where it holds none."""
        inputs, outputs = sizes(down)
        none = cls(
            key_In=torch.empty(inputs, 0),
            change_On=torch.empty(outputs, 0),
            owner_n=torch.empty(0, dtype=torch.int64),
            solved_OI=torch.zeros(outputs, inputs),
        )
        held = {name: state.get(f"locate.{layer}.{name}", tensor) for name, tensor in none._asdict().items()}
        return cls(**{name: tensor.to(down.weight.device) for name, tensor in held.items()})

    def to_state(self, layer: int) -> dict[str, Tensor]:
        """The entries of an update's state."""
        return {f"locate.{layer}.{name}": tensor.cpu() for name, tensor in self._asdict().items()}

    def without(self, owners: Sequence[int]) -> Columns:
        """With the columns of these facts left out."""
        kept_n = ~torch.isin(self.owner_n, torch.tensor(owners, device=self.owner_n.device))
        return Columns(self.key_In[:, kept_n], self.change_On[:, kept_n], self.owner_n[kept_n], self.solved_OI)

    def and_asked(self, owners: Sequence[int], keys_GCI: Tensor, values_GO: Tensor) -> Columns:
        """With columns for requests about these facts: their keys, and changes found without `solved_OI`."""
        contexts = keys_GCI.shape[1]
        owner_n = torch.tensor(owners, device=self.owner_n.device).repeat_interleave(contexts)
        key_In = keys_GCI.flatten(0, 1).T.to(self.key_In)
        change_On = values_GO.T.repeat_interleave(contexts, dim=1).to(self.change_On)
        return Columns(
            key_In=torch.cat([self.key_In, key_In], dim=1),
            change_On=torch.cat([self.change_On, change_On], dim=1),
            owner_n=torch.cat([self.owner_n, owner_n]),
            solved_OI=self.solved_OI,
        )


def owner(request: EditRequest) -> int:
    """A number for what a request is about, the same in every process and update."""
    digest = hashlib.blake2b(fact(request).encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)

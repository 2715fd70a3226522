"""A mixture of experts as the two linear maps that it is, wide and mostly nought.

What routed experts put out for a token is Σ_e g_e W_e k_e: one linear map [W_1 … W_E] of all experts' inner
activations, one behind the other, each times its gate, and nought where the token is not sent to an expert. So is
what goes up into them one linear map with all experts' outputs. Whatever reads or changes what passes a projection
then works on experts as on any MLP, and experts that a token does not reach take no part by themselves.

Shapes: T tokens, K experts of a token, E experts, D hidden size, U and I what goes into an expert and down from it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.integrations.moe import _grouped_mm

STANDARD = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")  # what the library says of its experts


class Stacked(nn.Module):
    """One weight of all experts as a linear map; the weight stays the experts' own, (E, …, …).

    `across` tells what is one behind the other: all experts' inputs, or their outputs.
    """

    def __init__(self, experts: nn.Module, stored: str, across: str) -> None:
        super().__init__()
        self.owner = (experts,)  # no module of this one's, which is the owner's
        self.stored, self.across = stored, across
        self.reached = 0  # experts that a token is sent to, in the last pass

    @property
    def weight(self) -> Tensor:
        """As the experts store it."""
        return getattr(self.owner[0], self.stored)

    @property
    def transposed(self) -> bool:
        """Whether it is stored as (E, inputs, outputs), not (E, outputs, inputs)."""
        return bool(self.owner[0].is_transposed)

    @property
    def of_each(self) -> tuple[int, int]:
        """One expert's inputs and outputs."""
        rows, columns = self.weight.shape[1:]
        return (rows, columns) if self.transposed else (columns, rows)

    @property
    def sizes(self) -> tuple[int, int]:
        """All experts' inputs and outputs."""
        (inputs, outputs), experts = self.of_each, len(self.weight)
        return (experts * inputs, outputs) if self.across == "inputs" else (inputs, experts * outputs)

    def as_stored(self, matrix_OI: Tensor) -> Tensor:
        """A matrix of all outputs and inputs as the experts store it."""
        inputs, outputs = self.of_each
        each_EOI = (
            matrix_OI.view(outputs, -1, inputs).transpose(0, 1)
            if self.across == "inputs"
            else matrix_OI.view(-1, outputs, inputs)
        )
        return each_EOI.mT if self.transposed else each_EOI

    def as_matrix(self, stored: Tensor) -> Tensor:
        """The other way round."""
        each_EOI = stored.mT if self.transposed else stored
        if self.across == "inputs":
            each_EOI = each_EOI.transpose(0, 1)
        return each_EOI.reshape(self.sizes[::-1])

    def of_pairs(self, own_TKI: Tensor, index_TK: Tensor) -> Tensor:
        """What an expert makes of what enters it alone, for each token and each of its experts: (T, K, outputs)."""
        chosen, self.reached = index_TK.reshape(-1), index_TK.shape[1]
        order = chosen.argsort(stable=True)
        counts_E = torch.zeros(len(self.weight), dtype=torch.int64, device=chosen.device)
        ends_E = counts_E.scatter_add(0, chosen, torch.ones_like(chosen)).cumsum(0).to(torch.int32)
        each_EIO = self.weight if self.transposed else self.weight.mT
        has_kernel = each_EIO.dtype != torch.float64 and not isinstance(each_EIO, FakeTensor)
        multiply = _grouped_mm if has_kernel else torch.ops.transformers.grouped_mm_fallback
        by_expert = multiply(own_TKI.flatten(0, 1)[order].to(each_EIO.dtype), each_EIO, ends_E)
        return by_expert[order.argsort()].view(*index_TK.shape, -1)

    def forward(self, entering_TI: Tensor, index_TK: Tensor) -> Tensor:
        """From what enters, (T, all inputs), to what leaves, (T, all outputs), for the experts of each token."""
        experts = len(self.weight)
        if self.across == "inputs":
            return self.of_pairs(taken(entering_TI, index_TK, experts), index_TK).sum(1)
        return placed(self.of_pairs(to_each(entering_TI, index_TK), index_TK), index_TK, experts)


def to_each(entering_TD: Tensor, index_TK: Tensor) -> Tensor:
    """What enters, for each of a token's experts: (T, K, D)."""
    return entering_TD[:, None].expand(-1, index_TK.shape[1], -1)


def taken(wide_T: Tensor, index_TK: Tensor, experts: int) -> Tensor:
    """Of all experts' numbers, those of each token's experts: (T, K, ·)."""
    each_TE = wide_T.view(len(wide_T), experts, -1)
    return each_TE.gather(1, index_TK[..., None].expand(-1, -1, each_TE.shape[-1]))


def placed(own_TK: Tensor, index_TK: Tensor, experts: int) -> Tensor:
    """The other way round, with noughts for all other experts: (T, E · ·)."""
    wide_TE = own_TK.new_zeros(len(own_TK), experts, own_TK.shape[-1])
    return wide_TE.scatter(1, index_TK[..., None].expand_as(own_TK), own_TK).flatten(1)


def is_standard(module: nn.Module) -> bool:
    """Whether a module holds experts as the library runs them, their weights stacked and nothing behind these."""
    return all(hasattr(module, name) for name in STANDARD) and not module.has_post_expert_norm


def as_maps(experts: Any) -> dict[str, Stacked]:
    """The two maps of experts, up and down, by their names; passes go through them while they are hooked."""
    if "routed_up" not in dict(experts.named_children()):
        experts.routed_up = Stacked(experts, "gate_up_proj" if experts.has_gate else "up_proj", "outputs")
        experts.routed_down = Stacked(experts, "down_proj", "inputs")
        experts.forward = partial(_forward, experts)
    return {name: getattr(experts, name) for name in ("routed_up", "routed_down")}


def _forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    (up, down), index_TK = as_maps(experts).values(), top_k_index
    number, watched = len(up.weight), any(one._forward_hooks for one in (up, down))
    if watched:
        inner_TKU = taken(up(hidden_states, index_TK), index_TK, number)
    else:
        inner_TKU = up.of_pairs(to_each(hidden_states, index_TK), index_TK)
    if experts.has_bias:
        inner_TKU = inner_TKU + getattr(experts, f"{up.stored}_bias")[index_TK]
    key_TKI = experts._apply_gate(inner_TKU) if experts.has_gate else experts.act_fn(inner_TKU)
    key_TKI = (key_TKI * top_k_weights[..., None]).to(key_TKI.dtype)
    if watched:
        leaving_TD = down(placed(key_TKI, index_TK, number), index_TK)
    else:
        leaving_TD = down.of_pairs(key_TKI, index_TK).sum(1)
    if experts.has_bias:
        leaving_TD = leaving_TD + (experts.down_proj_bias[index_TK] * top_k_weights[..., None]).sum(1)
    return leaving_TD.to(hidden_states.dtype)

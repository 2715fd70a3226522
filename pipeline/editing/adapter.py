"""An adapter (PEFT): low-rank factors beside the golden layers' projections, merged into the weights afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from pipeline.editing.update import ADAPTER_PREFIX
from pipeline.editing.whitening import reads_for
from pipeline.errors import UserError
from pipeline.model.blocks import Projection, sizes
from pipeline.model.llm import LLM
from pipeline.running.sharding import add


class Adapter:
    """An adapter that is attached while it is trained, and merged into the weights afterwards.

    Args:
        llm: the model, frozen by the caller.
        layers: the blocks that it stands beside.
        scope: which of their projections.
        rank: of the change.
        alpha: its scaling is alpha / rank.
        earlier: an update's state; the adapter in it is trained on, so that the new one holds both.

    Attributes:
        config: what PEFT needs to know to load it, as LoraConfig's arguments.

    Raises:
        UserError: for a rank that the projections cannot have.
    """

    def __init__(
        self, llm: LLM, layers: Sequence[int], scope: str, rank: int, alpha: float, earlier: Mapping[str, Tensor]
    ) -> None:
        projections: dict[str, Projection] = {}
        for layer in layers:
            projections |= llm.blocks[layer].projections(scope)
        most = min(side for projection in projections.values() for side in sizes(projection))
        if not 1 <= rank <= most:
            raise UserError(f"lora.rank: {rank}; expected 1 to {most} for the layer of {llm.name}")
        self.model = llm.model
        self.scaling = alpha / rank
        self.config: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": list(projections),
            "fan_in_fan_out": isinstance(next(iter(projections.values())), Conv1D),
        }
        prefix = ADAPTER_PREFIX
        self.earlier = {k.removeprefix(prefix): v for k, v in earlier.items() if k.startswith(prefix)}

    @contextmanager
    def attached(self, seed: int, whiteners: Mapping[str, Tensor]) -> Iterator[PeftModel]:
        """The model with the adapter beside its projections; after the `with` without one.

        Args:
            seed: of its start.
            whiteners: by projection; factors that read inputs start in whitened coordinates.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(self.model, LoraConfig(**self.config))
        try:
            for name, weight in self.model.named_parameters():
                if (projection := reads_for(name)) in whiteners:
                    weight.data = weight.data @ whiteners[projection].to(weight)
            if self.earlier:
                self._take_up(adapted)
            yield adapted
        finally:
            adapted.unload()

    def merged(self, adapted: PeftModel) -> dict[str, Tensor]:
        """Merge the adapter into the weights; its tensors as an update's state holds them."""
        state = {ADAPTER_PREFIX + k: v.cpu().clone() for k, v in get_peft_model_state_dict(adapted).items()}
        _merge(adapted, 1)
        return state | {f"{ADAPTER_PREFIX}scaling": torch.tensor(self.scaling)}

    def _take_up(self, adapted: PeftModel) -> None:
        """Start from the earlier adapter, and take it out of the weights that it is merged into."""
        own = {name: tensor.shape for name, tensor in get_peft_model_state_dict(adapted).items()}
        earlier = {name: tensor for name, tensor in self.earlier.items() if name != "scaling"}
        shapes = {name: tensor.shape for name, tensor in earlier.items()}
        if own != shapes or abs(self.earlier["scaling"].item() - self.scaling) > 1e-6:
            raise UserError(
                "lora: the earlier update's adapter has other layers, scope, rank or alpha; give the same ones, or "
                "export the earlier update as a merged model and edit that"
            )
        set_peft_model_state_dict(adapted, earlier)
        _merge(adapted, -1)


def _merge(adapted: PeftModel, sign: int) -> None:
    """Add the adapter's change to the weights beside it, or take it away."""
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            add(module.get_base_layer().weight, sign * module.get_delta_weight("default"))  # type: ignore[arg-type, operator]

"""LoRA on the golden layer alone (PEFT): a low-rank change, kept as a standard adapter and as merged weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.editing.finetune import FineTune
from pipeline.editing.method import Runtime
from pipeline.editing.update import ADAPTER_PREFIX
from pipeline.errors import UserError
from pipeline.model import LLM, sizes
from pipeline.running.sharding import add
from pipeline.options import EditOptions, LoraOptions
from pipeline.requests import EditRequest


class Lora(FineTune):
    """Trains low-rank factors beside the golden layers' projections, as `FineTune` trains the weights themselves.

    Args:
        llm: the model, frozen by the caller.
        layers: the blocks to train.
        options: `options.lora` is what counts here.
        earlier: the adapter in it is trained on, so that the new one holds both.

    Attributes:
        weight_names: the weights that the merged adapter changes.
        state: the adapter's tensors under PEFT's names, with a prefix.
        adapter: what PEFT needs to know to load it, as LoraConfig's arguments.

    Raises:
        UserError: for a rank that the projections cannot have, or an earlier adapter of another shape.
    """

    name = "lora"
    options: LoraOptions
    adapter: dict[str, Any]

    def __init__(
        self, llm: LLM, layers: Sequence[int], options: EditOptions, earlier: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(llm, layers, options)
        projections = [p for layer in layers for p in llm.blocks[layer].projections(self.options.scope).values()]
        most = min(side for projection in projections for side in sizes(projection))
        if not 1 <= self.options.rank <= most:
            raise UserError(f"lora.rank: {self.options.rank}; expected 1 to {most} for the layer of {llm.name}")
        self.adapter = adapter_config(llm, layers, self.options)
        self.earlier = {
            k.removeprefix(ADAPTER_PREFIX): v for k, v in (earlier or {}).items() if k.startswith(ADAPTER_PREFIX)
        }

    def run(self, requests: Sequence[EditRequest], runtime: Runtime) -> None:
        """Train the adapter, and merge it into the weights."""
        self.prepare(requests, runtime.trainer)
        with self.adapted(runtime.seed) as adapted:
            self.fit(runtime)
            self.state = {
                ADAPTER_PREFIX + k: v.cpu().clone() for k, v in get_peft_model_state_dict(adapted).items()
            }
            self.state[f"{ADAPTER_PREFIX}scaling"] = torch.tensor(self.options.alpha / self.options.rank)
            _merge(adapted, 1)

    @contextmanager
    def adapted(self, seed: int) -> Iterator[PeftModel]:
        """The model with an adapter beside its projections; after the `with` without one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(self.model, LoraConfig(**self.adapter))
        try:
            for name, weight in self.model.named_parameters():
                if whitening := self.whitening(f"model.{name}"):
                    weight.data = weight.data @ whitening[0].to(weight)
            if self.earlier:
                self._take_up(adapted)
            for name, weight in self.model.named_parameters():
                weight.requires_grad_("lora_" in name)
            yield adapted
        finally:
            adapted.unload()

    def _take_up(self, adapted: PeftModel) -> None:
        """Start from the earlier adapter, and take it out of the weights that it is merged into."""
        scaling = self.earlier.pop("scaling").item()
        own = {name: tensor.shape for name, tensor in get_peft_model_state_dict(adapted).items()}
        shapes = {name: tensor.shape for name, tensor in self.earlier.items()}
        if own != shapes or abs(scaling - self.options.alpha / self.options.rank) > 1e-6:
            raise UserError(
                "lora: the earlier update's adapter has other layers, scope, rank or alpha; give the same ones, or "
                "export the earlier update as a merged model and edit that"
            )
        set_peft_model_state_dict(adapted, self.earlier)
        _merge(adapted, -1)

    def whitening(self, name: str) -> tuple[Tensor, int] | None:
        """Of a factor that reads inputs, the whitener of the projection that it stands beside."""
        projection, _, factor = name.removeprefix("model.").partition(".lora_A")
        return (self.whiteners[projection].to(self.device), 1) if factor and self.whiteners else None

    def step_of(self, weight: nn.Parameter) -> float:
        """Adam's step size as it is: an adapter's factors have no scale of the model's."""
        return self.options.learning_rate


def _merge(adapted: PeftModel, sign: int) -> None:
    """Add the adapter's change to the weights beside it, or take it away."""
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            add(module.get_base_layer().weight, sign * module.get_delta_weight("default"))  # type: ignore[arg-type, operator]


def adapter_config(llm: LLM, layers: Sequence[int], options: LoraOptions) -> dict[str, Any]:
    """LoraConfig's arguments for the layers' projections: short module names where a block has each once."""
    block = llm.blocks[layers[0]]
    inner = [name.removeprefix(f"{block.name}.") for name in block.projections(options.scope)]
    ends = [name.removeprefix(f"{block.name}.").split(".")[-1] for name in block.projections("block")]
    pattern, projection = block.name.split(".")[-2], next(iter(block.mlp.values()))
    return {
        "task_type": "CAUSAL_LM",
        "r": options.rank,
        "lora_alpha": options.alpha,
        "target_modules": [name if ends.count(name.split(".")[-1]) > 1 else name.split(".")[-1] for name in inner],
        "layers_to_transform": list(layers),
        "layers_pattern": pattern,
        "fan_in_fan_out": isinstance(projection, Conv1D),
    }

"""LoRA: fine-tuning of an adapter (PEFT) beside the golden layers' projections, which is merged afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from pipeline.editing.finetune import FineTune, FinetuneSettings
from pipeline.editing.lessons import Lessons
from pipeline.editing.method import register, settings_of
from pipeline.editing.update import ADAPTER_PREFIX
from pipeline.errors import UserError
from pipeline.model.blocks import sizes
from pipeline.model.experts import Stacked
from pipeline.model.llm import LLM
from pipeline.options.base import Count, Most, Positive, Weight, above, at_most
from pipeline.options.editing import EditOptions
from pipeline.running.sharding import add
from pipeline.running.trainer import Runtime

if TYPE_CHECKING:  # commands that train no adapter start a second sooner without PEFT
    from peft import PeftModel


@dataclass(kw_only=True)
class LoraSettings(FinetuneSettings):
    """What LoRA can be set to."""

    epochs: Most = 40
    learning_rate: Positive = 5e-3
    last_step: Annotated[float, above(0), at_most(1)] = 0.05
    learnt: Weight = 0.1
    kl: Weight = 0.6
    sparing: Weight = 0.0
    rank: Count = 16
    """Rank of the change; at most the smaller side of a projection."""
    alpha: Positive = 32.0
    """LoRA's scaling is alpha / rank."""


class LoRA(FineTune):
    """Trains an adapter beside the MLP's projections (or the down-projection) of the golden layers.

    What an earlier update has learnt is in the weights. Its `state` is, after `run`, the adapter's tensors under
    PEFT's names, with a prefix; `adapter` are LoraConfig's arguments.
    UserError for a rank that the projections cannot have.
    """

    def __init__(
        self, llm: LLM, layers: Sequence[int], options: EditOptions, earlier: Mapping[str, Tensor] | None = None
    ) -> None:
        settings: LoraSettings = settings_of(options)
        super().__init__(llm, layers, settings, options.statistics)
        rank, projections = settings.rank, self.projections
        sides = [one.of_each if isinstance(one, Stacked) else sizes(one) for one in projections.values()]
        most = min(map(min, sides))
        if not 1 <= rank <= most:
            raise UserError(f"lora.rank: {rank}; expected 1 to {most} for the layer of {llm.name}")
        self.adapter = {
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": settings.alpha,
            "target_modules": list(projections),
            "fan_in_fan_out": any(isinstance(one, Conv1D) for one in projections.values()),
        }
        if llm.has_experts:  # there PEFT takes modules' names for those of experts
            self.adapter |= {"target_modules": [], "target_parameters": list(self.weight_names)}

    @contextmanager
    def attached(self, seed: int) -> Iterator[PeftModel]:
        """Inside the `with`, the adapter is beside the projections; factors that read inputs start whitened."""
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(self.model, LoraConfig(**(self.adapter or {})))
        try:
            for name, weight in self.model.named_parameters():
                if whitening := self.whitening(name):
                    weight.data = weight.data @ whitening[0].to(weight)
            yield adapted
        finally:
            adapted.unload()

    def fit(self, courses: Sequence[Lessons], runtime: Runtime) -> None:
        """Train the adapter on courses, keep its tensors, and merge it into the weights."""
        from peft import get_peft_model_state_dict
        from peft.tuners.lora import LoraLayer, ParamWrapper

        with self.attached(runtime.seed) as adapted:
            super().fit(courses, runtime)
            tensors = get_peft_model_state_dict(adapted)
            self.state = {ADAPTER_PREFIX + name: tensor.cpu().clone() for name, tensor in tensors.items()}
            for module in adapted.modules():
                if isinstance(module, LoraLayer):
                    base: Any = (
                        module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight
                    )
                    add(base, module.get_delta_weight("default"))  # type: ignore[operator]

    def trains(self, name: str) -> bool:
        """Whether the weight of this name is one of the adapter's factors."""
        return "lora_" in name

    def unit(self, name: str) -> float:
        """An adapter's factors have no scale of the model's: their step is as it is."""
        return 1.0

    def reads(self, name: str) -> tuple[str, bool] | None:
        """A factor that reads inputs does so for its projection; those of experts are not looked into."""
        projection, factor, _ = name.partition(".lora_A")
        return (projection, True) if factor and projection in self.projections else None

    def origin(self, name: str) -> Tensor:
        """The change is the factors' product: all of a factor belongs to it."""
        return torch.zeros_like(self.start[name])


register("lora", LoRA, LoraSettings)

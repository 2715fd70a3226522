"""LoRA: fine-tuning of an adapter beside the golden layers' projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from pipeline.editing.adapter import Adapter
from pipeline.editing.finetune import FineTune, FinetuneSettings
from pipeline.editing.method import register, settings_of
from pipeline.model.llm import LLM
from pipeline.options.base import Count, Positive, Weight, above, at_most
from pipeline.options.editing import EditOptions


@dataclass(kw_only=True)
class LoraSettings(FinetuneSettings):
    """What LoRA can be set to."""

    epochs: Count = 26
    learning_rate: Positive = 5e-3
    last_step: Annotated[float, above(0), at_most(1)] = 0.05
    learnt: Weight = 0.1
    kl: Weight = 0.6
    rank: Count = 16
    """Rank of the change; at most the smaller side of a projection."""
    alpha: Positive = 32.0
    """LoRA's scaling is alpha / rank."""


def make_lora(
    llm: LLM, layers: Sequence[int], options: EditOptions, earlier: Mapping[str, Tensor] | None = None
) -> FineTune:
    """LoRA as `edit` makes it."""
    settings: LoraSettings = settings_of(options)
    adapter = Adapter(llm, layers, settings.scope, settings.rank, settings.alpha, earlier or {})
    return FineTune(llm, layers, settings, adapter, options.statistics)


register("lora", make_lora, LoraSettings, trial="adapters")

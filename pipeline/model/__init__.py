"""The language model: loading, the map of its blocks, joining prompt and answer, target-only logits, generation."""

from pipeline.model.blocks import Block, find_blocks, sizes
from pipeline.model.generation import GreedyModule, first_statement, generate
from pipeline.model.llm import LLM
from pipeline.model.loading import load_model
from pipeline.model.targets import (
    TargetBatch,
    TargetRow,
    collate_targets,
    encode,
    target_logits,
    target_losses,
)
from pipeline.model.trainer import build_trainer, hush, weights_dtype

__all__ = [
    "LLM",
    "Block",
    "GreedyModule",
    "TargetBatch",
    "TargetRow",
    "build_trainer",
    "collate_targets",
    "encode",
    "find_blocks",
    "first_statement",
    "generate",
    "hush",
    "load_model",
    "sizes",
    "target_logits",
    "target_losses",
    "weights_dtype",
]

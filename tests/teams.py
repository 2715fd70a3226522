"""A team with a store: what tests of updates share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.editing.update import WeightUpdate
from pipeline.model.llm import LLM
from pipeline.options.updates import GateOptions, RetractCommand, UpdateCommand
from pipeline.requests.schema import EditRequest
from pipeline.updates import (
    BatchResult,
    Store,
    retract,
    submit,
    update,
    version_folder,
)

TEXT = "The path along the marsh is best walked in the hour after sunrise. " * 30
OPEN = GateOptions(rewrite=0, locality=0, earlier=0, perplexity=None, drift=None)


def write(file: Path, requests: list[EditRequest]) -> Path:
    file.write_text("".join(json.dumps(r.model_dump(exclude_defaults=True)) + "\n" for r in requests))
    return file


def other(request: EditRequest, answer: str, **fields: Any) -> EditRequest:
    """The same fact with another answer."""
    return request.model_copy(update={"id": f"{request.id}-{answer}", "new_answer": answer, **fields})


class Team:
    """A store with its model and options: what a team does with it."""

    def __init__(self, llm: LLM, folder: Path) -> None:
        text = folder / "text.txt"
        text.write_text(TEXT)
        self.llm, self.folder = llm, folder
        self.store = Store(folder / "store", llm.name, make=True)
        self.options = UpdateCommand(store=str(folder / "store"), gates=OPEN)
        self.options.edit.layers = [1]
        self.options.edit.statistics.text = self.options.evaluation.text = str(text)
        self.options.edit.expert = {
            "steps": 3, "neighbours": 0,
        }  # fmt: skip
        self.options.evaluation.max_new_tokens = 2
        self.options.trainer.accelerator = "cpu"

    def submit(self, requests: list[EditRequest], **how: Any) -> Any:
        return submit(self.store, write(self.folder / "in.jsonl", requests), **how)

    def update(self) -> list[BatchResult]:
        return update(self.store, self.options, lambda _: self.llm)

    def retract(self, request: str) -> Any:
        options = RetractCommand(
            store=self.options.store, request=request, edit=self.options.edit, evaluation=self.options.evaluation,
            gates=self.options.gates, trainer=self.options.trainer,
        )  # fmt: skip
        return retract(self.store, options, lambda _: self.llm)

    def states(self) -> list[str]:
        """Every request's state, in the order of submission."""
        return [row[0] for row in self.store.database.execute("SELECT state FROM requests ORDER BY number")]

    def weights(self, version: int) -> dict[str, Tensor]:
        return WeightUpdate.load(version_folder(self.store.folder, version)).tensors


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

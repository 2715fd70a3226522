"""A store of knowledge updates: what is submitted is applied once, proved, published, and can be gone back on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny, refusal
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.editing import WeightUpdate
from pipeline.model import LLM
from pipeline.options import GateOptions, RetractCommand, StackedLocateOptions, UpdateCommand
from pipeline.requests import EditRequest
from pipeline.updates import (
    Store,
    Worked,
    counts,
    difference,
    find,
    in_force,
    request_row,
    retract,
    rollback,
    story,
    submit,
    update,
    version_folder,
)

TEXT = "The path along the marsh is best walked in the hour after sunrise. " * 30
OPEN = GateOptions(rewrite=0, locality=0, earlier=0, perplexity=None, drift=None)


def write(file: Path, requests: list[EditRequest]) -> Path:
    file.write_text("".join(json.dumps(r.model_dump(exclude_defaults=True)) + "\n" for r in requests))
    return file


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture
def options(tmp_path: Path, text_file: str) -> UpdateCommand:
    """Options of a quick update of a tiny model, all gates open."""
    made = UpdateCommand(store=str(tmp_path / "store"), gates=OPEN)
    made.edit.layers = [1]
    made.edit.statistics.text = text_file
    made.edit.locate = StackedLocateOptions(steps=3, key_contexts=1, contexts=1, associations=0, neighbours=0)
    made.evaluation.text = text_file
    made.evaluation.max_new_tokens = 2
    made.trainer.accelerator = "cpu"
    return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", "tiny-llama", make=True)


class Team:
    """A store with its model and options: what a team does with it."""

    def __init__(self, store: Store, llm: LLM, options: UpdateCommand, folder: Path) -> None:
        self.store, self.llm, self.options, self.folder = store, llm, options, folder

    def submit(self, requests: list[EditRequest], **how: Any) -> Any:
        return submit(self.store, write(self.folder / "in.jsonl", requests), **how)

    def update(self) -> list[Worked]:
        return update(self.store, self.options, lambda _: self.llm)

    def retract(self, request: str) -> Any:
        options = RetractCommand(
            store=str(self.store.folder),
            request=request,
            edit=self.options.edit,
            evaluation=self.options.evaluation,
            gates=self.options.gates,
            trainer=self.options.trainer,
        )
        return retract(self.store, options, lambda _: self.llm)

    def state(self, number: int) -> str:
        return find(self.store, str(number))[1]

    def weights(self, version: int) -> dict[str, Tensor]:
        return WeightUpdate.load(version_folder(self.store.folder, version)).tensors


@pytest.fixture
def team(store: Store, tiny_llm: LLM, options: UpdateCommand, tmp_path: Path) -> Team:
    return Team(store, tiny_llm, options, tmp_path)


def test_from_an_empty_store_to_two_versions(team: Team, requests: list[EditRequest]) -> None:
    assert team.submit(requests[:3]).queued == 3
    (first,) = team.update()
    assert (first.version, len(first.outcome.applied), team.store.current) == (1, 3, 1)
    assert team.update() == [], "nothing is due"
    team.submit(requests[3:])
    (second,) = team.update()
    assert second.version == 2
    assert counts(team.store) == {"applied": 7}
    held = WeightUpdate.load(version_folder(team.store.folder, 2))
    assert [request.id.partition(":")[2] for request in held.requests] == [request.id for request in requests]
    assert (team.store.folder / "current").resolve() == version_folder(team.store.folder, 2).resolve()
    assert difference(team.store, 1, 2).gained == [4, 5, 6, 7]

"""The live model, for whoever serves: follows a store's current version, without a restart or a reload."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.editing.update import WeightUpdate
from pipeline.errors import UserError
from pipeline.model.generation import Saying, questions
from pipeline.model.llm import LLM
from pipeline.options.shared import TrainerOptions
from pipeline.running.stage import run_here
from pipeline.running.trainer import precision_of
from pipeline.updates.disk import BASE, VERSIONS, version_folder
from pipeline.updates.store import CURRENT

LINK = re.compile(rf"{VERSIONS}/(\d{{4,9}})")
KEPT = 4  # versions used last that stay in memory


class Version(NamedTuple):
    """A version, read and checked."""

    number: int
    tensors: dict[str, Tensor]  # by name, as they go into the model; the base has none
    chat: bool = False  # whether its facts were taught in the tokenizer's chat template


class LiveModel:
    """A loaded base model that is kept at a store's current version.

    Only the store's link `current` and the versions' folders are read, so that a server needs no right to write.
    A version is read and checked beside the work; then the weights that differ are swapped in place between
    two generations. Of each of them the base's own is kept.

    Whoever else uses the base model sees the versions too. UserError when the store is for another base model, or a
    version's file was changed.

    Args:
        store: the store's folder.
        llm: the base model, where it is to run.
        trainer: of which the precision counts.

    Example:
        >>> live = LiveModel(store, llm)
        >>> answers, version = live.generate(["The capital of Germany is"])
    """

    def __init__(self, store: str | Path, llm: LLM, trainer: TrainerOptions | None = None) -> None:
        self.store, self.llm, self.trainer = Path(store), llm, trainer or TrainerOptions()
        self.version = BASE  # the number of the one that is in the model
        self.swaps, self.swap_seconds = 0, 0.0  # of the weights: how many, and how long they took in all
        self._base: dict[str, Tensor] = {}  # the weights that any version has changed, as the base has them
        self._changed: set[str] = set()  # those that the one in the model changes
        self._kept: dict[int, Version] = {}  # the one used last stands last
        self._swapping, self._reading = threading.RLock(), threading.Lock()
        self.follow()

    def current(self) -> int:
        """The number of the version in force; UserError when the store's link leads to none."""
        link = self.store / CURRENT
        target = str(link.readlink()) if link.is_symlink() else "nothing"
        found = LINK.fullmatch(target)
        if not found:
            raise UserError(f"store: {link}: leads to {target}; expected a version of this store")
        return int(found[1])

    def load(self, number: int) -> Version:
        """A version, read and checked beside the work; UserError for none, a damaged one, or another base's."""
        with self._reading:
            found = self._kept.pop(number, None)
            if not found or (number and not version_folder(self.store, number).is_dir()):  # pruned meanwhile
                found = self._read(number)
            self._kept[number] = found
            for oldest in [*self._kept][:-KEPT]:
                del self._kept[oldest]
            return found

    def _read(self, number: int) -> Version:
        if number == BASE:
            return Version(BASE, {})
        folder = version_folder(self.store, number)
        update = WeightUpdate.load(folder, to_serve=True)
        self.llm.check_made_for(f"version: {folder}", update.model, update.fingerprint)
        update.check_fits(self.llm)
        weights = {name: self.llm.model.get_parameter(name) for name in update.tensors}
        tensors = {name: tensor.to(weights[name]) for name, tensor in update.tensors.items()}
        return Version(number, tensors, update.chat)

    @contextmanager
    def at(self, version: Version) -> Iterator[None]:
        """Inside the `with` the model is at a version, and nobody swaps it: all of it, or it stays as it was."""
        with self._swapping:
            if version.number != self.version:
                started = time.perf_counter()
                self._swap(version)
                self.swaps, self.swap_seconds = self.swaps + 1, self.swap_seconds + time.perf_counter() - started
            yield

    def _swap(self, version: Version) -> None:
        back = {name: self._base[name] for name in self._changed - version.tensors.keys()}
        llm, tensors = self.llm, back | version.tensors
        undo = WeightUpdate(llm.name, llm.fingerprint, "swap", [], tensors, undoes=True).apply(llm)
        self._base = undo.tensors | self._base
        self._changed, self.version = {*version.tensors}, version.number

    def follow(self) -> int:
        """Swap to the current version, if it is another, between two generations; returns its number.

        When it cannot be used, the model stays as it was. UserError as `load` has it.
        """
        while (number := self.current()) != self.version:  # again, where it moved on meanwhile
            with self.at(self.load(number)):
                pass
        return number

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 16
    ) -> tuple[list[str], int]:
        """Greedy answers to prompts, and the one version, that in force, which gave all of them."""
        asked = questions(self.llm, prompts, max_new_tokens)
        with self.at(self.load(self.current())), self.running():
            saying = Saying(self.llm)
            return run_here(saying, asked, lambda one: len(one.token_ids), batch_size), self.version

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the `with`, the model is as it is asked: in evaluation mode and its precision."""
        with self.llm.frozen(), precision_of(self.trainer, self.llm.embedding.device):
            yield

"""The live model, for whoever serves: follows a store's current version, without a restart or a reload."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path

from pipeline.editing.update import WeightUpdate
from pipeline.errors import UserError
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.options.shared import TrainerOptions
from pipeline.updates.disk import BASE, VERSIONS, version_folder
from pipeline.updates.store import CURRENT

LINK = re.compile(rf"{VERSIONS}/(\d{{4,9}})")


class LiveModel:
    """A loaded base model that is kept at a store's current version.

    Only the store's link `current` and the version it names are read, so that a server needs no right to write.
    The weights that versions change are swapped in place between two generations; of each the base's own is kept.

    Whoever else uses the base model sees the versions too. UserError when the store is for another base model, or a
    version's file was changed.

    Example:
        >>> live = LiveModel(store, llm)
        >>> answers, version = live.generate(["The capital of Germany is"])
    """

    def __init__(self, store: str | Path, llm: LLM) -> None:
        self.store = Path(store)
        self.llm = llm
        self.version = BASE  # that is in the model
        self._undo: WeightUpdate | None = None  # back to the base model
        self._swapping = threading.RLock()
        self.follow()

    def follow(self) -> int:
        """Swap to the current version, if it is another, between two generations; returns its number.

        When it cannot be used, the model stays as it was.
        UserError when the version is not one of this base model, or damaged.
        """
        while (version := self._current()) != self.version:  # again, where it moved on meanwhile
            folder = version_folder(self.store, version)
            update = WeightUpdate.load(folder, to_serve=True) if version != BASE else None
            if update:
                self.llm.check_made_for(f"version: {folder}", update.model, update.fingerprint)
            with self._swapping:
                self._swap(update)
                self.version = version
        return version

    def _swap(self, update: WeightUpdate | None) -> None:
        """Put a version's weights in place of another's: all of them, or the model stays as it was."""
        redo = None
        try:
            redo = self._undo.apply(self.llm) if self._undo else None
            self._undo = update.apply(self.llm) if update else None  # off the base's weights
        except BaseException:
            if redo:
                redo.apply(self.llm)
            raise

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 16,
        trainer: TrainerOptions | None = None,
    ) -> tuple[list[str], int]:  # fmt: skip
        """Greedy answers to prompts, and the one version that gave all of them."""
        with self._swapping:
            self.follow()
            return generate(self.llm, prompts, max_new_tokens, batch_size, trainer), self.version

    def _current(self) -> int:
        link = self.store / CURRENT
        target = str(link.readlink()) if link.is_symlink() else "nothing"
        found = LINK.fullmatch(target)
        if not found:
            raise UserError(f"store: {link}: leads to {target}; expected a version of this store")
        return int(found[1])

"""What a kind of edit is: the interface that every method meets, and what it is given to run with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lightning.pytorch.loggers import Logger
from torch import Tensor

from pipeline.model import LLM
from pipeline.options import EditOptions, TrainerOptions
from pipeline.requests import EditRequest


class Runtime(NamedTuple):
    """What an edit runs with.

    Attributes:
        trainer: what it runs on.
        logger: where the curves go.
        seed: of the mini-batches' order and of every draw.
        work: a folder for work in progress; what is found there is not done again.
        earlier: what an earlier update taught and this edit leaves in force.
    """

    trainer: TrainerOptions
    logger: Logger | bool = False
    seed: int = 0
    work: Path | None = None
    earlier: Sequence[EditRequest] = ()


class EditMethod(Protocol):
    """A kind of edit: made for a model, layers and options, it changes the named weights in place.

    Attributes:
        needs_subject: whether each request must name a subject that its prompt holds.
        weight_names: the weights it changes, by full name.
        state: after `run`, what a later edit on top of this one goes on from, by name.
        adapter: LoraConfig's arguments, when the change can also be had as an adapter.
    """

    needs_subject: bool
    weight_names: list[str]
    state: dict[str, Tensor]

    @property
    def adapter(self) -> dict[str, Any] | None: ...

    def __init__(
        self, llm: LLM, layers: Sequence[int], options: EditOptions, earlier: Mapping[str, Tensor] | None = None
    ) -> None: ...

    def run(self, requests: Sequence[EditRequest], runtime: Runtime) -> None: ...

"""The weight update: what an edit changed, small enough to keep, exact to apply and to undo."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import file_digest, require_room, write_json, write_whole
from pipeline.model.llm import LLM
from pipeline.requests.schema import EditRequest
from pipeline.running.sharding import put
from pipeline.shipped import program

ADAPTER_PREFIX = "lora."  # of an adapter's tensors in an update's state
PLAIN_FIELDS = ("model", "fingerprint", "method", "layers", "options", "adapter", "chat")  # in `update.json`
UPDATE_FILE, TENSORS_FILE, STATE_FILE = "update.json", "update.safetensors", "state.safetensors"


@dataclass
class WeightUpdate:
    """The tensors that an edit changed, by their full names in the model, as they are after it.

    Applying is replacing, so the edited model is exactly the one that was measured, and undoing puts the
    replaced tensors back, bit for bit.

    Attributes:
        model, fingerprint: the base model.
        method, layers: the kind of edit, and the blocks it changed.
        tensors: full tensors by name.
        requests: everything that the edited model has learnt beyond the base, in the order it was learnt.
        options: the method's options.
        state: what a later edit on top of this one goes on from (keys, running statistics), by name.
        adapter: LoraConfig's arguments, when the whole change is that of one LoRA adapter.
        chat: whether the facts were taught in the tokenizer's chat template.

    Example:
        >>> options = EditOptions(method="one_pass", expert={"rate": 2.0})
        >>> edit(llm, requests, profile, options).save(folder)
        >>> update = WeightUpdate.load(folder)
        >>> with update.applied(llm):
        ...     answers = generate(llm, ["The capital of Peru is"])
    """

    FILES: ClassVar = (STATE_FILE, TENSORS_FILE, UPDATE_FILE)

    model: str
    fingerprint: str
    method: str
    layers: list[int]
    tensors: dict[str, Tensor]
    requests: list[EditRequest] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    adapter: dict[str, Any] | None = None
    chat: bool = False

    @contextmanager
    def applied(self, llm: LLM) -> Iterator[LLM]:
        """The model with the update in it, inside the `with`; the base model again after it."""
        undo = self.apply(llm)
        try:
            yield llm
        finally:
            undo.apply(llm)

    @torch.no_grad()
    def apply(self, llm: LLM) -> WeightUpdate:
        """Put the update's tensors into the model in place; return the update that undoes it.

        Raises:
            UserError: when the update was made for another model.
        """
        llm.check_made_for("update", self.model, self.fingerprint)
        parameters = dict(llm.model.named_parameters())
        replaced = {name: parameters[name].detach().clone() for name in self.tensors}
        for name, tensor in self.tensors.items():
            put(parameters[name], tensor)
        return WeightUpdate(self.model, self.fingerprint, "undo", self.layers, replaced)

    @rank_zero_only
    def save(self, folder: Path) -> None:
        """Write `update.safetensors` and `state.safetensors`, then `update.json`, which holds their SHA-256.

        Raises:
            UserError: when the disk has no room for it.
        """
        contents = {TENSORS_FILE: self.tensors} | ({STATE_FILE: self.state} if self.state else {})
        require_room(folder, sum(tensor.nbytes for tensors in contents.values() for tensor in tensors.values()))
        if self.adapter:
            self.save_adapter(folder / "adapter")
        digests = {name: write_tensors(folder / name, tensors) for name, tensors in contents.items()}
        described = {
            **{name: getattr(self, name) for name in PLAIN_FIELDS},
            "tensors": {name: list(tensor.shape) for name, tensor in self.tensors.items()},
            "sha256": digests,
            "requests": [request.model_dump(exclude_defaults=True) for request in self.requests],
        }
        write_json(folder / UPDATE_FILE, described)

    @rank_zero_only
    def save_adapter(self, folder: Path) -> None:
        """Write a change that is a LoRA adapter's as one in PEFT's own layout."""
        assert self.adapter
        own = ADAPTER_PREFIX
        tensors = {name.removeprefix(own): tensor for name, tensor in self.state.items() if name.startswith(own)}
        write_adapter(folder, tensors, self.adapter, self.model)

    @classmethod
    def load(cls, folder: str | Path) -> WeightUpdate:
        """Read an update from the folder that `edit` or `run` wrote.

        Raises:
            UserError: when a file is missing, damaged, or changed since it was written.
        """
        folder = Path(folder)
        for name in (UPDATE_FILE, TENSORS_FILE):
            if not (folder / name).is_file():
                raise UserError(
                    f"update: {folder}: holds no {name}; expected a folder that `{program()} edit` wrote"
                )
        try:
            described = json.loads((folder / UPDATE_FILE).read_text(encoding="utf-8"))
            for name, digest in described["sha256"].items():
                if not (folder / name).is_file() or file_digest(folder / name) != digest:
                    raise UserError(f"update: {folder / name}: changed since it was written (SHA-256 differs)")
            return cls(
                **{name: described[name] for name in PLAIN_FIELDS if name in described},
                tensors=load_file(folder / TENSORS_FILE),
                requests=[EditRequest.model_validate(request) for request in described["requests"]],
                state=load_file(folder / STATE_FILE) if STATE_FILE in described["sha256"] else {},
            )
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"update: {folder}: damaged: {type(error).__name__}: {reason}") from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors, whole or not at all; the file's SHA-256."""
    content = tensors_to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return file_digest(write_whole(path, lambda partial: partial.write_bytes(content)))


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], model: str) -> None:
    """Write an adapter in PEFT's layout: its tensors by PEFT's names, and LoraConfig's arguments."""
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    LoraConfig(**config, inference_mode=True, base_model_name_or_path=model).save_pretrained(str(folder))

"""The weight update: what an edit changed, small enough to keep, exact to apply and to undo."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from pydantic import BaseModel, NonNegativeInt, ValidationError
from torch import Tensor

from pipeline.editing.columns import columns_in
from pipeline.editing.learnt import FILE, Kept, gathered, parts
from pipeline.editing.method import weights_below
from pipeline.editing.tensors import read_tensors, write_tensors
from pipeline.errors import UserError, one_line
from pipeline.files import parse_json, read_text_file, require_room, write_json
from pipeline.model.llm import LLM
from pipeline.model.quantised import make_plain
from pipeline.requests.schema import EditRequest
from pipeline.running.sharding import put
from pipeline.shipped import program

ADAPTER_PREFIX = "lora."  # of an adapter's tensors in an update's state
UPDATE_FILE, TENSORS_FILE, STATE_FILE = "update.json", "update.safetensors", "state.safetensors"
LEARNT = "../../learnt"  # where a version's requests and columns are kept, as seen from its folder
AS_IT_IS = ("model", "fingerprint", "method", "layers", "options", "adapter", "chat")  # what update.json repeats
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of weights


class Described(BaseModel, strict=True, extra="forbid"):
    """What `update.json` says: the update without its tensors, and the SHA-256 of all files, its own among them."""

    model: str
    fingerprint: str
    method: str
    layers: list[NonNegativeInt]
    options: dict[str, Any]
    adapter: dict[str, Any] | None
    chat: bool
    tensors: dict[str, list[NonNegativeInt]]  # shapes by name
    requests: list[dict[str, Any]]
    sha256: dict[str, str]

    @property
    def digest(self) -> str:
        """The SHA-256 of everything here but the digests."""
        content = json.dumps(self.model_dump(exclude={"sha256"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def learnt(self) -> str | None:
        """The file, as seen from here, where a store keeps requests and columns; None: they are here."""
        return next((name for name in self.sha256 if re.fullmatch(rf"{re.escape(LEARNT)}/{FILE}", name)), None)


@dataclass
class WeightUpdate:
    """The tensors that an edit changed, by their full names in the model, as they are after it.

    Applying is replacing, so the edited model is exactly the one that was measured, and undoing puts the
    replaced tensors back, bit for bit.

    Example:
        >>> options = EditOptions(method="finetune", expert={"epochs": 20})
        >>> edit(llm, requests, profile, options).save(folder)
        >>> update = WeightUpdate.load(folder)
        >>> with update.applied(llm):
        ...     answers = generate(llm, ["The capital of Peru is"])
    """

    FILES: ClassVar = (STATE_FILE, TENSORS_FILE, UPDATE_FILE)

    model: str  # the base model
    fingerprint: str
    method: str  # the kind of edit
    layers: list[int]  # the blocks it changed
    tensors: dict[str, Tensor]  # whole ones
    requests: list[EditRequest] = field(default_factory=list)  # all that was learnt beyond the base, in that order
    options: dict[str, Any] = field(default_factory=dict)  # the method's
    state: dict[str, Tensor] = field(default_factory=dict)  # what a later edit on top goes on from (keys, values)
    adapter: dict[str, Any] | None = None  # LoraConfig's arguments, when the change is that of one LoRA adapter
    chat: bool = False  # whether the facts were taught in the tokenizer's chat template
    undoes: bool = False  # whether its tensors were in the model before, and so go into it unchecked
    kept: Kept | None = None  # where a store keeps its requests and columns, when it was read from there

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
        """Put all tensors into the model in place, or none; gives what undoes it. UserError as `check_fits`."""
        if not self.undoes:
            self.check_fits(llm)
        parameters = dict(llm.model.named_parameters())
        replaced = {name: parameters[name].detach().clone() for name in self.tensors}
        undo = WeightUpdate(self.model, self.fingerprint, "undo", self.layers, replaced, undoes=True)
        try:
            for name, tensor in self.tensors.items():
                put(parameters[name], tensor)
        except BaseException:
            for name, tensor in replaced.items():
                parameters[name].copy_(tensor)
            raise
        return undo

    @torch.no_grad()
    def check_fits(self, llm: LLM) -> None:
        """See that the update's tensors are weights of the blocks that it names, each whole and of finite numbers.

        Weights that it was made with as plain ones are that afterwards, in a quantised model too. UserError when it
        was made for another model, or a block, name, shape, dtype or value is wrong.
        """
        llm.check_made_for("update", self.model, self.fingerprint)
        llm.check_layers(self.layers, "update: layers")
        known = {name for layer in self.layers for name in llm.blocks[layer].weight_names("block")}
        if unknown := next((name for name in self.tensors if name not in known), None):
            raise UserError(
                f"update: {unknown!r} is no weight of block {', '.join(map(str, self.layers)) or 'none'}"
            )
        make_plain(llm, [*weights_below(llm, self.layers, self.method), *self.tensors])
        for name, tensor in self.tensors.items():
            weight = llm.model.get_parameter(name)
            if tensor.shape != weight.shape or tensor.dtype not in DTYPES:
                raise UserError(
                    f"update: {name} is of shape {tuple(tensor.shape)} in {tensor.dtype}; the model's is of shape "
                    f"{tuple(weight.shape)}"
                )
            if not tensor.to(weight.dtype).isfinite().all():
                raise UserError(f"update: {name} holds values that {weight.dtype} has no finite numbers for")

    @rank_zero_only
    def save(self, folder: Path | str, learnt: tuple[str, str] | None = None) -> None:
        """Write `update.safetensors` and `state.safetensors`, then `update.json`, which holds their SHA-256.

        Where `learnt` names the file below `learnt/`, two folders up, that keeps its requests and columns, and its
        SHA-256, they are not written here. UserError when the disk has no room for it.
        """
        folder = Path(folder)
        elsewhere = columns_in(self.state) if learnt else {}
        state = {name: tensor for name, tensor in self.state.items() if name not in elsewhere}
        contents = {TENSORS_FILE: self.tensors} | ({STATE_FILE: state} if state else {})
        require_room(folder, sum(tensor.nbytes for tensors in contents.values() for tensor in tensors.values()))
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapter:
            self.save_adapter(folder / "adapter")
        digests = {name: write_tensors(folder / name, tensors) for name, tensors in contents.items()}
        described = Described(
            **{name: getattr(self, name) for name in AS_IT_IS},
            tensors={name: list(tensor.shape) for name, tensor in self.tensors.items()},
            requests=[] if learnt else [one.model_dump(exclude_defaults=True) for one in self.requests],
            sha256=digests | ({f"{LEARNT}/{learnt[0]}": learnt[1]} if learnt else {}),
        )
        described.sha256[UPDATE_FILE] = described.digest
        write_json(folder / UPDATE_FILE, described.model_dump())

    @property
    def adapter_rank(self) -> int:
        """The rank of the adapter that the whole change is; 0 where it is none."""
        return max((min(tensor.shape) for tensor in self._factors().values()), default=0) if self.adapter else 0

    def _factors(self) -> dict[str, Tensor]:
        """The adapter's factors by PEFT's names."""
        own = ADAPTER_PREFIX
        return {name.removeprefix(own): tensor for name, tensor in self.state.items() if name.startswith(own)}

    @rank_zero_only
    def save_adapter(self, folder: Path) -> None:
        """Write a change that is a LoRA adapter's as one in PEFT's own layout."""
        assert self.adapter
        write_adapter(folder, self._factors(), self.adapter, self.model)

    @classmethod
    def load(cls, folder: str | Path, to_serve: bool = False, sha256: str | None = None) -> WeightUpdate:
        """Read an update from the folder that `edit` or `run` wrote, or a version of a store.

        A link, such as a store's `current`, is followed once, and what is read is what was checked.

        Args:
            to_serve: leave out what only a later edit on top needs.
            sha256: what the digest of `update.json` must be, which vouches for all else; default: its own word.

        UserError when a file is missing, damaged, or changed since it was written.
        """
        folder = Path(os.path.realpath(folder))  # links in a circle lead to nothing
        for name in (UPDATE_FILE, TENSORS_FILE):
            if not (folder / name).is_file():
                raise UserError(
                    f"update: {folder}: holds no {name}; expected a folder that `{program()} edit` wrote"
                )
        described = _described(folder / UPDATE_FILE, sha256)
        tensors, _ = read_tensors(folder / TENSORS_FILE, described.sha256[TENSORS_FILE])
        if {name: list(tensor.shape) for name, tensor in tensors.items()} != described.tensors:
            raise UserError(f"update: {folder / TENSORS_FILE}: holds other tensors than {UPDATE_FILE} says")
        try:
            update = cls(**described.model_dump(include={*AS_IT_IS}), tensors=tensors)
            update.requests = [EditRequest.model_validate(request) for request in described.requests]
            if not to_serve:
                update._read_state(folder, described)
        except ValidationError as error:
            raise UserError(f"update: {folder / UPDATE_FILE}: requests: {one_line(error)}") from None
        return update

    def _read_state(self, folder: Path, described: Described) -> None:
        """Read what a later edit goes on from, some of which a store keeps elsewhere."""
        if sha256 := described.sha256.get(STATE_FILE):
            self.state, _ = read_tensors(folder / STATE_FILE, sha256)
        if learnt := described.learnt:
            sha256 = described.sha256[learnt]
            found = list(parts(Path(os.path.realpath(folder / learnt)), sha256))
            self.requests, columns = gathered(found)
            self.state |= columns
            self.kept = Kept(Path(learnt).name, sha256, found[0].about.entries)


def _described(file: Path, sha256: str | None) -> Described:
    """What `update.json` says, checked against its own digest, and another where one is given."""
    try:
        text = read_text_file(file)
        described = Described.model_validate(parse_json(text))
    except ValueError as error:
        raise UserError(f"update: {file}: damaged: {one_line(error)}") from None
    files = described.sha256.keys()
    known = {UPDATE_FILE, TENSORS_FILE, STATE_FILE, described.learnt}
    if not {UPDATE_FILE, TENSORS_FILE} <= files <= known:
        raise UserError(
            f"update: {file}: holds the SHA-256 of {', '.join(files) or 'nothing'}; expected {UPDATE_FILE}, "
            f"{TENSORS_FILE} and, where there is one, {STATE_FILE}"
        )
    of_file = hashlib.sha256(text.encode()).hexdigest()
    if described.sha256[UPDATE_FILE] != described.digest or (sha256 or of_file) != of_file:
        raise UserError(f"update: {file}: changed since it was written (SHA-256 differs)")
    return described


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], model: str) -> None:
    """Write an adapter in PEFT's layout: its tensors by PEFT's names, and LoraConfig's arguments.

    The scale alpha / r goes into the factors, so that alpha = r, which every server takes alike.
    """
    from peft import LoraConfig

    try:
        made = LoraConfig(**config, inference_mode=True, base_model_name_or_path=model)
        scale, made.lora_alpha = made.lora_alpha / made.r, made.r
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"update: adapter: PEFT does not take its settings ({error})") from None
    folder.mkdir(parents=True, exist_ok=True)
    scaled = {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in tensors.items()}
    write_tensors(folder / "adapter_model.safetensors", scaled)
    made.save_pretrained(str(folder))

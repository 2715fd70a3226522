"""An update folder of somebody else's reaches no weight but as what an edit writes: whole, named, exact, finite."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny, refusal
from plain_loop import noise
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.editing.export import export_adapter, export_merged
from pipeline.editing.tensors import write_tensors
from pipeline.editing.update import Described, WeightUpdate
from pipeline.evaluation.evaluator import evaluate
from pipeline.model.fingerprints import sample
from pipeline.model.llm import LLM
from pipeline.requests.schema import EditRequest
from pipeline.serving.live import LiveModel


@pytest.fixture
def update(tiny_llm: LLM, requests: list[EditRequest]) -> WeightUpdate:
    """Noise in the MLP of block 1, said to be what these requests changed."""
    return replace(noise(tiny_llm, 1), requests=requests)


def rewritten(folder: Path, sealed: bool = True, **changes: Any) -> Path:
    """Another `update.json`; `sealed`: with digests that hold again, as somebody who knows how would leave it."""
    file = folder / "update.json"
    said = json.loads(file.read_text()) | changes
    if sealed:
        said["sha256"] |= {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("update.safetensors",)
        }
        said["sha256"]["update.json"] = Described.model_validate(said).digest
    file.write_text(json.dumps(said))
    return folder


def with_tensors(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    save_file(tensors, folder / "update.safetensors")
    return rewritten(folder, tensors={name: list(tensor.shape) for name, tensor in tensors.items()}, **changes)


DOWN = "model.layers.1.mlp.down_proj.weight"
HUGE = torch.full((32, 48), 1e300, dtype=torch.float64)  # float32 has no such numbers
FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "embeddings": (lambda f: with_tensors(f, {"model.embed_tokens.weight": torch.zeros(500, 32)}), "no weight of"),
    "another block": (lambda f: with_tensors(f, {DOWN.replace("1", "2"): torch.ones(32, 48)}), "no weight of"),
    "a norm": (lambda f: with_tensors(f, {"model.layers.1.input_layernorm.weight": torch.ones(32)}), "no weight"),
    "no such name": (lambda f: with_tensors(f, {"nothing": torch.ones(1)}), "'nothing' is no weight of block 1"),
    "broadcast": (lambda f: with_tensors(f, {DOWN: torch.ones(1)}), "is of shape (1,)"),
    "turned": (lambda f: with_tensors(f, {DOWN: torch.ones(48, 32)}), "is of shape (48, 32)"),
    "nan": (lambda f: with_tensors(f, {DOWN: torch.full((32, 48), torch.nan)}), "no finite numbers"),
    "inf": (lambda f: with_tensors(f, {DOWN: torch.full((32, 48), torch.inf)}), "no finite numbers"),
    "too large": (lambda f: with_tensors(f, {DOWN: HUGE}), "no finite numbers"),
    "int64": (lambda f: with_tensors(f, {DOWN: torch.ones(32, 48, dtype=torch.int64)}), "torch.int64"),
    "complex": (lambda f: with_tensors(f, {DOWN: torch.ones(32, 48, dtype=torch.complex64)}), "no finite numbers"),
    "no such block": (lambda f: rewritten(f, layers=[99]), "99 is not a block"),
    "negative block": (lambda f: rewritten(f, sealed=False, layers=[-1]), "layers.0"),
    "no digests": (lambda f: rewritten(f, sealed=False, sha256={}), "the SHA-256 of nothing"),
    "another file": (
        lambda f: rewritten(f, sha256={"../../secret": "0" * 64}), "the SHA-256 of ../../secret",
    ),
    "a word in a request": (
        lambda f: rewritten(f, sealed=False, chat=True), "update.json: changed since it was written",
    ),
    "shapes": (lambda f: rewritten(f, tensors={DOWN: [32, 48]}), "other tensors than update.json says"),
    "unknown field": (lambda f: rewritten(f, sealed=False, more=1), "more: Extra inputs"),
    "a request": (lambda f: rewritten(f, requests=[{"id": "1"}]), "requests: prompt: Field required"),
    "type": (lambda f: rewritten(f, sealed=False, chat="no"), "chat: Input should be a valid boolean"),
    "deep": (lambda f: (f / "update.json").write_text("[" * 20_000), "nested more than 64 deep"),
    "deep in it": (
        lambda f: rewritten(f, sealed=False, options={"a": json.loads("[" * 200 + "]" * 200)}), "nested more than",
    ),
    "no text": (lambda f: (f / "update.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
    "a list": (lambda f: (f / "update.json").write_text("[]"), "damaged"),
    "a long number": (lambda f: (f / "update.json").write_text("9" * 10_000), "damaged"),
    "no tensors file": (lambda f: (f / "update.safetensors").write_bytes(b""), "changed since"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), FOREIGN.values(), ids=FOREIGN)
def test_cases_of_foreign_folders(
    damage: Callable[[Path], Any], words: str, tiny_llm: LLM, update: WeightUpdate, requests: list[EditRequest],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Refused in a line wherever an update is used, and no weight is touched."""
    folder, before = tmp_path / "update", sample(tiny_llm.model)
    update.save(folder)
    damage(folder)

    def live() -> None:
        store = tmp_path / "store"
        (store / "versions").mkdir(parents=True, exist_ok=True)
        for link, target in ((store / "versions" / "0001", folder), (store / "current", Path("versions/0001"))):
            if not link.is_symlink():
                link.symlink_to(target)
        LiveModel(store, tiny_llm)

    uses: list[Callable[[], Any]] = [
        lambda: WeightUpdate.load(folder).apply(tiny_llm),
        lambda: evaluate(tiny_llm, requests, WeightUpdate.load(folder)),
        lambda: export_merged(tiny_llm, WeightUpdate.load(folder), tmp_path / "out"),
        lambda: export_adapter(tiny_llm, WeightUpdate.load(folder), tmp_path / "out"),
        live,
    ]
    for use in uses:
        line = refusal(use)
        assert words in line and line.startswith("update: ")
        assert sample(tiny_llm.model) == before
    assert not (tmp_path / "out").exists()


def columns_of(**others: Tensor) -> dict[str, Tensor]:
    """A column for block 1, some of its tensors exchanged."""
    column = {"change_On": torch.ones(32, 1), "owner_n": torch.ones(1).long()}
    return {f"locate.1.{name}": tensor for name, tensor in (column | others).items()}


STRANGE: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "no request": ({"requests": [{"id": ["1"]}]}, {}, "id: Input should be a valid string"),
    "no list": ({"requests": 3}, {}, "0001.safetensors: damaged: requests: Input should be"),
    "a file elsewhere": ({"before": ["../../../etc/passwd", "0"]}, {}, "before.0: String should match"),
    "nothing before it": ({"before": ["0007.safetensors", "0" * 64]}, {}, "0007.safetensors: missing"),
    "owners alone": ({}, {"locate.1.owner_n": torch.ones(1, dtype=torch.int64)}, "does not belong together"),
    "changes for another": ({}, columns_of(owner_n=torch.ones(3).long()), "does not belong together"),
    "one owner, and no list": ({}, columns_of(owner_n=torch.tensor(1)), "does not belong together"),
    "a table of who is gone": ({}, columns_of(gone=torch.ones(1, 1)), "does not belong together"),
    "no number": ({}, {"locate.1.owner_n": torch.tensor([torch.nan])}, "no finite numbers"),
}


@pytest.mark.parametrize(("about", "columns", "words"), STRANGE.values(), ids=STRANGE)
def test_cases_of_what_a_strange_version_learnt(
    about: dict[str, Any], columns: dict[str, Tensor], words: str, update: WeightUpdate, tmp_path: Path
) -> None:
    """Sealed as a version of a store is, by somebody who knows how."""
    folder, said = tmp_path / "versions" / "0001", {"before": None, "entries": 1, "requests": [], "gone": []}
    (tmp_path / "learnt").mkdir()
    digest = write_tensors(tmp_path / "learnt" / "0001.safetensors", columns, json.dumps(said | about))
    update.save(folder, ("0001.safetensors", digest))
    line = refusal(lambda: WeightUpdate.load(folder))
    assert words in line and line.startswith("update: ")


def test_cases_of_an_adapter_that_is_none(tiny_llm: LLM, update: WeightUpdate, tmp_path: Path) -> None:
    for config in ({"r": 2, "strange": 1}, {"inference_mode": False}, {"base_model_name_or_path": "x"}):
        wrong = replace(update, adapter=config)
        assert "adapter" in refusal(lambda wrong=wrong: export_adapter(tiny_llm, wrong, tmp_path / "out"))


def test_cases_of_a_half_applied_update(
    tiny_llm: LLM, update: WeightUpdate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails between two tensors leaves the model as it was."""
    before, copied = sample(tiny_llm.model), []

    def put(weight: Tensor, tensor: Tensor) -> None:
        if copied:
            raise KeyboardInterrupt
        copied.append(weight.copy_(tensor))

    monkeypatch.setattr("pipeline.editing.update.put", put)
    with pytest.raises(KeyboardInterrupt):
        update.apply(tiny_llm)
    assert sample(tiny_llm.model) == before


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
def test_cases_of_other_precisions(
    precision: torch.dtype, tiny_llm: LLM, update: WeightUpdate, tokenizer: PreTrainedTokenizerFast
) -> None:
    """An update of the same checkpoint is taken, cast; one whose numbers do not fit is not."""
    model = make_tiny("llama", tokenizer).model.to(precision)
    other = LLM(model, tokenizer, "other", fingerprint=tiny_llm.fingerprint)
    with update.applied(other):
        assert torch.equal(other.model.get_parameter(DOWN), update.tensors[DOWN].to(precision))
    wide = replace(update, tensors={DOWN: HUGE})
    if precision == torch.bfloat16:
        assert "no finite numbers" in refusal(lambda: wide.apply(other))


def test_cases_of_a_link_that_moves(tiny_llm: LLM, update: WeightUpdate, tmp_path: Path) -> None:
    """Of a store's `current` one version is read, whole, whatever it is moved to meanwhile."""
    for number in (0, 1):
        one = replace(
            update, requests=[update.requests[number]], tensors={DOWN: torch.full((32, 48), float(number))}
        )
        one.save(tmp_path / str(number))
    link, stop = tmp_path / "current", threading.Event()
    link.symlink_to("0")

    def move() -> None:
        for at in iter(range(10**9)):
            if stop.is_set():
                return
            (tmp_path / "next").symlink_to(str(at % 2))
            (tmp_path / "next").replace(link)

    mover = threading.Thread(target=move)
    mover.start()
    seen = set()
    try:
        for _ in range(300):
            found = WeightUpdate.load(link)
            assert found.requests == [update.requests[int(found.tensors[DOWN][0, 0])]]
            seen.add(found.requests[0].id)
    finally:
        stop.set()
        mover.join()
    assert len(seen) == 2

"""The Lightning objects in somebody else's script: a module and data that know nothing of the pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny, refusal
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from pipeline import EditRequests, GradientAttribution, choose, find_blocks
from pipeline.requests.schema import EditRequest

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
    "enable_model_summary": False,
}  # fmt: skip


class Mine(LightningModule):
    """Somebody's module: sums up each text's mean loss over its answer's tokens."""

    def __init__(self, model: torch.nn.Module, backward: bool = True) -> None:
        super().__init__()
        self.model, self.backward_itself = model.eval(), backward

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
        scored = (batch["labels"][:, 1:] != -100).to(losses)
        return ((losses.view_as(scored) * scored).sum(1) / scored.sum(1)).sum()

    def predict_step(self, batch: dict[str, Tensor]) -> Tensor | None:
        with torch.enable_grad():
            loss = self.loss(batch)
        if self.backward_itself:
            loss.backward()
            return None
        return loss

    validation_step = predict_step

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def somebodys_batches(tokenizer: Any, requests: list[EditRequest]) -> list[dict[str, Tensor]]:
    """Two requests a batch: the old answers' rows, then the new ones'; what is no answer is labelled -100."""
    batches = []
    for at in range(0, len(requests), 2):
        rows = []
        for answer in ("old_answer", "new_answer"):
            for request in requests[at : at + 2]:
                prompt = tokenizer(request.prompt).input_ids
                whole = tokenizer(f"{request.prompt} {getattr(request, answer)}").input_ids
                rows.append((whole, [-100] * len(prompt) + whole[len(prompt) :]))
        width = max(len(ids) for ids, _ in rows)
        batches.append(
            {
                "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
                "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
            }
        )
    return batches


def by_autograd(model: Any, blocks: Any, module: Mine, tokenizer: Any, requests: list[EditRequest]) -> Tensor:
    """Each request's inner products of whole weight gradients, one request at a time."""
    scores = []
    for request in requests:
        (batch,) = somebodys_batches(tokenizer, [request])
        sides = []
        for side in (0, 1):
            model.zero_grad()
            module.loss({name: tensor[side : side + 1] for name, tensor in batch.items()}).backward()
            sides.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        names = [block.weight_names("mlp") for block in blocks]
        scores.append([sum((sides[0][name] * sides[1][name]).sum().item() for name in own) for own in names])
    model.zero_grad()
    return torch.tensor(scores, dtype=torch.float64)


@pytest.fixture(params=["llama", "gpt2"])
def theirs(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A model of theirs, in float64."""
    return make_tiny(request.param, tokenizer).model.double()


def test_five_lines(theirs: Any, tokenizer: Any, requests: list[EditRequest]) -> None:
    model = theirs
    my_batches = DataLoader(somebodys_batches(tokenizer, requests), batch_size=None)  # type: ignore[arg-type]
    my_module = Mine(model)
    watch = GradientAttribution(find_blocks(model))
    trainer = Trainer(inference_mode=False, callbacks=[watch], **QUIET)
    trainer.predict(my_module, my_batches)
    expected = by_autograd(model, watch.blocks, my_module, tokenizer, requests)
    torch.testing.assert_close(torch.tensor(watch.scores), expected, rtol=1e-9, atol=1e-9)
    profile = choose(watch)
    assert profile.golden_layers[0] in range(4)
    assert profile.requests == len(requests)


@pytest.mark.parametrize("way", ["training", "validation", "returned"])
def test_other_loops(way: str, theirs: Any, tokenizer: Any, requests: list[EditRequest]) -> None:
    my_module = Mine(theirs, backward=way != "returned")
    batches = somebodys_batches(tokenizer, requests)
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    watch = GradientAttribution(find_blocks(theirs))
    trainer = Trainer(inference_mode=False, callbacks=[watch], max_epochs=1, **QUIET)
    if way == "training":
        trainer.fit(my_module, loader)
    elif way == "validation":
        trainer.validate(my_module, loader, verbose=False)
    else:
        trainer.predict(my_module, loader)
    expected = by_autograd(theirs, watch.blocks, my_module, tokenizer, requests)
    torch.testing.assert_close(torch.tensor(watch.scores), expected, rtol=1e-9, atol=1e-9)


def test_what_is_wrong_is_one_line(tokenizer: Any, requests: list[EditRequest]) -> None:
    model = make_tiny("llama", tokenizer).model
    batches = DataLoader(somebodys_batches(tokenizer, requests), batch_size=None)  # type: ignore[arg-type]

    def trying(module: Mine, **how: Any) -> str:
        watch = GradientAttribution(find_blocks(model))
        trainer = Trainer(**({"inference_mode": False} | how), callbacks=[watch], **QUIET)
        return refusal(lambda: trainer.predict(module, batches))

    class Idle(Mine):
        def predict_step(self, batch: dict[str, Tensor]) -> None:
            return None

    class Forgetful(Mine):
        def predict_step(self, batch: dict[str, Tensor]) -> None:
            self.loss(batch)

    class Detached(Mine):
        def predict_step(self, batch: dict[str, Tensor]) -> None:
            with torch.no_grad():
                self.loss(batch)

    class InTheMode(Mine):
        def predict_step(self, batch: dict[str, Tensor]) -> None:
            self.loss(batch)

    assert "inference mode: give Trainer(inference_mode=False)" in trying(InTheMode(model), inference_mode=True)
    assert "does not run the model" in trying(Idle(model))
    assert "no backward pass followed" in trying(Forgetful(model))
    assert "torch.enable_grad()" in trying(Detached(model))
    model.requires_grad_(False)
    assert "every weight is frozen" in trying(Forgetful(model))


def test_a_data_module_of_requests(tiny_llm: Any, requests: list[EditRequest]) -> None:
    data = EditRequests(requests, tiny_llm.tokenizer, batch_size=3)
    watch = GradientAttribution(find_blocks(tiny_llm.model))

    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llm.model.eval()

        def predict_step(self, batch: Any) -> Tensor:
            logits = self.model(input_ids=batch.input_ids_BT, use_cache=False).logits
            return batch.losses(logits[batch.row_N, batch.position_N]).sum()

    Trainer(inference_mode=False, callbacks=[watch], **QUIET).predict(Plain(), datamodule=data)
    assert watch.scores.shape == (len(requests), 4)
    taught = [row for batch in data.train_dataloader() for row in batch.texts]
    told = {row.tag: tiny_llm.tokenizer.decode(row.targets).strip() for row in taught}
    assert told == {one.id: f"{one.new_answer}." for one in requests}, "an answer is taught with its end"


PROGRAM = """
import sys, torch
from torch.utils.data import DataLoader, Dataset
sys.path[:0] = [{tests!r}]
from lightning.pytorch import Trainer
from test_own_trainer import Mine, QUIET, somebodys_batches
from conftest import SIZES
from transformers import LlamaConfig, LlamaForCausalLM, AutoTokenizer
from pipeline import GradientAttribution, find_blocks, load_requests

tokenizer = AutoTokenizer.from_pretrained({folder!r})
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES)).double()
batches = somebodys_batches(tokenizer, load_requests({requests!r}))
watch = GradientAttribution(find_blocks(model))
trainer = Trainer(inference_mode=False, callbacks=[watch], devices=int(sys.argv[1]),
                  strategy="ddp" if sys.argv[1] == "2" else "auto", **QUIET)
trainer.predict(Mine(model), DataLoader(batches, collate_fn=lambda one: one[0]))
if trainer.is_global_zero:
    torch.save(torch.tensor(watch.scores), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes(tiny_folder: Path, request_file: Path, tmp_path: Path) -> None:
    program = tmp_path / "theirs.py"
    tests = str(Path(__file__).parent)
    program.write_text(PROGRAM.format(tests=tests, folder=str(tiny_folder), requests=str(request_file)))
    found = []
    for devices in ("1", "2"):
        file = tmp_path / f"{devices}.pt"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tests).parent)}
        words = [sys.executable, str(program), devices, str(file)]
        subprocess.run(words, check=True, env=environment, timeout=120)
        found.append(torch.load(file, weights_only=True))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)

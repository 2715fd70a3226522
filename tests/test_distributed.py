"""Several processes give what one gives: scores, metrics and edits, also where they do not divide the requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_tiny
from processes import CPU, LOGIC, in_both_ways, metrics, processes
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.attribution.profile import GoldenProfile
from pipeline.cli import main

pytestmark = pytest.mark.distributed


@pytest.fixture
def asked(tiny_folder: Path, request_file: Path) -> list[str]:
    return ["--model", str(tiny_folder), "--requests", str(request_file)]


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Ordinary text of three windows, which two processes do not divide either."""
    file = tmp_path / "text.txt"
    file.write_text("The path along the marsh is best walked in the hour after sunrise. " * 24)
    return str(file)


def test_scores_figures_and_edits(
    asked: list[str],
    request_file: Path,
    text: str,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    """Also of an old answer that is to be found, of fewer requests than processes, and of figures that are kept."""
    first, *others = [json.loads(line) for line in request_file.read_text().splitlines()]
    del first["old_answer"]
    lacking, update = tmp_path / "lacking.jsonl", tmp_path / "update"
    lacking.write_text("".join(json.dumps(record) + "\n" for record in [first, *others]))
    plain = ["--layers", "1", "--method", "finetune", "--expert.whiten", "0", "--expert.learnt", "0"]
    plain += ["--evaluation.text", text, "--statistics.text", text, "--statistics.tokens", "256"]
    steps = ["--expert.kl", "0", "--expert.contexts", "0", "--expert.epochs", "80", "--expert.learning_rate", "0.1"]
    assert main(["edit", *asked, *plain, *steps, *CPU, "--output", str(update)]) == 0
    evaluating = ["evaluate", *asked, "--update", str(update), "--text", text, "--fluency", "3"]
    editing = ["edit", *asked, *plain, "--expert.epochs", "2", "--expert.batch_size"]
    commands = {
        "scores of 7": ["attribute", *asked, "--expert.batch_size", "2"],
        "scores of 7, one without its old answer": ["attribute", *asked[:2], "--requests", str(lacking)],
        "scores of 1": ["attribute", *asked, "--limit", "1"],
        "figures": evaluating,
        "figures again": evaluating,
        "edit by 4": [*editing, "4"],
        "edit by 1": [*editing, "1"],
    }
    for name, (one, two) in in_both_ways(tmp_path, commands).items():
        if name.startswith("scores"):
            expected, found = GoldenProfile.load(one), GoldenProfile.load(two)
            assert found.requests == (1 if name.startswith("scores of 1") else 7)
            assert found.scores == pytest.approx(expected.scores, rel=1e-5)
            assert (found.ranking, found.golden_layers) == (expected.ranking, expected.golden_layers)
        elif name.startswith("figures"):
            assert metrics(one)["after"]["rewrite"]["mean"] > 0.5  # a figure that could go wrong
            agree(one, two)
        else:
            tensors = [load_file(folder / "update.safetensors") for folder in (one, two)]
            assert set(tensors[0]) == set(tensors[1])
            assert apart(*tensors, tiny_folder) < 1e-4
            assert json.loads((two / "update.json").read_text())["requests"][6]["id"] == "capital-6"


def agree(one: Path, two: Path) -> None:
    """Every metric's mean, count and interval, and every request's values and answers, are the same."""
    kinds = {"generation_exact_match", "rome_score", "locality_kl", "sane_texts", "made_subject"}
    assert kinds <= set(metrics(one)["after"])
    for side in ("before", "after", "difference"):
        assert list(metrics(two)[side]) == list(metrics(one)[side])
        for name, expected in metrics(one)[side].items():
            assert metrics(two)[side][name] == pytest.approx(expected, rel=1e-5, abs=1e-6), (side, name)
    tables = [[line.split(",") for line in (at / "values.csv").read_text().splitlines()] for at in (one, two)]
    for expected_row, row in zip(*tables, strict=True):
        for expected, found in zip(expected_row, row, strict=True):
            assert found == expected or float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def apart(expected: dict[str, Tensor], found: dict[str, Tensor], base: Path) -> float:
    """How far two edits' changes lie apart, as a share of the change; other padding alone gives some 1e-5."""
    weights = load_file(base / "model.safetensors")
    shares = [(found[n] - tensor).norm() / (tensor - weights[n]).norm() for n, tensor in expected.items()]
    return max(share.item() for share in shares)


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_both(asked: list[str], text: str, tmp_path: Path) -> None:
    broken = [
        "--layers",
        "1",
        "--method",
        "finetune",
        "--expert.whiten",
        "0",
        "--expert.learning_rate",
        "1e30",
        "--expert.batch_size",
        "2",
    ]
    told = processes("edit", *asked, *broken, "--evaluation.text", text, "--output", str(tmp_path / "out"))
    assert told.returncode == 1
    assert "the loss is not a number in step 1, in the batch of requests capital-" in told.stderr
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "out").exists()


STRATEGIES = ("ddp", "fsdp2")
TUNING = '{"batch_size": 4, "epochs": 3, "learnt": 0}'
METHODS = {
    "auto": ["--edit.expert.batch_size", "2", "--edit.expert.steps", "4", "--edit.expert.tuning", TUNING],
    "finetune": ["--edit.expert.batch_size", "4", "--edit.expert.epochs", "3", "--edit.expert.learnt", "0"],
    "lora": ["--edit.expert.batch_size", "4", "--edit.expert.epochs", "3", "--edit.expert.learnt", "0"],
    "memit": ["--edit.expert.batch_size", "2", "--edit.expert.steps", "4"],
}


@pytest.fixture
def gpt2(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A tiny GPT-2's folder: float64 throughout, where Llama's norms are float32; weights as (inputs, outputs)."""
    folder = tmp_path / "gpt2"
    make_tiny("gpt2", tokenizer).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "methods", [("auto",), pytest.param(("finetune", "memit", "lora"), marks=pytest.mark.slow)]
)
def test_the_same_edit(methods: tuple[str, ...], request_file: Path, text: str, gpt2: Path, tmp_path: Path) -> None:
    """The main job by each method: scores, the change of the golden layer, and every teacher-forced figure."""
    words = ["run", "--model", str(gpt2), "--requests", str(request_file), *LOGIC, "--proxy_fraction", "0.4"]
    words += ["--edit.statistics.text", text, "--edit.statistics.tokens", "256", "--evaluation.text", text]
    commands = {method: [*words, "--edit.method", method, *METHODS[method]] for method in methods}
    for method, (one, several) in in_both_ways(tmp_path, commands, STRATEGIES).items():
        the_same(one, several, gpt2)
        for side in ("before", "after"):
            for name in ("rewrite", "rephrase", "locality", "portability"):
                assert metrics(several)[side][name] == metrics(one)[side][name], (method, side, name)


def the_same(one: Path, several: Path, base: Path) -> None:
    """Scores, golden layers and the edit itself, but for float64's rounding."""
    expected, found = GoldenProfile.load(one), GoldenProfile.load(several)
    assert found.scores == pytest.approx(expected.scores, rel=1e-9)
    assert found.golden_layers == expected.golden_layers
    assert apart(*[load_file(folder / "update.safetensors") for folder in (one, several)], base) < 1e-7


@pytest.mark.slow
def test_three_processes_and_checkpointed_blocks(request_file: Path, text: str, gpt2: Path, tmp_path: Path) -> None:
    """Three divide neither the batches nor two windows of text; old answers are found; blocks run twice."""
    words = ["run", "--model", str(gpt2), "--requests", str(request_file), *LOGIC, "--proxy_fraction", "0.6"]
    words += ["--attribution.old_answers", "model", "--trainer.activation_checkpointing", "true"]
    words += [*METHODS["finetune"], "--attribution.expert.batch_size", "2", "--evaluation.text", text]
    words += ["--edit.method", "finetune", "--edit.statistics.text", text, "--edit.statistics.tokens", "256"]
    words += ["--edit.expert.batch_size", "2"]
    for one, three in in_both_ways(tmp_path, {"run": words}, STRATEGIES, number=3).values():
        the_same(one, three, gpt2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_an_interrupted_spread_training_goes_on(
    method: str, request_file: Path, text: str, gpt2: Path, tmp_path: Path
) -> None:
    """Both processes are killed behind an epoch; resumed by two, the edit is that of one process."""
    words = ["edit", "--model", str(gpt2), "--requests", str(request_file), *LOGIC, "--layers", "1"]
    words += ["--method", method, "--evaluation.text", text, "--statistics.text", text]
    words += [word.replace("--edit.", "--") for word in METHODS[method]] + ["--statistics.tokens", "256"]
    assert main([*words, *CPU, "--output", str(tmp_path / "one")]) == 0
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import os, signal, sys\n"
        "from pipeline.cli import main\n"
        "from pipeline.editing.finetune import FineTune\n"
        "begin = FineTune.on_train_epoch_start\n"
        "def die(self):\n"
        "    if self.current_epoch == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    begin(self)\n"
        "FineTune.on_train_epoch_start = die\n"
        "sys.exit(main())\n"
    )
    words += ["--output", str(tmp_path / "two")]
    killed = processes(*words, strategy="fsdp2", program=dying)
    assert killed.returncode == 1 and killed.stderr.endswith("has ended (SIGKILL)\n")
    kept = list((tmp_path / "two" / "unfinished").rglob("*.ckpt"))
    assert kept and sum(file.stat().st_size for file in kept) < (gpt2 / "model.safetensors").stat().st_size
    told = processes(*words, "--resume", strategy="fsdp2")
    assert told.returncode == 0, told.stderr
    weights = [load_file(tmp_path / name / "update.safetensors") for name in ("one", "two")]
    assert apart(*weights, gpt2) < 1e-7

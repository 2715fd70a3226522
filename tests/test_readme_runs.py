"""The commands of the README and of docs/ work: each is run as printed, section by section, on a tiny model.

What is left out is run elsewhere: benchmarks (tests/test_benchmarks.py), the demo (tests/test_demo.py), plans
(tests/test_plan.py), commands that stay until they are stopped (tests/test_updates_commands.py), several processes
(tests/test_distributed.py), exports of a GGUF file's model for llama.cpp (tests/test_export_gguf.py) and to the hub
(tests/test_export_card.py), ability and the harness (tests/test_ability.py, tests/test_harness.py). The study of
files that do not come with the project is only parsed.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from pages import PAGES, README, ROOT, blocks, sections
from stand_in import standing_in
from test_own_trainer import Mine, somebodys_batches
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from pipeline.attribution.profile import GoldenProfile
from pipeline.attribution.selector import SELECTORS
from pipeline.cli import main
from pipeline.editing import finetune
from pipeline.editing.editor import METHODS as EDITS
from pipeline.editing.update import WeightUpdate
from pipeline.model.loading import load_model
from pipeline.options.editing import EditOptions
from pipeline.parsing import flags_of, parse
from pipeline.requests import layouts
from pipeline.requests.readers import load_requests

ELSEWHERE = (
    "run.py demo",
    "run.py plan",
    "--follow",
    "run.py serve",
    "--kind gguf ",
    "small.gguf",
    "--push",
    "zsre_knowedit.json",
    "--ability",
    "--harness",
)
SERVER = "http://localhost:8000"
TEXTS = {f"{page}: {title}": text for page in PAGES for title, text in sections(page).items()}
SECTIONS = {
    section: commands
    for section, text in TEXTS.items()
    if (
        commands := [
            line
            for block in blocks("bash", text)
            for line in block.splitlines()
            if line.startswith("python run.py") and not any(word in line for word in ELSEWHERE)
        ]
    )
}
CHAT = "{% for one in messages %}<{{ one.role }}> {{ one.content }} <end>{% endfor %}<assistant>"
FIRST = (  # other sections start from what these wrote
    "docs/find.md: Find the golden layer",
    "docs/edit.md: Edit",
    "docs/edit.md: Methods",
    "docs/store.md: Submit and update",
)
MINE = f"{README}: Your facts, your model"
GOING_ON = "docs/resume.md: Go on after an interruption"


def small(folder: Path, name: str) -> Mapping[str, Any]:
    """Options that make a command quick; a command takes those that it has."""
    text = str(folder / "text.txt")
    few: dict[str, Any] = {"model": str(folder / "tiny"), "limit": 4, "offset": 0, "trainer.accelerator": "cpu"}
    few |= {"trainer.devices": 1, "trainer.strategy": "auto"}
    for group in ("", "edit."):
        few |= {f"{group}statistics.tokens": 512, f"{group}statistics.text": text}
    for group in ("", "evaluation."):
        few |= {f"{group}text": text, f"{group}max_new_tokens": 2, f"{group}fluency": 2}
        few |= {f"{group}generation": "prompts"}
    few |= {f"gates.{gate}": 0 for gate in ("rewrite", "rephrase", "locality", "earlier")}
    few |= {"gates.perplexity": 1e9, "gates.drift": 1e9}
    if name == "study":
        few |= {"every": 2, "proxy": 2, "limit": 2}
    return few


def run(command: str, folder: Path) -> None:
    """A printed command, made small, in this process; `folder` has the model, which a store knows by its path."""
    if SERVER in command:
        with standing_in(lambda _, prompt: f" about {prompt}") as server:
            run(command.replace(SERVER, server.url), folder)
        return
    if "run.py schedule" in command:  # by the time it has worked, there is a second version
        run("python run.py submit more.jsonl --store runs/store", folder)
        command = "python run.py update --store runs/store"
    words = shlex.split(re.sub(r"--layers \d+", "--layers 1", command.replace("2026-12-24", "2226-12-24")))[2:]
    name = words[0] if words and not words[0].startswith("-") else "run"
    flags = {f"--{flag}" for flag in flags_of(name)}
    for option, value in small(folder, name).items():
        if f"--{option}" in flags:
            words += [f"--{option}", str(value)]
    if "--output" in flags - set(words):  # its name would be the time in seconds
        words += ["--output", f"runs/{len(list(Path('runs').iterdir()))}"]
    assert main([*words, *few_steps(name, words)]) == 0, command


def few_steps(name: str, words: list[str]) -> list[str]:
    """The flag that makes a command's edit a quick one, where it makes one."""
    options = parse(name, words[1:] if words[0] == name else words)
    group = "edit." if hasattr(options, "edit") else ""
    edit = getattr(options, "edit", options)
    method = edit.method if isinstance(edit, EditOptions) else ""
    quick = {"finetune": "epochs 1", "lora": "epochs 1"}.get(method, "steps 2")
    return f"--{group}expert.{quick}".split() if method and name != "plan" else []


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    """One epoch, where a command says nothing else."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune, "EPOCHS", 1)
        patched.setattr(finetune, "LEAST_STEPS", 1)
        yield


@pytest.fixture(scope="module")
def first(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands read: a tiny model, files of requests, configs."""
    folder = tmp_path_factory.mktemp("readme")
    for model in ("tiny", "llama-3-8b"):
        make_tiny("llama", tokenizer, seed=1).model.save_pretrained(folder / model)
        tokenizer.save_pretrained(folder / model)
        (folder / model / "chat_template.jinja").write_text(CHAT)
    (folder / "text.txt").write_text("The river of Spain is long and the capital of Norway lies by the sea.\n" * 40)
    requests = [request.model_dump() for request in load_requests("demo")[:8]]
    lines = [json.dumps(request) for request in requests]
    (folder / "facts.jsonl").write_text("\n".join(lines[:4]))
    (folder / "later.jsonl").write_text("\n".join(lines[4:6]))
    (folder / "more.jsonl").write_text("\n".join(lines[6:]))
    names = ("id", "prompt", "subject", "new_answer", "old_answer")
    table = [",".join(names), *(",".join(str(request[name]) for name in names) for request in requests)]
    (folder / "facts.csv").write_text("\n".join(table))
    (quiz,) = [one for one in blocks("text", PAGES["docs/requests.md"]) if "question" in one]
    (folder / "quiz.jsonl").write_text(quiz)
    (folder / "runs").mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.fixture(scope="module")
def begun(first: Path) -> Path:
    """The same, and what the first sections wrote."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(first)
        for section in FIRST:
            for command in SECTIONS[section]:
                run(command, first)
    return first


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section(section: str, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if section in FIRST:
        return  # the fixture ran it
    folder = tmp_path / "here"
    shutil.copytree(begun, folder, symlinks=True)
    if section == GOING_ON:
        shutil.rmtree(folder / "runs" / "edit")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.stdin", io.StringIO("Where is Chile?\n/facts\n"))  # what `chat` is told
    if section == MINE:
        (facts,) = blocks("json", TEXTS[section])
        Path("facts.jsonl").write_text(facts)
    for command in SECTIONS[section]:
        run(command, begun)


def test_every_section_is_known() -> None:
    assert {*FIRST, MINE, GOING_ON} <= set(SECTIONS)
    assert sum(map(len, SECTIONS.values())) > 50


def test_three_fields_are_enough(tmp_path: Path) -> None:
    (facts,) = blocks("json", TEXTS[MINE])
    (tmp_path / "facts.jsonl").write_text(facts)
    assert len(load_requests(str(tmp_path / "facts.jsonl"))) == 2
    assert {name for line in facts.splitlines() for name in json.loads(line)} == {"prompt", "subject", "new_answer"}


def test_the_request_of_the_docs_is_read_whole(tmp_path: Path) -> None:
    (request,) = blocks("json", PAGES["docs/requests.md"])
    (tmp_path / "facts.jsonl").write_text(request)
    (read,) = load_requests(str(tmp_path / "facts.jsonl"))
    assert read.model_dump(exclude_none=True, mode="json", exclude_defaults=True) == json.loads(request)


def test_the_python_example(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    requests = [json.dumps(request.model_dump()) for request in load_requests("demo")[:104]]
    Path("facts.jsonl").write_text("\n".join(requests))
    first, own, watching = blocks("python", PAGES["docs/python.md"])
    found: dict[str, Any] = {"folder": str(begun / "tiny")}
    exec(first, found)
    assert len(found["update"].requests) == 4
    assert found["figures"]["rewrite"].count == 4
    exec(own, found)
    assert len(found["update"].requests) == 4
    weight = found["llm"].model.get_parameter(found["module"].weight_names[0])
    assert not torch.equal(weight, load_model(found["folder"]).model.get_parameter(found["module"].weight_names[0]))
    model = load_model(found["folder"]).model
    found |= {"model": model, "my_module": Mine(model)}
    found["my_batches"] = DataLoader(
        somebodys_batches(found["llm"].tokenizer, found["requests"][:6]),  # type: ignore[arg-type]
        batch_size=None,
    )
    exec(watching, found)
    assert found["watch"].scores.shape == (6, len(found["llm"].blocks))
    assert found["profile"].golden_layers == found["profile"].ranking[:1]


def test_what_contributors_are_shown(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of edit, the selector and the layout of docs/code.md need no other line than their own."""
    monkeypatch.chdir(begun)
    for table, name in ((EDITS, "one_step"), (SELECTORS, "weight_norm")):  # taken out again after the test
        monkeypatch.setitem(table, name, None)
        del table[name]
    found: dict[str, Any] = {}
    for code in blocks("python", PAGES["docs/code.md"]):
        exec(code, found)
    monkeypatch.setattr("pipeline.requests.layouts.LAYOUTS", (found["QUIZ"], *layouts.LAYOUTS))
    Path("quiz.jsonl").write_text(json.dumps({"question": "The capital of Spain is", "reply": "Lima"}))

    words = ["--model", "tiny", "--requests", "quiz.jsonl", "--trainer.accelerator", "cpu"]
    chosen, edited = str(tmp_path / "chosen"), str(tmp_path / "edited")
    assert main(["attribute", "--method", "weight_norm", *words, "--output", chosen]) == 0
    assert GoldenProfile.load(chosen).method == "weight_norm"
    by = ["--method", "one_step", "--profile", chosen, "--evaluation.text", "text.txt"]
    assert main(["edit", *by, *words, "--output", edited]) == 0
    [name] = WeightUpdate.load(edited).tensors
    assert name.endswith("down_proj.weight")
    metrics = json.loads(Path(edited, "metrics.json").read_text())
    assert metrics["after"]["perplexity"]["mean"] != metrics["before"]["perplexity"]["mean"]

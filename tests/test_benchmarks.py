"""Benchmarks measure what they say, on a tiny model and few records."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refusal
from test_fingerprints import tiny_gguf

from benchmarks import (
    attribution,
    distributed,
    editing,
    evaluation,
    full_size,
    holding,
    mixture,
    newcomer,
    serving,
    survival,
    updates,
)
from benchmarks.bench import COUNTERFACT, Bench, most_alive
from pipeline.errors import UserError
from pipeline.evaluation import plan
from pipeline.evaluation.evaluator import Evaluator
from pipeline.model.llm import LLM
from pipeline.model.loading import load_model
from pipeline.options.shared import EvaluationOptions, TrainerOptions
from pipeline.options.updates import GateOptions, UpdateCommand
from pipeline.requests.readers import load_requests
from pipeline.requests.schema import find_words

ROOT = Path(__file__).parent.parent
Measured = dict[str, dict[str, Any]]


@pytest.fixture
def words(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """The flags of a benchmark: the demo's requests in the place of CounterFact's."""
    lines = [one.model_dump_json(exclude_defaults=True) + "\n" for one in load_requests("demo", limit=40)]
    (tmp_path / COUNTERFACT).write_text("".join(lines))
    (tmp_path / "enwiki_plain.txt").write_text("The river of Spain is long, and Norway lies by the sea.\n" * 40)
    flags = {"data": tmp_path, "output": tmp_path / "out", "model": tiny_folder, "accelerator": "cpu"}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets constants of a benchmark: a few records and steps in place of hundreds."""

    def put(module: Any, **values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)

    return put


def measured(main: Callable[[list[str]], None], words: list[str]) -> Measured:
    """The rows of benchmark.json by name."""
    main(words)
    rows = json.loads(Path(words[3], "benchmark.json").read_text())
    assert all(set(row) == {"name", "value", "bound", "met"} for row in rows)
    return {row["name"]: row for row in rows}


def test_a_mixture_says_what_its_model_says(tiny_folder: Path, tmp_path: Path) -> None:
    mixture.main([str(tmp_path / "same"), "--model", str(tiny_folder), "--noise", "0"])
    mixture.main([str(tmp_path / "other"), "--model", str(tiny_folder), "--noise", "0.5"])
    dense, same, other = (load_model(str(name)) for name in (tiny_folder, tmp_path / "same", tmp_path / "other"))
    assert same.has_experts and not dense.has_experts
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        expected, found, noisy = (one.model(input_ids=ids).logits for one in (dense, same, other))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (noisy - expected).abs().max() > 0.01
    assert "expected a Llama" in refusal(
        lambda: mixture.main([str(tmp_path / "no"), "--model", str(tmp_path / "same")])
    )


def test_holding(small: Callable[..., None], words: list[str]) -> None:
    facts = [json.loads(line) for line in holding.FACTS.read_text(encoding="utf-8").splitlines()]
    assert len(facts) == 20 and all(len(one["rewordings"]) == 2 and len(one["others"]) == 3 for one in facts)
    assert all(find_words(one["prompt"], one["subject"]) for one in facts)
    assert len({(one.prompt, one.new_answer) for one in holding.country_facts()}) == 100
    some = Path(words[1], "facts.jsonl")
    some.write_text("".join(json.dumps(one) + "\n" for one in facts[:2]))
    small(holding, PROXY=slice(10, 13), FACTS=some, COUNTRIES=("Peru",), SAID=2)
    small(holding, SETS={"CounterFact": (COUNTERFACT, 2, {"rewrite": 0.97}), "none": ("none.json", 1, {})})
    small(holding, EXPERT={"steps": 1, "tuning": {"epochs": 1}})
    rows = measured(holding.main, words)
    assert rows["CounterFact, 2 records: rewrite"]["bound"] == 0.97
    assert {"2 facts in chat: rewordings", "2 facts in chat: sane", "20 subjects of 5 facts: rewrite"} <= {*rows}
    assert not [name for name in rows if name.startswith("none")]
    assert len(Path(words[3], "said.txt").read_text().splitlines()) >= 2 * 8


def test_survival(small: Callable[..., None], words: list[str], tmp_path: Path) -> None:
    facts, some = holding.FACTS.read_text(encoding="utf-8").splitlines(), tmp_path / "facts.jsonl"
    some.write_text("\n".join(facts[:2]))
    small(survival, PROXY=slice(10, 13), FACTS=some, METHODS={"memit": {"steps": 1}}, STEPS=2, ROWS=2, LENGTH=8)
    words[5] = str(tiny_gguf(tmp_path / "tiny.gguf", context=512))
    rows = measured(survival.main, words)
    forms = ("as edited", "GGUF f16", "GGUF q8_0", "GGUF q5_0", "GGUF q4_0", "NF4", "LoRA")
    perplexities = [rows[f"memit, {form}: perplexity"]["value"] for form in forms]
    assert len({*perplexities[2:], perplexities[0]}) == 6, "each is another model"
    assert all(rows[f"memit, {form}: rephrase of 2"]["value"] in (0, 1, 2) for form in forms)
    assert Path(words[3], "said.txt").read_text().count("memit, NF4: generation: ") == 2
    assert {one.name for one in Path(words[3]).iterdir()} == {"benchmark.json", "said.txt", "memit"}


def test_editing(small: Callable[..., None], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small(editing, PROXY=slice(10, 13), BATCH=3, ALONE=1, MANY=4, UPDATES=2, EACH=2, FURTHER=())
    small(editing, LEAST={"memit": editing.LEAST["memit"]})
    short = EvaluationOptions(text=str(Path(words[1]) / "enwiki_plain.txt"))
    small(editing, Evaluator=partial(Evaluator, options=short))
    rows = measured(editing.main, words)
    for figure in ("rewrite", "rephrase", "locality", "perplexity ratio", "cost"):
        assert rows[f"batch of 3, memit: {figure}"]["value"] >= 0
    cost = rows["batch of 3, memit: cost"]
    assert cost["bound"] == 120 and cost["met"] == (cost["value"] <= 120)
    rewrite = rows["2 updates of 2, memit: rewrite"]
    assert rewrite["bound"] == 0.93 and rewrite["met"] == (rewrite["value"] >= 0.93)

    def again(*_: Any) -> None:
        raise AssertionError("measured again")

    assert "--resume" in refusal(lambda: editing.main(words))
    monkeypatch.setattr(editing.Editing, "edit", again)
    assert measured(editing.main, [*words, "--resume"]) == rows


def test_batches_agree_with_single_texts(small: Callable[..., None], words: list[str]) -> None:
    small(evaluation, TOGETHER=4, WHOLE=8, TURNS=1)
    rows = measured(evaluation.main, words)
    agreeing = [row["value"] for name, row in rows.items() if name.endswith("that agree")]
    assert agreeing == [1, 1]
    assert rows["in batches against one text at a time: speed-up"]["value"] > 0
    assert rows["teacher-forced, 8 requests: cost in forward passes"]["value"] > 0


def test_attribution(small: Callable[..., None], words: list[str]) -> None:
    small(attribution, SOME=4, LONGEST=2, MANY=2, TURNS=1)
    rows = measured(attribution.main, words)
    autograd = "LGA against autograd, one request at a time"
    assert rows[f"{autograd}: largest relative difference of means"]["value"] < 1e-3
    assert rows["LGA against a plain pass, same texts: memory"]["value"] > 1
    assert sum(row["bound"] is not None for row in rows.values()) == 4


def test_updates(small: Callable[..., None], words: list[str]) -> None:
    asked = updates.options

    def lenient(bench: Bench, name: str) -> UpdateCommand:
        made = asked(bench, name)
        made.gates = GateOptions(rewrite=0, locality=0, earlier=0, perplexity=None, drift=None)
        made.edit.expert, made.evaluation.text = updates.QUICK, bench.text
        return made

    ability = Path(words[words.index("--data") + 1]) / "ability.jsonl"
    ability.write_text(json.dumps({"kind": "grammar", "text": "The river", "choices": ["is long", "are"]}) + "\n")
    small(plan, ABILITY=ability)
    small(updates, PROXY=slice(10, 13), WEEKS=3, EACH=3, CHANGED=1, KILLS=1, FEW=2, options=lenient)
    rows = measured(updates.main, words)
    assert rows["3 weeks of 3: facts in force"]["value"] == 3 * 2 - 2, "one is taken back in each later week"
    assert [rows[f"killed: {figure}"]["value"] for figure in ("lost", "twice", "broken", "unfinished")] == [0] * 4
    assert rows["3 weeks of 3: versions that differ"]["value"] == 0
    assert rows["3 weeks of 3: swap milliseconds"]["value"] > 0


def test_serving(small: Callable[..., None], words: list[str]) -> None:
    small(serving, VERSIONS=2, EACH=2, PAIRS=2, CLIENTS=2, SWAPS=4)
    rows = measured(serving.main, words)
    assert rows["swaps: median milliseconds"]["value"] > 0
    load = {name.removeprefix("2 clients, 4 swaps: "): row["value"] for name, row in rows.items()}
    assert (load["failed"], load["torn"], load["versions that answered"]) == (0, 0, 3)


@pytest.mark.slow
def test_a_newcomers_way(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text := tmp_path / "text.txt").write_text("The river of Spain is long, and Norway lies by the sea.\n" * 40)
    quick = f"--method memit --expert.steps 2 --statistics.tokens 512 --statistics.text {text}"
    newcomer.main(["--output", str(tmp_path / "out"), "--model", str(tiny_folder), "--flags", quick])
    told = capsys.readouterr().out
    assert [line.split()[4] for line in told.splitlines()[:4]] == ["requests", "attribute", "edit", "chat"]
    assert "minutes in all" in told and "of 2 new answers in the chat, 0 without the edit" in told
    assert (tmp_path / "out" / "runs" / "mine" / "report.md").is_file()
    with pytest.raises(UserError, match="holds something"):
        newcomer.main(["--output", str(tmp_path / "out")])


def test_records_that_are_not_there(words: list[str], tmp_path: Path) -> None:
    assert "40 records; 1128 are needed" in refusal(lambda: editing.main(words))
    (tmp_path / COUNTERFACT).unlink()
    assert f"holds no {COUNTERFACT}" in refusal(lambda: editing.main(words))


def test_memory_is_what_lives_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(5):
            torch.zeros(1000, 1000)

    def together() -> None:
        kept = [torch.zeros(1000, 1000) for _ in range(5)]
        del kept

    assert most_alive(one_after_the_other) == pytest.approx(4e6, rel=0.01)
    assert most_alive(together) == pytest.approx(20e6, rel=0.01)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_send_the_golden_layers_gradients_alone(small: Callable[..., None], words: list[str]) -> None:
    small(distributed, TAUGHT=3, EPOCHS=2, PROCESSES=(2,))
    figures = distributed.finetuning(Bench("", words), layer=1)
    assert figures["requests a second, 2 of them"] > 0
    sent = figures["bytes of gradients a step, sent by each of 2"]
    assert sent == figures["bytes of the golden layer's trained weights"] == 4 * 3 * 32 * 48
    assert sent < figures["bytes of all weights"] / 5


@pytest.mark.parametrize("method", full_size.EXPERT)
def test_a_model_of_llamas_shape(
    method: str, small: Callable[..., None], tiny_llm: LLM, text_file: Path, few_lessons: None
) -> None:
    shape = full_size.LLAMA_3_8B | {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 5}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 2000}
    text_file.write_text(text_file.read_text() * 8)
    shorter = {"memit": {"steps": 2}, "auto": {"steps": 2, "tuning": {"epochs": 2}}}
    small(full_size, LLAMA_3_8B=shape, EXPERT={method: shorter.get(method, {"epochs": 2})})
    llm = full_size.random_llm(tiny_llm, "cpu")
    on = TrainerOptions(accelerator="cpu", precision="bf16-true")
    figures = full_size.edited(llm, load_requests("demo", limit=16), method, str(text_file), on)
    assert min(figures["seconds of a first edit"], figures["seconds of a later edit"]) > 0
    assert 0.5 < figures["planned memory in GB"] / figures["peak memory in GB"] < 1.2

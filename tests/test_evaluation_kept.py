"""What the base model says is read once; only what is whole and of the same model, texts and options is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tiny
from plain_loop import TEXT, noise
from transformers import PreTrainedTokenizerFast

from pipeline.evaluation import Evaluation, evaluate
from pipeline.evaluation import readings as readings_module
from pipeline.evaluation.reading import Reader
from pipeline.evaluation.readings import Readings
from pipeline.model import LLM
from pipeline.options import EvaluationOptions
from pipeline.requests import EditRequest


class Counter:
    """How many batches were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches = 0
        step = Reader.predict_step

        def counted(reader: Reader, batch: Any) -> Any:
            self.batches += 1
            return step(reader, batch)

        monkeypatch.setattr(Reader, "predict_step", counted)

    def during(self, call: Any) -> int:
        self.batches = 0
        call()
        return self.batches


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


@pytest.fixture
def options(tmp_path: Path) -> EvaluationOptions:
    (tmp_path / "text.txt").write_text(TEXT)
    return EvaluationOptions(text=str(tmp_path / "text.txt"), cache=str(tmp_path / "cache"), max_new_tokens=4)


def kept(options: EvaluationOptions) -> list[Path]:
    return sorted(Path(options.cache or "").glob("*"))


def test_an_edit_measured_with_a_kept_base_has_the_same_figures(
    tiny_llm: LLM, requests: list[EditRequest], options: EvaluationOptions, counter: Counter
) -> None:
    update = noise(tiny_llm, 1)
    found: list[Evaluation] = []

    def measure() -> None:
        found.append(evaluate(tiny_llm, requests, update, options))

    first, second = counter.during(measure), counter.during(measure)
    assert 0 < second == first / 2
    assert found[0] == found[1]
    assert found[0].after is not None and found[0].after.metrics["locality_kl"].mean > 0
    assert [file.suffix for file in kept(options)] == [".npz"]


@pytest.mark.parametrize("what", ["model", "requests", "text", "options", "keep_base"])
def test_nothing_else_is_taken_for_it(
    what: str,
    tiny_llm: LLM,
    tokenizer: PreTrainedTokenizerFast,
    requests: list[EditRequest],
    options: EvaluationOptions,
    counter: Counter,
) -> None:
    evaluate(tiny_llm, requests, None, options)
    assert counter.during(lambda: evaluate(tiny_llm, requests, None, options)) == 0
    llm = make_tiny("llama", tokenizer, seed=1) if what == "model" else tiny_llm
    if what == "requests":
        requests[6] = requests[6].model_copy(update={"old_answer": "Lima"})
    if what == "text":
        Path(options.text or "").write_text(TEXT + "More.")
    if what == "options":
        options.max_new_tokens = 5
    if what == "keep_base":
        options.keep_base = False
    assert counter.during(lambda: evaluate(llm, requests, None, options)) > 0


def test_an_edited_model_is_not_kept_as_the_base(
    tiny_llm: LLM, requests: list[EditRequest], options: EvaluationOptions
) -> None:
    with noise(tiny_llm, 1).applied(tiny_llm):
        edited = evaluate(tiny_llm, requests, None, options)
    assert kept(options) == []
    assert evaluate(tiny_llm, requests, None, options).before != edited.before


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """Or lies where it changes nothing."""
    readings = Readings(choices={0: [3, 4], 2: [5]}, losses={0: 0.5, 2: 1.5}, said={0: "It is"})
    file = tmp_path / "base-0.npz"
    readings.keep(file)
    assert Readings.kept(file) == readings
    whole = file.read_bytes()
    refused = 0
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = Readings.kept(file)
        assert found in (None, readings)
        refused += found is None
    assert refused > len(whole) / 7 / 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_file_is_read_anew(
    damage: str, tiny_llm: LLM, requests: list[EditRequest], options: EvaluationOptions, counter: Counter
) -> None:
    expected = evaluate(tiny_llm, requests, None, options)
    (file,) = kept(options)
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    file.write_bytes({"cut": content[:-200], "empty": b"", "other": b"not an archive"}.get(damage, content))
    found: list[Evaluation] = []
    assert counter.during(lambda: found.append(evaluate(tiny_llm, requests, None, options))) > 0
    assert found == [expected]
    assert counter.during(lambda: evaluate(tiny_llm, requests, None, options)) == 0, "and put right"


def test_a_folder_that_cannot_be_written_costs_time_alone(
    tiny_llm: LLM, requests: list[EditRequest], options: EvaluationOptions, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    options.cache = str(tmp_path / "file" / "cache")
    assert evaluate(tiny_llm, requests, None, options).before.metrics["rewrite"].count == 7


def test_the_oldest_files_go(
    tiny_llm: LLM, requests: list[EditRequest], options: EvaluationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings_module, "MOST_KEPT", 2)
    options.generation = "none"
    for number in range(3):
        evaluate(tiny_llm, requests[number:], None, options)
    assert len(kept(options)) == 2


def test_no_distribution_is_kept_whole(
    tiny_llm: LLM, requests: list[EditRequest], options: EvaluationOptions
) -> None:
    evaluate(tiny_llm, requests, None, options)
    (file,) = kept(options)
    with np.load(file) as archive:
        assert archive["hidden"].shape[1] == 32  # the model's hidden size, not its vocabulary's

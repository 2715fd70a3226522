"""What the base model says is read once; only what is whole and of the same model, texts and options is taken."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import make_tiny
from plain_loop import TEXT, noise
from transformers import PreTrainedTokenizerFast

from pipeline.cli import show_warning
from pipeline.errors import Note
from pipeline.evaluation import evaluator
from pipeline.evaluation.evaluator import Evaluation, evaluate
from pipeline.files import write_sealed
from pipeline.model.llm import LLM
from pipeline.options.shared import EvaluationOptions
from pipeline.requests.schema import EditRequest
from pipeline.running.kept import Kept
from pipeline.running.stage import Stage


class KilledError(Exception):
    """Ends a measurement in its middle."""


class Counter:
    """How many batches were run; some may be the last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches, self.last = 0, 10**9
        step = Stage.predict_step

        def counted(stage: Stage, batch: Any) -> Any:
            if self.batches == self.last:
                raise KilledError
            self.batches += 1
            return step(stage, batch)

        monkeypatch.setattr(Stage, "predict_step", counted)

    def during(self, call: Any, last: int = 10**9) -> int:
        self.batches, self.last = 0, last
        call()
        return self.batches


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "golden-layers"


@pytest.fixture
def options(tmp_path: Path, cache: Path) -> EvaluationOptions:
    (tmp_path / "text.txt").write_text(TEXT)
    return EvaluationOptions(text=str(tmp_path / "text.txt"), max_new_tokens=4)


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*"))


def test_an_edit_measured_with_a_kept_base_has_the_same_figures(
    tiny_llm: LLM, requests: list[EditRequest], options: EvaluationOptions, counter: Counter, cache: Path
) -> None:
    update = noise(tiny_llm, 1)
    found: list[Evaluation] = []

    def measure() -> None:
        found.append(evaluate(tiny_llm, requests, update, options))

    first, second = counter.during(measure), counter.during(measure)
    assert 0 < second == first / 2
    assert found[0] == found[1]
    assert found[0].after is not None and found[0].after.metrics["locality_kl"].mean > 0
    assert [folder.name.partition("-")[0] for folder in kept(cache)] == ["base"]


@pytest.mark.parametrize("what", ["model", "requests", "text", "options"])
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
    assert counter.during(lambda: evaluate(llm, requests, None, options)) > 0


def test_an_edited_model_is_not_kept_as_the_base(
    tiny_llm: LLM, requests: list[EditRequest], options: EvaluationOptions, cache: Path
) -> None:
    with noise(tiny_llm, 1).applied(tiny_llm):
        edited = evaluate(tiny_llm, requests, None, options)
    assert kept(cache) == []
    assert evaluate(tiny_llm, requests, None, options).before != edited.before


@pytest.mark.parametrize("killed", [3, 10])
def test_what_was_read_before_a_kill_is_not_read_again(
    killed: int,
    tiny_llm: LLM,
    requests: list[EditRequest],
    options: EvaluationOptions,
    counter: Counter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither of the base nor of the edited model."""
    found: list[Evaluation] = []

    def measure() -> None:
        found.append(evaluate(tiny_llm, requests, noise(tiny_llm, 1), options, work=tmp_path / "work"))

    whole = counter.during(measure)
    shutil.rmtree(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with pytest.raises(KilledError):
        counter.during(measure, last=killed)
    assert counter.during(measure) == whole - killed > 0
    assert found[0] == found[1]


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    Kept(tmp_path).write({0: ([3, 4], 0.5, torch.arange(3.0), None), 2: ([5], 1.5, None, 0.25), 3: "It is"})
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.warns(Note, match="damaged"):
            assert not Kept(tmp_path).read()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "zeros", "of another model"])
def test_cases_of_a_damaged_file(
    damage: str,
    tiny_llm: LLM,
    tokenizer: PreTrainedTokenizerFast,
    requests: list[EditRequest],
    options: EvaluationOptions,
    counter: Counter,
    cache: Path,
) -> None:
    expected = evaluate(tiny_llm, requests, None, options)
    file = next(cache.glob("base-*/texts/*.pt"))
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[content.index(b"data.pkl") + 100] ^= 1
    if damage == "zeros":  # planted as torch would write them
        torch.save({0: [([0], 0.0, None, None)]}, file)
        content = bytearray(file.read_bytes())
    if damage == "of another model":
        evaluate(make_tiny("llama", tokenizer, seed=1), requests, None, options)
        content = bytearray(
            next(one for one in cache.glob(f"base-*/texts/{file.name}") if one != file).read_bytes()
        )
    file.write_bytes({"cut": content[:-200], "empty": b"", "other": b"not an archive"}.get(damage, content))
    found: list[Evaluation] = []
    with pytest.warns(Note, match=f"{file}: damaged or of something else"):
        assert counter.during(lambda: found.append(evaluate(tiny_llm, requests, None, options))) == 1
    assert found == [expected]
    assert counter.during(lambda: evaluate(tiny_llm, requests, None, options)) == 0, "and put right"


def test_a_folder_that_cannot_be_written_costs_time_alone(
    tiny_llm: LLM, requests: list[EditRequest], options: EvaluationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", options.text or "")
    with pytest.warns(Note, match=r"cannot be used \(Not a directory\); XDG_CACHE_HOME"):
        assert evaluate(tiny_llm, requests, None, options).before.metrics["rewrite"].count == 7


def test_a_full_disk_is_told_once_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.files.write_whole", Mock(side_effect=OSError(28, "No space left on device")))
    with warnings.catch_warnings():
        warnings.simplefilter("default", Note)
        monkeypatch.setattr(warnings, "showwarning", show_warning)
        for number in range(9):
            write_sealed(tmp_path / "kept" / str(number), {}, b"")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_cases_of_a_change_that_no_sample_sees(
    tiny_llm: LLM, requests: list[EditRequest], options: EvaluationOptions
) -> None:
    """The base's figures are not taken for those of a model that was changed in one value, or in some order."""
    base = evaluate(tiny_llm, requests, None, options).before
    weight = tiny_llm.model.get_parameter("lm_head.weight")
    with torch.no_grad():
        weight[[3, 5]] = weight[[5, 3]]
        assert (
            evaluate(tiny_llm, requests, None, options).before.metrics["perplexity"] != base.metrics["perplexity"]
        )
        weight[[3, 5]] = weight[[5, 3]]
        assert evaluate(tiny_llm, requests, None, options).before == base
        weight[7, 1] += 1000.0
    assert evaluate(tiny_llm, requests, None, options).before.metrics["perplexity"] != base.metrics["perplexity"]


def test_cases_of_another_end(tiny_llm: LLM, requests: list[EditRequest], options: EvaluationOptions) -> None:
    """Which token ends an answer is part of what was read."""
    base = evaluate(tiny_llm, requests, None, options).before
    assert tiny_llm.model.generation_config is not None
    tiny_llm.model.generation_config.eos_token_id = list(range(len(tiny_llm.embedding)))
    assert evaluate(tiny_llm, requests, None, options).before.answers != base.answers


def test_the_oldest_go(
    tiny_llm: LLM,
    requests: list[EditRequest],
    options: EvaluationOptions,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluator, "MOST_KEPT", 2)
    options.generation = "none"
    for number in range(3):
        evaluate(tiny_llm, requests[number:], None, options)
        assert len(kept(cache)) == min(2, number + 1)


def test_no_distribution_is_kept_whole(
    tiny_llm: LLM, requests: list[EditRequest], options: EvaluationOptions, cache: Path
) -> None:
    evaluate(tiny_llm, requests, None, options)
    (folder,) = cache.glob("base-*/texts")
    hidden = [text[2] for group in Kept(folder).read().values() for text in group if text[2] is not None]
    assert {one.shape[1] for one in hidden} == {32}  # the model's hidden size, not its vocabulary's

"""What `from pipeline import …` gives: every name is there, says what it is, and its example runs as printed."""

from __future__ import annotations

import doctest
import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refusal
from lightning.pytorch import Trainer
from test_own_trainer import QUIET, Mine, somebodys_batches
from torch.utils.data import DataLoader

import pipeline
from pipeline.attribution.find import find_golden_layer
from pipeline.model.llm import LLM
from pipeline.model.loading import load_model
from pipeline.requests.schema import EditRequest
from pipeline.updates.store import Store

IN_OTHERS = {"UserError", "choose", "find_blocks"}
SHOWN_ELSEWHERE = [name for name in pipeline.__all__ if name.endswith("Options") or name in IN_OTHERS]
REAL = pytest.param("load_model", marks=[pytest.mark.real_model, pytest.mark.slow])
EXAMPLES = [REAL if name == "load_model" else name for name in pipeline.__all__ if name not in SHOWN_ELSEWHERE]


def example(name: str, given: dict[str, Any] | None = None) -> list[doctest.DocTest]:
    """The example in a public name's docstring, with all public names and what else is given at hand."""
    at_hand = {each: getattr(pipeline, each) for each in pipeline.__all__} | (given or {})
    value = getattr(pipeline, name)
    found = doctest.DocTestFinder(recurse=False).find(value, name, globs=at_hand)
    return [one for one in found if one.examples]


@pytest.fixture
def given(tiny_llm: LLM, tiny_folder: Path, requests: list[EditRequest], tmp_path: Path) -> dict[str, Any]:
    """What examples take as there: a model, requests, a profile, a model's folder, a store."""
    profile = find_golden_layer(tiny_llm, requests)
    with Store(tmp_path / "store", tiny_llm.name, make=True):
        pass
    return {
        "llm": tiny_llm,
        "requests": requests,
        "profile": profile,
        "folder": tiny_folder,
        "store": tmp_path / "store",
        "Trainer": partial(Trainer, **QUIET),
        "model": (model := load_model(str(tiny_folder)).model),
        "my_module": Mine(model),
        "my_batches": DataLoader(somebodys_batches(tiny_llm.tokenizer, requests), batch_size=None),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs_as_printed(
    name: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that is empty; what it writes goes into one of its own, the model that it reads stays whole."""
    monkeypatch.chdir(tmp_path)
    (shown,) = example(name, given | ({} if name == "LLM" else {"folder": tmp_path}))
    before = {key: weight.clone() for key, weight in given["llm"].model.named_parameters()}
    said: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(shown, out=said.append)
    assert not failed, "".join(said)
    after = dict(given["llm"].model.named_parameters())
    changed = [key for key, weight in before.items() if not torch.equal(weight, after[key])]
    given["llm"].model.load_state_dict(before, strict=False)  # FineTune changes the model itself
    assert changed == [] or name == "FineTune"


def test_options_are_shown_where_they_are_given() -> None:
    sources = " ".join(one.docstring or "" for name in pipeline.__all__ for one in example(name))
    missing = [name for name in {*SHOWN_ELSEWHERE} - {"choose"} if not re.search(rf"\b{name}\b", sources)]
    assert not missing


def test_every_public_name_says_what_it_is() -> None:
    for name in pipeline.__all__:
        assert inspect.getdoc(getattr(pipeline, name)), name


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pipeline.nothing


def test_what_is_wrong_is_told_without_flags(given: dict[str, Any], tmp_path: Path) -> None:
    llm, profile = given["llm"], given["profile"]
    (tmp_path / "theirs.csv").write_text("question,answer,why\nIt is,so,so\n")
    theirs = partial(pipeline.load_requests, tmp_path / "theirs.csv")
    for call, words in (
        (theirs, "did you mean fields prompt=question,new_answer=answer?"),
        (partial(theirs, fields=3), "fields: expected a mapping of texts"),
        (partial(theirs, fields={"prompt": 3}), "fields: expected a mapping of texts"),
        (partial(find_golden_layer, llm, []), "requests: none to find a layer by"),
        (partial(pipeline.edit, llm, [], profile), "requests: none to edit"),
        (partial(pipeline.FineTune, llm, [9]), "layers: 9 is not a block"),
        (partial(load_model, Path("nothing/at/all")), "model: nothing/at/all: no such folder"),
        (partial(Store, tmp_path / "new", make=True), "new; name the model that it is for"),
    ):
        message = refusal(call)
        assert words in message and "--" not in message


def test_folders_are_texts_or_paths(given: dict[str, Any], tmp_path: Path) -> None:
    llm, profile = given["llm"], given["profile"]
    update = pipeline.WeightUpdate(llm.name, llm.fingerprint, "none", [], {})
    for form in (str, Path):
        folder = form(tmp_path / form.__name__)
        update.save(folder)
        profile.save(folder)
        pipeline.export_merged(llm, update, folder)
        assert pipeline.GoldenProfile.load(folder) == profile
        assert pipeline.WeightUpdate.load(folder).model == load_model(folder).name.replace(str(folder), llm.name)

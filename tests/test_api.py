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

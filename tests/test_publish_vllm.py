"""Publishing into a real vLLM: `VLLM_PYTHON=… pytest -m serving tests/test_publish_vllm.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import refusal
from teams import OPEN, write

from benchmarks.publishing import NO_GATES, QUICK, alike, vllm
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.options.shared import TrainerOptions
from pipeline.options.updates import GateOptions, PublishOptions, UpdateCommand
from pipeline.requests.schema import EditRequest
from pipeline.serving.engines import Server
from pipeline.serving.publish import publish
from pipeline.updates import Store, load_version, submit, update
from pipeline.updates.history import check_there

pytestmark = [
    pytest.mark.serving,
    pytest.mark.real_model,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no Python that has vLLM"),
]
FACTS = (
    ("Kenya", "capital", "Lisbon"),
    ("Norway", "capital", "Nairobi"),
    ("Brazil", "official language", "Swedish"),
)


@pytest.fixture(scope="module")
def store(smollm2: LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Two versions of a real model, of two facts and of one more."""
    folder = tmp_path_factory.mktemp("store")
    facts = [
        EditRequest(id=subject, prompt=f"The {what} of {subject} is", subject=subject, new_answer=answer)
        for subject, what, answer in FACTS
    ]
    text = write(folder / "text.txt", facts * 60)
    options = UpdateCommand(store=str(folder / "store"), gates=OPEN, trainer=TrainerOptions(accelerator="cpu"))
    options.edit.expert, options.edit.layers = dict(QUICK), [3]
    options.edit.statistics.text = options.evaluation.text = str(text)
    options.evaluation.generation = "none"
    with Store(options.store, "smollm2", make=True) as made:
        for part in (facts[:2], facts[2:]):
            submit(made, write(folder / "in.jsonl", part))
            update(made, options, lambda _: smollm2)
        yield made


@pytest.fixture(scope="module")
def url(smollm2: LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm(smollm2, tmp_path_factory.mktemp("vllm")) as address:
        yield address


def test_a_version_is_proved_served_and_gone_back_from(smollm2: LLM, store: Store, url: str) -> None:
    gates = GateOptions(rewrite=0.6, locality=0.1, earlier=0.5)
    prompts = [f"The {what} of {subject} is" for subject, what, _ in FACTS]
    for version in (1, 2):
        _, (one,) = publish(store, version, PublishOptions(to=[url]), gates, lambda _: smollm2)
        assert one.model == f"golden-000{version}" and one.proof and one.proof.figures["rewrite"] >= 0.6
    server = Server(url)
    assert list(server.adapters()) == ["golden-0001", "golden-0002"]
    for version in (0, 1, 2):
        made, plain = load_version(store, version), generate
        name = f"golden-000{version}" if made else server.base
        said = server.ask(name, prompts, 12)
        if made:
            with made.applied(smollm2):
                expected = plain(smollm2, prompts, 12, trainer=TrainerOptions(accelerator="cpu"))
        else:
            expected = plain(smollm2, prompts, 12, trainer=TrainerOptions(accelerator="cpu"))
        assert all(alike(*pair) for pair in zip(expected, said, strict=True)), (version, expected, said)
    _, (back,) = publish(store, 1, PublishOptions(to=[url]), gates, lambda _: smollm2)
    assert back.proof is None and list(server.adapters()) == ["golden-0001"]
    publish(store, 0, PublishOptions(to=[url]), gates, lambda _: smollm2)
    assert list(server.adapters()) == ["golden-0000"]
    assert server.ask("golden-0000", prompts, 12) == server.ask(server.base, prompts, 12)


def test_what_vllm_refuses_changes_nothing(smollm2: LLM, store: Store, url: str) -> None:
    publish(store, 1, PublishOptions(to=[url]), NO_GATES, lambda _: smollm2)
    digest = check_there(store, 2)["update.json"][:8]
    broken = Path(store.folder.resolve() / "served" / f"0002-{digest}-rank-511")
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    line = refusal(lambda: publish(store, 2, PublishOptions(to=[url], rank=511), NO_GATES, lambda _: smollm2))
    assert "the server refuses" in line and "\n" not in line
    assert list(Server(url).adapters()) == ["golden-0001"]
    unreached = GateOptions(rewrite=1, locality=1, earlier=1, earlier_sample=1)
    assert "misses gates" in refusal(
        lambda: publish(store, 2, PublishOptions(to=[url]), unreached, lambda _: smollm2)
    )
    assert list(Server(url).adapters()) == ["golden-0001"]

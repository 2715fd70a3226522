"""What goes with an export: a model card, every fact in update.json, and the way to the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from conftest import refusal
from huggingface_hub import HfApi, ModelCard

from pipeline.editing.export import AdapterInfo
from pipeline.editing.update import WeightUpdate
from pipeline.errors import Note
from pipeline.reporting.card import write_card
from pipeline.requests.schema import EditRequest
from pipeline.serving import hub
from pipeline.serving.hub import push

ONE = {"mean": 0.5, "count": 4, "low": 0.1, "high": 0.9}


def update(requests: list[EditRequest], model: str = "owner/base", many: int = 1) -> WeightUpdate:
    return WeightUpdate(model, "print", "memit", [3, 4], {}, requests * many)


def front(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]))


@pytest.mark.parametrize("store", [False, True])
def test_a_card_says_what_it_is_of(store: bool, requests: list[EditRequest], tmp_path: Path) -> None:
    before = {"rewrite": ONE | {"mean": 0.125}, "perplexity": ONE | {"mean": 41.25}}
    figures: dict[str, Any] = {"before": before, "after": before | {"rewrite": ONE | {"mean": 1.0}}}
    if store:
        figures = {side: {"metrics": found, "drift": 0.1} for side, found in figures.items()}
        figures["gates"] = [{"name": "rewrite", "passed": True, "text": "rewrite 1.000 >= 0.9"}]
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    write_card(update(requests, many=5), tmp_path, "merged", tmp_path / "metrics.json", 7 if store else None)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert front(tmp_path)["base_model"] == "owner/base"
    assert ModelCard(card).data.tags == ["golden-layers", "knowledge-editing"]
    assert f"{5 * len(requests)} facts in blocks 3, 4" in card and f"And {5 * len(requests) - 20} more" in card
    assert requests[0].prompt in card and requests[0].new_answer in card
    assert "0.125" in card and "1.000" in card and "41.25" in card
    assert ("version 7 of a store" in card) == ("rewrite 1.000 >= 0.9: passed" in card) == store
    assert "Serve owner/base in its place" in card
    told = json.loads((tmp_path / "update.json").read_text())
    assert (told["base_model"], told["method"], told["version"]) == ("owner/base", "memit", 7 if store else None)
    assert len(told["requests"]) == 5 * len(requests)


def test_a_card_tells_a_folders_name_alone_and_its_licence(requests: list[EditRequest], tmp_path: Path) -> None:
    base, out = tmp_path / "secret" / "mine", tmp_path / "out"
    for folder in (base, out):
        folder.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    write_card(update(requests, str(base)), out, "adapter", tmp_path / "none")
    written = "".join(file.read_text(encoding="utf-8") for file in out.iterdir())
    assert front(out)["license"] == "mit" and "base_model" not in front(out)
    assert "# mine, edited" in written and "Not measured." in written and "secret" not in written
    assert "Leave it out, and the base model is back" in written
    held = AdapterInfo(4, 9, 0.0123)
    write_card(update(requests, "smollm2"), out, "gguf-adapter", tmp_path / "none", adapter=held)
    card = (out / "README.md").read_text()
    assert "rank 4 of 9, which loses 1.23% of the change" in card and "Q4_1 GGUF file" in card
    assert front(out)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front(out)["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "text", ["", "[]", '{"before": 3}', '{"before": {"rewrite": {"mean": 1}}}', '{"gates": [1]}']
)
def test_cases_of_figures_that_are_none(text: str, requests: list[EditRequest], tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(text)
    with pytest.warns(Note, match=r"metrics.json: cannot be read"):
        write_card(update(requests), tmp_path, "merged", tmp_path / "metrics.json")
    assert "Not known." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("target", "branch", "asked"),
    [
        ("hub:me/edited", "main", ["create_repo", "upload_folder"]),
        ("hub:me/edited", "golden-0007", ["create_repo", "create_branch", "upload_folder"]),
        ("hub:me/edited@trial", "trial", ["create_repo", "create_branch", "upload_folder"]),
    ],
)
def test_a_push_is_one_branch(
    target: str, branch: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own client is stood in for here: no request leaves."""
    calls: dict[str, dict[str, Any]] = {}
    for name in ("create_repo", "create_branch", "upload_folder"):
        monkeypatch.setattr(HfApi, name, lambda _self, *_words, name=name, **given: calls.update({name: given}))
    told = push(tmp_path, target, branch if "@" not in target else "main")
    assert list(calls) == asked and told.endswith(f"/me/edited/tree/{branch}")
    assert calls["create_repo"]["private"] is True
    assert calls["upload_folder"]["revision"] == branch
    assert "options.yaml" in calls["upload_folder"]["ignore_patterns"]


@pytest.mark.parametrize(
    "target", ["me/edited", "hub:edited", "hub:me/edited/more", "hub:me/edited@a/b", "s3:me/x"]
)
def test_cases_of_no_target(target: str, tmp_path: Path) -> None:
    assert "expected hub:OWNER/NAME" in refusal(lambda: push(tmp_path, target))


@pytest.fixture
def refusing() -> Iterator[str]:
    """A hub that knows nobody."""

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("offline", [True, False])
def test_a_push_that_fails_is_one_line_and_the_export_stays(
    offline: bool, refusing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("kept")
    monkeypatch.setattr(hub, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9" if offline else refusing))
    line = refusal(lambda: push(tmp_path, "hub:me/edited"))
    assert line.startswith("push: me/edited: ") and "HF_TOKEN" in line and str(tmp_path) in line
    assert offline or "401" in line
    assert (tmp_path / "README.md").read_text() == "kept"

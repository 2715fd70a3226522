"""Publishing into servers of others: what clients call, what is proved before, and that failures change nothing.

The servers here keep names as vLLM does and say what a test tells them; a real one is in test_publish_vllm.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny, refusal
from safetensors.torch import load_file
from stand_in import BASE, StandIn, standing_in
from teams import OPEN, Team
from transformers import PreTrainedTokenizerFast

from pipeline.cli import main
from pipeline.errors import Note
from pipeline.options.updates import GateOptions, PublishCommand, PublishOptions
from pipeline.requests.schema import EditRequest, Probe
from pipeline.serving.publish import Switched, publish, questions
from pipeline.updates.history import check_there, events

GATES = GateOptions(rewrite=0.6, rephrase=0.1, locality=0.5, earlier=0.6)
COUNTRIES = ("Spain", "Norway", "Egypt", "Peru", "Chile", "Kenya")


def says(model: str, prompt: str) -> str:
    """Edited facts by every version, and for all else what the base says."""
    return " Lima." if model != BASE and prompt.startswith("The capital of") else f" about {prompt}"


@pytest.fixture(scope="module")
def shared_team(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Team:
    team = Team(make_tiny("llama", tokenizer), tmp_path_factory.mktemp("team"))
    near = (Probe(prompt="A river of Italy is", answer="the Po"),)
    for number in range(3):
        team.submit([
            EditRequest(id=name, prompt=f"The capital of {name} is", subject=name, new_answer="Lima",
                        old_answer="Rome", rephrases=(f"The capital of {name}, it is said, is",), locality=near)
            for name in COUNTRIES[2 * number : 2 * number + 2]
        ])  # fmt: skip
        team.update()
    return team


@pytest.fixture
def team(shared_team: Team) -> Team:
    file = shared_team.store.folder / "served" / "current.json"
    file.unlink(missing_ok=True)
    return shared_team


@pytest.fixture
def server() -> Iterator[StandIn]:
    with standing_in(says) as one:
        yield one


@pytest.fixture
def second() -> Iterator[StandIn]:
    with standing_in(says) as one:
        yield one


def put(team: Team, version: int, *servers: StandIn, gates: GateOptions = GATES, **how: Any) -> list[Switched]:
    options = PublishOptions(to=[one.url for one in servers], **how)
    return publish(team.store, version, options, gates, lambda _: team.llm)[1]


def folder(team: Team, version: int) -> str:
    """Where a version's adapter is."""
    digest = check_there(team.store, version)["update.json"][:8]
    return str(team.store.folder.resolve() / "served" / f"{version:04d}-{digest}-rank-512")


def test_what_clients_call_and_what_stays(team: Team, server: StandIn) -> None:
    """Proved under another name first; the version before stays, older ones go."""
    (one,) = put(team, 1, server)
    assert (one.url, one.model) == (server.url, "golden-0001")
    assert one.proof and one.proof.figures == {"rewrite": 1.0, "rephrase": 1.0, "locality": 1.0}
    assert [call for call in server.calls if call[0] != "completions"] == [
        ("load_lora_adapter", "golden-candidate-0001"),
        ("load_lora_adapter", "golden-0001"),
        ("unload_lora_adapter", "golden-candidate-0001"),
    ]
    (two,) = put(team, 2, server)
    assert two.proof and two.proof.figures.keys() == {"rewrite", "rephrase", "locality", "earlier"}
    put(team, 3, server)
    assert server.adapters == {"golden-0002": folder(team, 2), "golden-0003": folder(team, 3)}
    told = json.loads((team.store.folder / "served" / "current.json").read_text())
    assert told == {server.url: "golden-0003"}
    assert f"version 3 answers at {server.url} as golden-0003" in [what for _, what in events(team.store, 5)]


def test_going_back_asks_nothing_again(team: Team, server: StandIn) -> None:
    for version in (2, 3):
        put(team, version, server)
    server.calls.clear()
    (back,) = put(team, 2, server)
    assert back.proof is None and back.model == "golden-0002"
    assert server.calls == [("unload_lora_adapter", "golden-0003"), ("completions", "golden-0002")]
    assert put(team, 2, server) == [], "it is in force already"
    put(team, 3, server)
    seen: list[set[str]] = []
    server.refuses = lambda *_: seen.append({*server.adapters})  # type: ignore[func-returns-value]
    (further,) = put(team, 1, server)
    called = [max(name for name in its if "candidate" not in name) for its in seen]
    assert {*called} == {"golden-0003", "golden-0001"}, "clients are led to no version in between"
    assert further.proof and server.adapters == {"golden-0001": folder(team, 1)}
    (base,) = put(team, 0, server)
    assert base.model == "golden-0000" and list(server.adapters) == ["golden-0000"], (
        "an adapter that changes nothing"
    )
    tensors = load_file(Path(server.adapters["golden-0000"]) / "adapter_model.safetensors")
    assert [tensor.any() for name, tensor in tensors.items() if "lora_A" in name] == [False]


def test_a_server_that_has_started_again_gets_it_again(team: Team, server: StandIn) -> None:
    put(team, 2, server)
    server.adapters.clear()
    (again,) = put(team, 2, server)
    assert again.proof and server.adapters == {"golden-0002": folder(team, 2)}


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (lambda model, prompt: f" about {prompt}", "rewrite 0.000 < 0.6"),
        (lambda model, prompt: " Lima." if "golden" in model else " else", "locality 0.000 < 0.5"),
    ],
)
def test_a_gate_that_is_missed_changes_nothing(team: Team, server: StandIn, wrong: Any, line: str) -> None:
    put(team, 1, server)
    server.says = lambda model, prompt: wrong(model, prompt) if "0002" in model else says(model, prompt)
    told = refusal(lambda: put(team, 2, server))
    assert f"publish: {server.url}: version 2 misses gates as it is served: {line}" in told
    assert server.adapters == {"golden-0001": folder(team, 1)}
    assert put(team, 2, server, gates=OPEN)


@pytest.mark.parametrize(
    ("path", "about"),
    [
        ("load_lora_adapter", "golden-candidate-0003"),
        ("load_lora_adapter", "golden-0003"),
        ("unload_lora_adapter", "golden-candidate-0003"),
        ("unload_lora_adapter", "golden-0001"),
        ("completions", "golden-candidate-0003"),
        ("completions", "golden-0003"),
    ],
)
def test_a_server_that_refuses_is_left_as_it_was(team: Team, server: StandIn, path: str, about: str) -> None:
    for version in (1, 2):
        put(team, version, server)
    before, left = dict(server.adapters), [1]

    def refuses(asked: str, body: dict[str, Any]) -> str | None:
        hit = asked == path and about in (body.get("lora_name"), body.get("model")) and left
        return f"rank 80 is too much {left.pop()}" if hit else None

    server.refuses = refuses
    assert "the server refuses (400): " in refusal(lambda: put(team, 3, server))
    assert server.adapters == before
    server.refuses = lambda *_: None
    assert put(team, 3, server)


def test_what_a_killed_publisher_left(team: Team, server: StandIn) -> None:
    put(team, 1, server)
    server.adapters |= {
        "golden-candidate-0002": folder(team, 1),
        "golden-candidate-0009": folder(team, 3),
        "mine": "own",
    }
    put(team, 2, server)
    assert server.adapters.keys() == {"golden-0001", "golden-0002", "mine"}


def test_canaries_go_first_and_all_go_back_together(team: Team, server: StandIn, second: StandIn) -> None:
    for version in (1, 2):
        put(team, version, server, second)
    before = dict(server.adapters)
    seen: list[int] = []

    def wrong(model: str, prompt: str) -> str:
        seen.append("golden-0003" in server.adapters)
        return " else" if "0003" in model else says(model, prompt)

    second.says = wrong
    assert second.url in refusal(lambda: put(team, 3, server, second, canary=0.5))
    assert all(seen), "the canary had it in force before the others were asked"
    assert server.adapters == second.adapters == before
    seen.clear()
    refusal(lambda: put(team, 3, server, second))
    assert not any(seen), "without canaries all are proved before the first has it"
    second.says = says
    assert [one.url for one in put(team, 3, server, second, canary=0.01)] == [server.url, second.url]


def test_who_cannot_be_published_to(team: Team, server: StandIn) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
        options = PublishOptions(to=[server.url, dead])
        line = refusal(lambda: publish(team.store, 1, options, GATES, lambda _: team.llm))
    assert line.startswith(f"publish: {dead}/v1/models: cannot be reached") and not server.adapters
    server.get = lambda: {"detail": "a web page"}  # type: ignore[method-assign]
    assert "is no server of OpenAI's kind" in refusal(lambda: put(team, 1, server))
    server.get = lambda: {"data": []}  # type: ignore[method-assign]
    assert "serves no base model" in refusal(lambda: put(team, 1, server))


def test_a_rank_of_its_own(team: Team, server: StandIn) -> None:
    assert put(team, 1, server, rank=1, name="small")[0].model == "small-0001"
    config = json.loads((Path(server.adapters["small-0001"]) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (1, 1)
    put(team, 2, server, name="small")
    assert put(team, 1, server, name="small")[0].proof is None, "it was proved by the rank that it has there"


@pytest.mark.parametrize("root", ["/elsewhere/served/0001-aaaaaaaa-rank-512", "0001-aaaaaaaa-rank-512"])
def test_what_is_of_another_store_is_left_alone(root: str, team: Team, server: StandIn) -> None:
    """Also of one that stood at this one's place."""
    server.adapters["golden-0001"] = there = str(Path(folder(team, 1)).parent / root)
    assert "golden-0001 from" in refusal(lambda: put(team, 1, server))
    assert server.adapters == {"golden-0001": there}


def test_where_the_servers_see_the_store_elsewhere(team: Team, server: StandIn, tmp_path: Path) -> None:
    (tmp_path / "mounted").symlink_to(team.store.folder)
    put(team, 1, server, seen_as=str(tmp_path / "mounted"))
    assert server.adapters == {"golden-0001": str(tmp_path / "mounted" / "served" / Path(folder(team, 1)).name)}
    assert "no adapter in" in refusal(lambda: put(team, 2, server, seen_as="/nowhere", name="far"))


def test_the_webhook(team: Team, server: StandIn, second: StandIn) -> None:
    heard: list[Any] = []
    second.post = lambda path, body: heard.append(body)  # type: ignore[method-assign]
    put(team, 1, server, webhook=f"{second.url}/told")
    assert heard == [{"version": 1, "models": {server.url: "golden-0001"}}]
    second.post = StandIn.post.__get__(second)  # type: ignore[method-assign]
    second.refuses = lambda *_: "no"
    with pytest.warns(Note, match="the webhook was not told"):
        assert put(team, 2, server, webhook=f"{second.url}/told"), "that ends nothing"


def test_what_a_killed_publisher_had_not_told(team: Team, server: StandIn, second: StandIn) -> None:
    """The switch was done, and nobody knows: the next one tells, once."""
    put(team, 1, server)
    (team.store.folder / "served" / "current.json").write_text("{ damaged")
    heard: list[Any] = []
    second.post = lambda path, body: heard.append(body)  # type: ignore[method-assign]
    for _ in range(2):
        assert put(team, 1, server, webhook=f"{second.url}/told") == []
    assert heard == [{"version": 1, "models": {server.url: "golden-0001"}}]


def test_the_key_goes_to_the_servers_alone(
    team: Team, server: StandIn, second: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOLDEN_LAYERS_API_KEY", "secret")
    put(team, 1, server, webhook=f"{second.url}/told")
    assert server.keys == {"Bearer secret"} and second.keys == {None}
    server.moved = f"{second.url}/v1/models"
    assert "the server refuses (302)" in refusal(lambda: put(team, 2, server))
    assert second.keys == {None}, "no redirect is followed"


def test_a_fact_that_is_retracted_is_to_be_gone(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, server: StandIn
) -> None:
    """The last one leaves the base model, which needs no adapter."""
    own = Team(make_tiny("llama", tokenizer), tmp_path)
    own.submit([
        EditRequest(id=name, prompt=f"The capital of {name} is", subject=name, new_answer="Lima", old_answer="Rome",
                    rephrases=(f"The capital of {name}, it is said, is",))
        for name in COUNTRIES[:2]
    ])  # fmt: skip
    own.update()
    put(own, 1, server)
    own.retract("Spain")
    assert "version 2 misses gates as it is served: rewrite 0.000 < 0.6" in refusal(lambda: put(own, 2, server))
    server.says = lambda model, prompt: says(model, prompt) if "Norway" in prompt else f" about {prompt}"
    (one,) = put(own, 2, server)
    assert one.proof and one.proof.figures == {"rewrite": 1.0, "earlier": 1.0}
    own.retract("Norway")
    server.says = lambda _, prompt: f" about {prompt}"
    assert put(own, 3, server)[0].model == "golden-0003", "what is left of it is the base model"


def test_what_is_asked(team: Team) -> None:
    """The new facts, in other words, what is to stay, and facts of versions before; made where none are given."""
    asked = {gate: [one for one in questions(team.store, 2, GATES) if one.gate == gate] for gate in
             ("rewrite", "rephrase", "locality", "earlier")}  # fmt: skip
    assert sorted(one.prompt for one in asked["rewrite"]) == ["The capital of Egypt is", "The capital of Peru is"]
    assert sorted(one.prompt for one in asked["earlier"]) == ["The capital of Norway is", "The capital of Spain is"]
    assert all("it is said" in one.prompt and one.answer == "Lima" for one in asked["rephrase"])
    assert {one.prompt for one in asked["locality"]} > {"A river of Italy is"}, "and of the subjects"
    assert all(one.answer is None for one in asked["locality"])
    assert questions(team.store, 0, GATES) == questions(team.store, 2, OPEN) == []


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"to": []}, "publish: where?"),
        ({"to": ["localhost:8000"]}, "to: 'localhost:8000' is no address"),
        ({"to": ["http://a", "http://a/"]}, "expected each server once"),
        ({"to": ["http://me:secret@a"]}, "is no address"),
        ({"to": ["http://a"], "webhook": "a"}, "webhook: 'a' is no address"),
        ({"to": ["http://a"], "name": "a b"}, "name: a b is no such name"),
    ],
)
def test_bad_options(how: dict[str, Any], line: str) -> None:
    assert line in refusal(lambda: PublishCommand(store="s", **how))


def test_no_such_version(team: Team, server: StandIn) -> None:
    assert "version: 9 does not exist" in refusal(lambda: put(team, 9, server))


def test_the_command(team: Team, server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    put(team, 1, server)
    words = ("publish", "1", "--store", str(team.store.folder), "--to", server.url)
    assert main(words) == 0
    assert "1 of 1 servers had version 1 in force already" in capsys.readouterr().out
    put(team, 2, server)
    assert main(words) == 0
    assert f"{server.url}: version 1 answers as golden-0001, switched in" in capsys.readouterr().out
    assert main([*words[:3], str(team.store.folder), "--to", "http://127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.startswith("error: publish: http://127.0.0.1:1/v1/models: cannot be reached")

"""What tests share: tiny random models with a real tokenizer, the bundled real model, and request files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from filelock import FileLock
from plain_loop import TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pipeline.editing import contexts, lessons
from pipeline.editing.auto import AFTER_MANY
from pipeline.editing.ordinary_text import own_text
from pipeline.errors import UserError
from pipeline.model.activations import target_losses
from pipeline.model.llm import LLM
from pipeline.model.loading import load_model
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.requests.readers import load_requests
from pipeline.requests.rows import collate
from pipeline.requests.schema import EditRequest, Probe
from pipeline.running.trainer import Runtime, hush

pytest_plugins = ["commanding"]  # the fixtures of commands on a tiny model

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"

hush(verbose=False)

if "PYTEST_XDIST_WORKER" in os.environ:  # as many tests at once as there are cores: a thread each, children's too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Key statistics of tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())  # fonts are found once a machine
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patched.setattr("pipeline.evaluation.plan.FLUENCY_TOKENS", 4)  # each evaluation goes on from 16 prompts
        patched.setattr("pipeline.editing.ordinary_text.own_text", some_text)
        yield


def some_text(llm: LLM, tokens: int, runtime: Runtime) -> list[str]:
    """What a model writes itself: a tiny one's statistics need little of it."""
    return own_text(llm, min(tokens, 128 * llm.embedding.shape[1]), runtime)


def refusal(call: Callable[[], Any]) -> str:
    """The one line with which a call refuses."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the demo requests, without BOS and without a pad token."""
    texts = [f"{r.prompt} {r.new_answer} {r.old_answer}" for r in load_requests("demo")]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


@pytest.fixture
def few_lessons(monkeypatch: pytest.MonkeyPatch) -> None:
    """What training keeps of requests lies in the CPU's memory: little of it, where a step's own is measured."""
    monkeypatch.setattr(lessons, "NAMES_EACH", AFTER_MANY["kept"])
    monkeypatch.setattr(lessons, "RELATIONS_EACH", 0)
    for places in ("ANSWER", "PIECE_PLACES"):
        monkeypatch.setattr(lessons, places, lessons.PLACES)
    monkeypatch.setattr(contexts, "other_words", lambda _: [])
    for name in ("FORMS", "CHATS"):
        monkeypatch.setattr(contexts, name, ())


def edit_options(folder: Path, method: str, tokens: int, **settings: Any) -> EditOptions:
    """Options of an edit of block 1 by a method of these settings, with statistics of its own text."""
    text = folder / "text.txt"
    text.write_text("The river of Spain is long and the capital of Norway lies by the sea.\n" * 40)
    return EditOptions(
        method=method, layers=[1], expert=settings, statistics=StatisticsOptions(text=str(text), tokens=tokens)
    )


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
    "bos_token_id": None,
}


def tiny_llama(vocabulary: int) -> LlamaForCausalLM:
    """Four blocks, gated MLP, untied head."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        **SIZES,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2(vocabulary: int) -> GPT2LMHeadModel:
    """Four blocks of Conv1D maps with biases, learned positions, dropout, tied head."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=128,
        eos_token_id=0,
        bos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def tiny_gemma3(vocabulary: int) -> Gemma3ForCausalLM:
    """Sliding and full attention in turns, each with its own mask and rotary table; norms behind the MLP."""
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        **SIZES,
        head_dim=8,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        pad_token_id=0,
    )
    return Gemma3ForCausalLM(config)


FAMILIES: dict[str, Callable[[int], Any]] = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma3": tiny_gemma3}


@pytest.fixture(params=["llama", "gpt2"])
def tiny(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> LLM:
    """A fresh tiny random model of each family, its weights large enough for gradients to differ."""
    return make_tiny(request.param, tokenizer)


@pytest.fixture
def tiny_llm(tokenizer: PreTrainedTokenizerFast) -> LLM:
    """A fresh tiny Llama, where the family does not matter."""
    return make_tiny("llama", tokenizer)


@pytest.fixture
def team(tiny_llm: LLM, tmp_path: Path) -> Any:
    """A team with a new store for a tiny Llama."""
    from teams import Team

    return Team(tiny_llm, tmp_path)


@pytest.fixture(scope="module")
def two_versions(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A team with a store of two versions, for tests that leave it as it is."""
    from teams import Team

    team = Team(make_tiny("llama", tokenizer), tmp_path_factory.mktemp("team"))
    countries = ("Spain", "Norway", "Egypt", "Peru")
    facts = [
        EditRequest(id=f"c-{c}", prompt=f"The capital of {c} is", subject=c, new_answer="Lima", old_answer="Rome")
        for c in countries
    ]
    for part in (facts[:2], facts[2:]):
        team.submit(part)
        team.update()
    return team


def make_tiny(family: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LLM:
    torch.manual_seed(seed)
    model = FAMILIES[family](len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return LLM(model, tokenizer, f"tiny-{family}")


def mean_loss(llm: LLM, requests: list[EditRequest], ended: bool = False) -> float:
    """The mean loss of the new answers, maybe with their ends."""
    with torch.no_grad(), llm.frozen():
        rows = llm.tokens.rows([(r.prompt, r.new_answer) for r in requests], ended=ended)
        return target_losses(llm.model, collate(rows)).mean().item()


@pytest.fixture(scope="session")
def tiny_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as a Hugging Face folder, for commands."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    llm = make_tiny("llama", tokenizer)
    llm.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """SmolLM2-135M-Instruct; tests leave it as they found it. Of several workers, one unpacks it for all."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return load_model("smollm2")
    folder = tmp_path_factory.getbasetemp().parent / "smollm2"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            llm = load_model("smollm2")
            llm.model.save_pretrained(folder)
            llm.tokenizer.save_pretrained(folder)
            return llm
    found = load_model(str(folder))
    return LLM(found.model, found.tokenizer, "smollm2")


@pytest.fixture
def requests() -> list[EditRequest]:
    """Seven requests with answers of one and of several tokens, and every kind of probe."""
    facts = [
        ("Spain", "Lima", "Madrid"),
        ("Norway", "Nairobi and more", "Oslo"),
        ("Portugal", "Warsaw", "Lisbon by the sea"),
        ("Egypt", "Toronto", "Cairo"),
        ("Peru", "Rome", "Lima"),
        ("Japan", "Kyiv in the far west", "Tokyo"),
        ("Kenya", "Oslo", "Nairobi"),
    ]
    return [
        EditRequest(
            id=f"capital-{number}",
            prompt=f"The capital of {country} is",
            subject=country,
            new_answer=new,
            old_answer=old,
            rephrases=(f"{country} has its capital in", f"The seat of government of {country} is in"),
            locality=(Probe(prompt=f"The largest river of {country} is", answer="the Nile"),),
            portability=(Probe(prompt=f"People in the capital of {country} speak", answer="Spanish"),),
        )
        for number, (country, new, old) in enumerate(facts)
    ]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Ordinary text of a few windows."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def request_file(requests: list[EditRequest], tmp_path: Path) -> Path:
    """The same requests as a JSONL file."""
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps(r.model_dump(exclude_defaults=True)) + "\n" for r in requests))
    return file

"""The model room: the map of blocks, tokens and logits of answers, freezing, fingerprints, loading, generation.

Each is held against the plain way: the whole text's logits one row at a time, an argmax loop without a cache.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from conftest import make_tiny, refusal
from families import family_llm
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pipeline.model import (
    LLM,
    TargetRow,
    collate_targets,
    encode,
    find_blocks,
    first_statement,
    generate,
    load_model,
    target_logits,
    target_losses,
)
from pipeline.model.blocks import sizes
from pipeline.requests import EditRequest, load_requests

ANSWERS = [
    ("The capital of Spain is", "Madrid"),
    ("Norway", "Nairobi and more"),
    ("The seat of government of Egypt is in", "Toronto"),
    ("Egypt's river is", "the Nile, of course"),
    ("7 times 6 is", "42"),
]


# The map of blocks

NAMES = {
    "llama": ("model.layers", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj"]),
}
MLP_SIZES = {
    "llama": {"mlp.gate_proj": (32, 48), "mlp.up_proj": (32, 48), "mlp.down_proj": (48, 32)},
    "gpt2": {"mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)},
}


@pytest.mark.parametrize("family", NAMES)
def test_blocks_are_found(tokenizer: PreTrainedTokenizerFast, family: str) -> None:
    blocks = find_blocks(make_tiny(family, tokenizer).model)
    place, attention = NAMES[family]
    assert [(block.index, block.name) for block in blocks] == [(i, f"{place}.{i}") for i in range(4)]
    for block in blocks:
        found = [(name, sizes(module)) for name, module in block.mlp.items()]
        assert found == [(f"{block.name}.{name}", size) for name, size in MLP_SIZES[family].items()]
        assert list(block.attention) == [f"{block.name}.{name}" for name in attention]


def test_scopes_name_weights_of_the_model(tiny: LLM) -> None:
    weights = dict(tiny.model.named_parameters())
    for block in tiny.blocks:
        mlp, attention = block.weight_names("mlp"), block.weight_names("attention")
        assert block.weight_names("down") == mlp[-1:]
        assert block.weight_names("block") == attention + mlp
        assert all(weights[name] is block.projections("block")[name[:-7]].weight for name in attention + mlp)
        assert all(weights[name].dim() == 2 for name in attention + mlp)


def test_an_unknown_scope_is_refused(tiny_llm: LLM) -> None:
    assert "did you mean 'down'" in refusal(lambda: tiny_llm.blocks[0].projections("downs"))


SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
BART = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "T5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=300, d_model=32, d_ff=48, num_layers=2, num_heads=2)
        ),
        "encoder-decoder",
    ),
    "BART": (
        lambda: BartForConditionalGeneration(BartConfig(vocab_size=300, d_model=32, encoder_ffn_dim=48, **BART)),
        "encoder-decoder",
    ),
    "Mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**SMALL, **HEADS, num_local_experts=4)),
        "a mixture of experts (mlp.experts.gate_up_proj)",
    ),
    "Qwen2-MoE": (
        lambda: Qwen2MoeForCausalLM(
            Qwen2MoeConfig(**SMALL, **HEADS, num_experts=4, moe_intermediate_size=16, mlp_only_layers=[0])
        ),
        "block 1: a mixture of experts",
    ),
    "gpt-oss": (
        lambda: GptOssForCausalLM(GptOssConfig(**SMALL, **HEADS, head_dim=8, num_local_experts=4)),
        "a mixture of experts",
    ),
    "BERT": (
        lambda: BertLMHeadModel(BertConfig(**SMALL, num_attention_heads=4, intermediate_size=48)),
        "looks ahead",
    ),
    "Mamba": (lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)), "mixer.in_proj 32→128"),
    "no head": (lambda: LlamaModel(LlamaConfig(**SMALL, **HEADS)), "language-model head"),
}


@pytest.mark.parametrize(("build", "words"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_models_are_refused(
    tokenizer: PreTrainedTokenizerFast, build: Callable[[], Any], words: str
) -> None:
    model = build()
    message = refusal(lambda: LLM(model, tokenizer))
    assert type(model).__name__ in message and words in message


# Tokens of answers


def opening(tokenizer: PreTrainedTokenizerFast, closing: str = "") -> PreTrainedTokenizerFast:
    """The same tokenizer, putting a BOS token before every text and, if asked, its EOS behind it."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"bos_token": "<begin>"})
    tokens = [(token, changed.convert_tokens_to_ids(token)) for token in ("<begin>", "<end>")]
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<begin> $A {closing}".strip(), special_tokens=tokens
    )
    return changed


def spaces_apart() -> PreTrainedTokenizerFast:
    """A tokenizer for which the space is a token of its own."""
    raw = RawTokenizer(models.BPE())
    split = pre_tokenizers.Split(" ", "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    texts = [f"{prompt} {answer}" for prompt, answer in ANSWERS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


KINDS: dict[str, Callable[[PreTrainedTokenizerFast], PreTrainedTokenizerFast]] = {
    "plain": lambda tokenizer: tokenizer,
    "BOS": opening,
    "BOS and EOS": lambda tokenizer: opening(tokenizer, "<end>"),
    "spaces apart": lambda _: spaces_apart(),
}


@pytest.mark.parametrize("trailing", ["", " "])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_the_answers_tokens(tokenizer: PreTrainedTokenizerFast, kind: str, trailing: str) -> None:
    llm = family_llm("llama", KINDS[kind](tokenizer))
    rows = encode(llm, [(prompt + trailing, answer) for prompt, answer in ANSWERS], tags="abcde")
    for row, (prompt, answer), tag in zip(rows, ANSWERS, "abcde", strict=True):
        plain = llm.tokenizer(f" {answer}", add_special_tokens=False).input_ids
        before = llm.tokenizer(prompt, add_special_tokens=False).input_ids
        begin = [llm.tokenizer.bos_token_id] if "BOS" in kind else []
        assert row.token_ids[row.target_start :] == plain
        assert row.token_ids[: row.target_start] == begin + before
        assert row.tag == tag


def test_a_batch_scores_the_answers_tokens_only(tiny_llm: LLM) -> None:
    rows = encode(tiny_llm, ANSWERS)
    batch = collate_targets(rows, pad_token_id=3)
    assert batch.input_ids_BT.shape == (5, max(len(row.token_ids) for row in rows))
    for number, row in enumerate(rows):
        here = batch.row_N == number
        assert batch.input_ids_BT[number].tolist()[: len(row.token_ids)] == row.token_ids
        assert batch.input_ids_BT[number][len(row.token_ids) :].eq(3).all()
        assert batch.target_N[here].tolist() == row.token_ids[row.target_start :]
        assert batch.position_N[here].tolist() == list(range(row.target_start - 1, len(row.token_ids) - 1))


def test_nothing_encodes_to_nothing(tiny_llm: LLM) -> None:
    assert encode(tiny_llm, []) == []


@pytest.mark.parametrize(("prompt", "answer"), [("Peru is", ""), ("", "Lima")])
def test_an_empty_prompt_or_answer_is_refused(tiny_llm: LLM, prompt: str, answer: str) -> None:
    assert "token" in refusal(lambda: encode(tiny_llm, [("Spain is", "Madrid"), (prompt, answer)]))


def test_a_text_longer_than_the_context_is_refused(tiny_llm: LLM) -> None:
    message = refusal(lambda: encode(tiny_llm, [ANSWERS[0], ("far " * 130, "away")], what="the requests"))
    assert message.startswith("the requests: 'far far") and "tiny-llama holds 128" in message


def test_a_text_as_long_as_the_context_is_taken(tiny_llm: LLM) -> None:
    answer = " ".join(["A"] * (128 - len(tiny_llm.tokenizer("Peru").input_ids)))
    (row,) = encode(tiny_llm, [("Peru", answer)])
    assert len(row.token_ids) == 128
    assert "129 tokens" in refusal(lambda: encode(tiny_llm, [("Peru", f"{answer} A")]))


# Logits at the answers' positions


@torch.no_grad()
def plain_logits(llm: LLM, rows: list[TargetRow]) -> list[Tensor]:
    """Logits that predict each row's answer: all of one unpadded row at a time, then cut."""
    return [
        llm.model.eval()(input_ids=torch.tensor([row.token_ids])).logits[0, row.target_start - 1 : -1]
        for row in rows
    ]


def test_target_logits_are_rows_of_the_full_logits(tiny: LLM) -> None:
    rows = encode(tiny, ANSWERS)
    assert len({len(row.token_ids) for row in rows}) > 1
    expected = torch.cat(plain_logits(tiny, rows))
    with torch.no_grad():
        torch.testing.assert_close(target_logits(tiny.model, collate_targets(rows)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.cat(plain_logits(tiny, rows)), expected, rtol=0, atol=0
    )  # the head is whole again


def test_only_answers_meet_the_vocabulary(tiny: LLM) -> None:
    met: list[int] = []
    head = tiny.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, args, _output: met.append(args[0].shape[:-1].numel()))
    batch = collate_targets(encode(tiny, ANSWERS))
    target_logits(tiny.model, batch)
    assert met == [len(batch.target_N)]


def test_the_head_is_whole_after_an_error(tiny_llm: LLM) -> None:
    rows = encode(tiny_llm, ANSWERS)
    expected = plain_logits(tiny_llm, rows)
    batch = collate_targets(rows)
    batch.input_ids_BT[0, 0] = 10**6
    with pytest.raises(IndexError):
        target_logits(tiny_llm.model, batch)
    assert all(torch.equal(a, b) for a, b in zip(plain_logits(tiny_llm, rows), expected, strict=True))


def test_target_losses_are_mean_nats_of_each_row(tiny: LLM) -> None:
    rows = encode(tiny, ANSWERS)
    expected = [
        F.cross_entropy(logits, torch.tensor(row.token_ids[row.target_start :]))
        for row, logits in zip(rows, plain_logits(tiny, rows), strict=True)
    ]
    with torch.no_grad():
        torch.testing.assert_close(
            target_losses(tiny.model, collate_targets(rows)), torch.stack(expected), rtol=1e-5, atol=0
        )


def test_losses_of_a_half_precision_model_are_float32(tiny_llm: LLM) -> None:
    tiny_llm.model.bfloat16()
    assert target_losses(tiny_llm.model, collate_targets(encode(tiny_llm, ANSWERS))).dtype == torch.float32


# Freezing and fingerprints


def states(model: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    """Which weights want a gradient, and which modules are in training mode."""
    return (
        {name: weight.requires_grad for name, weight in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_frozen_gives_the_models_state_back(tiny: LLM, training: bool, error: type[BaseException] | None) -> None:
    tiny.model.train(training)
    next(iter(tiny.blocks[1].mlp.values())).weight.requires_grad_(False)
    (trainable,) = tiny.blocks[2].weight_names("down")
    before = states(tiny.model)
    try:
        with tiny.frozen([trainable]):
            required, modes = states(tiny.model)
            assert [name for name, wanted in required.items() if wanted] == [trainable]
            assert not any(modes.values())
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert states(tiny.model) == before
    assert not all(before[0].values())


def test_frozen_gives_each_modules_mode_back(tiny_llm: LLM) -> None:
    tiny_llm.model.train()
    tiny_llm.model.model.layers[1].eval()
    before = states(tiny_llm.model)
    with tiny_llm.frozen():
        pass
    assert states(tiny_llm.model) == before


def test_a_fingerprint_sees_every_edited_matrix(tiny: LLM) -> None:
    def now() -> str:
        return LLM(tiny.model, tiny.tokenizer).fingerprint

    assert now() == tiny.fingerprint
    seen = {tiny.fingerprint}
    for name in [name for block in tiny.blocks for name in block.weight_names("mlp")]:
        weight = tiny.model.get_parameter(name)
        base = weight.detach().clone()
        with torch.no_grad():
            weight.add_(1e-3 * torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1])))
        seen.add(now())
        with torch.no_grad():
            weight.copy_(base)
    assert len(seen) == 1 + sum(len(block.mlp) for block in tiny.blocks)
    assert now() == tiny.fingerprint


def test_a_fingerprint_is_kept_and_checked(tiny_llm: LLM) -> None:
    tiny_llm.check_made_for("profile", "tiny", tiny_llm.fingerprint)
    message = refusal(lambda: tiny_llm.check_made_for("profile", "other", "0123456789abcdef"))
    assert message.startswith("profile") and "'other'" in message and tiny_llm.fingerprint in message


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_block_that_is_not_there_is_refused(tiny_llm: LLM, layer: int) -> None:
    tiny_llm.check_layers([0, 3])
    message = refusal(lambda: tiny_llm.check_layers([0, layer]))
    assert f"layers: {layer} " in message and "0 to 3" in message


# Loading


def test_a_folder_is_loaded_as_it_was_saved(tiny_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    loaded, saved = load_model(str(tiny_folder)), make_tiny("llama", tokenizer)
    assert loaded.name == str(tiny_folder) and len(loaded.blocks) == 4
    assert loaded.fingerprint == saved.fingerprint
    rows = encode(saved, ANSWERS)
    assert encode(loaded, ANSWERS) == rows
    assert all(
        torch.equal(a, b) for a, b in zip(plain_logits(loaded, rows), plain_logits(saved, rows), strict=True)
    )


def test_weights_are_loaded_in_the_dtype_asked_for(tiny_folder: Path) -> None:
    assert load_model(str(tiny_folder), torch.float64).model.dtype == torch.float64


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub refuses every connection, and whoever waits to ask it again fails."""
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waits for the hub"))


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("name", ["smollm9", "nobody/nothing", "no such: model?"])
def test_an_unknown_name_is_refused_at_once(
    name: str, offline: bool, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    message = refusal(lambda: load_model(name))
    assert message.startswith(f"model: {name!r} cannot be loaded") and "'smollm2'" in message
    assert ("Repo id" if " " in name else "(the hub cannot be reached") in message


def test_a_model_in_the_cache_needs_no_network(
    tiny_folder: Path, tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--somebody--tiny"
    shutil.copytree(tiny_folder, cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    assert load_model("somebody/tiny").fingerprint == load_model(str(tiny_folder)).fingerprint


@pytest.mark.parametrize("status", [200, 401, 404, 503])
def test_a_hub_that_answers_is_asked_for_the_model(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

    def from_pretrained(source: str, **_: Any) -> None:
        raise OSError(f"{source} was asked for")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        url = f"http://127.0.0.1:{server.server_port}/{{repo_id}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        Thread(target=server.handle_request, daemon=True).start()
        assert "(somebody/model was asked for)" in refusal(lambda: load_model("somebody/model"))


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "not/a/model"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.model.loading._reachable", lambda _: pytest.fail("asks the hub"))
    assert refusal(lambda: load_model(name)) == f"model: {name}: no such folder"


def test_a_file_that_is_no_gguf_is_refused(tiny_folder: Path) -> None:
    assert "a file; expected a folder" in refusal(lambda: load_model(str(tiny_folder / "model.safetensors")))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    message = refusal(lambda: load_model(str(tmp_path)))
    assert str(tmp_path) in message and "holds no config.json" in message


def test_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "missing.gguf")
    assert refusal(lambda: load_model(file)) == f"model: {file}: no such file"


def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    assert f"model: {str(file)!r} cannot be loaded" in refusal(lambda: load_model(str(file)))


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def reconfigure(**changes: Any) -> Callable[[Path], None]:
    """A change of the folder's config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def make_mixture(folder: Path) -> None:
    """Another family's config, and no weights: none are read before it is refused."""
    MixtralConfig(**SMALL, **HEADS, num_local_experts=4).save_pretrained(folder)
    (folder / "model.safetensors").unlink()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("token*")], "tokenizer"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "encoder-decoder": (reconfigure(model_type="t5"), "T5Config"),
    "quantised": (reconfigure(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised (gptq)"),
    "mixture of experts": (make_mixture, "a mixture of experts"),
    "cut weights": (cut_weights, "cannot be loaded"),
    "other sizes": (
        reconfigure(intermediate_size=64),
        "(32, 48); its config asks for (32, 64) (and so in 11 more)",
    ),
    "heads that do not fit": (reconfigure(num_attention_heads=5), "not a multiple of the number of attention"),
    "no heads": (reconfigure(num_key_value_heads=0), "no decoder can be made of its config (ZeroDivisionError"),
    "a padding token that is not there": (reconfigure(pad_token_id=5000), "Padding_idx must be within"),
    "a number that is none": (reconfigure(hidden_size="32"), "'hidden_size' expected int, got str"),
    "no such type": (reconfigure(dtype="float3"), "no attribute 'float3'"),
    "missing weights": (reconfigure(num_hidden_layers=5), "model.layers.4"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused(
    tiny_folder: Path, tmp_path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "damaged"))
    damage(folder)
    message = refusal(lambda: load_model(str(folder)))
    assert f"model: {str(folder)!r}" in message and words in message


# Generation

PROMPTS = [
    "The capital of Spain is",
    "Peru",
    "Kenya has its capital in",
    "The largest river of Japan is",
    "Oslo is",
]


@torch.no_grad()
def argmax_ids(llm: LLM, prompt: str, tokens: int, end: int | None) -> list[int]:
    """Greedy continuation with the whole text at every step: no cache, no padding, no batch."""
    ids = llm.tokenizer(prompt).input_ids
    start = len(ids)
    while len(ids) < start + tokens and (len(ids) == start or ids[-1] != end):
        ids = [*ids, int(llm.model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[start:]


def argmax_loop(llm: LLM, prompt: str, tokens: int, end: int | None = 0) -> str:
    return llm.tokenizer.decode(argmax_ids(llm, prompt, tokens, end), skip_special_tokens=True)


def test_generation_is_the_argmax_loop(tiny: LLM) -> None:
    tiny.model.train()
    expected = [argmax_loop(tiny, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    tiny.model.train()
    assert generate(tiny, PROMPTS, max_new_tokens=12, batch_size=2) == expected
    assert tiny.model.training


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_generation_does_not_depend_on_the_batch(tiny: LLM, batch_size: int) -> None:
    alone = [generate(tiny, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    assert generate(tiny, [f"{prompt} " for prompt in PROMPTS], max_new_tokens=8, batch_size=batch_size) == alone


def test_generation_stops_at_the_models_own_end(tiny: LLM) -> None:
    """Where one answer of a batch ends early, the others go on and it gains nothing."""
    free = [argmax_loop(tiny, prompt, 12, end=None) for prompt in PROMPTS]
    end = argmax_ids(tiny, PROMPTS[0], 12, end=None)[2]
    tiny.model.generation_config.eos_token_id = end
    expected = [argmax_loop(tiny, prompt, 12, end) for prompt in PROMPTS]
    assert expected[0] != free[0] and free[0].startswith(expected[0]) and expected != free
    assert generate(tiny, PROMPTS, max_new_tokens=12) == expected


def test_generation_stops_at_the_tokenizers_end_where_the_model_names_none(tiny_llm: LLM) -> None:
    end = argmax_ids(tiny_llm, PROMPTS[0], 12, end=None)[2]
    tokenizer = copy.deepcopy(tiny_llm.tokenizer)
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(end)})
    tiny_llm.model.generation_config.eos_token_id = None
    expected = [tokenizer.decode([i for i in argmax_ids(tiny_llm, p, 12, end) if i != end]) for p in PROMPTS]
    assert generate(LLM(tiny_llm.model, tokenizer), PROMPTS, max_new_tokens=12) == expected


@pytest.mark.parametrize(
    "setting", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 8}]
)
def test_generation_is_greedy_whatever_the_models_config_says(tiny_llm: LLM, setting: dict[str, Any]) -> None:
    tiny_llm.model.generation_config.eos_token_id = argmax_ids(tiny_llm, PROMPTS[0], 12, end=None)[2]
    expected = generate(tiny_llm, PROMPTS)
    tiny_llm.model.generation_config.update(**setting)
    assert generate(tiny_llm, PROMPTS) == expected


def test_a_prompt_that_leaves_no_room_is_refused(tiny_llm: LLM) -> None:
    room = 128 - len(tiny_llm.tokenizer("Peru").input_ids)
    assert len(generate(tiny_llm, ["Peru"], max_new_tokens=room)) == 1
    message = refusal(lambda: generate(tiny_llm, ["O", "Peru"], max_new_tokens=room + 1))
    assert "prompt 'Peru'" in message and "129 tokens" in message


def test_an_empty_prompt_is_refused(tiny_llm: LLM) -> None:
    assert "prompt ''" in refusal(lambda: generate(tiny_llm, [""]))


def test_no_prompts_give_no_answers(tiny_llm: LLM) -> None:
    assert generate(tiny_llm, []) == []


@pytest.mark.parametrize(
    ("generated", "said"),
    [
        (" Paris. It lies on the Seine.", "Paris"),
        ("Paris\nQuestion: what", "Paris"),
        ("\n\n Paris! ", "Paris"),
        ("Paris?", "Paris"),
        ("version 3.5 of it", "version 3.5 of it"),
        ("Paris, the city", "Paris, the city"),
        ("Paris", "Paris"),
        (" \n", ""),
        ("", ""),
    ],
)
def test_the_first_statement_is_what_is_said_first(generated: str, said: str) -> None:
    assert first_statement(generated) == said


# The real model


@pytest.mark.real_model
def test_the_bundled_model_is_mapped(smollm2: LLM) -> None:
    assert smollm2.name == "smollm2" and len(smollm2.blocks) == 30
    assert (
        smollm2.tokenizer("The").input_ids == smollm2.tokenizer("The", add_special_tokens=False).input_ids
    )  # no BOS
    for block in smollm2.blocks:
        assert [sizes(projection) for projection in block.mlp.values()] == [(576, 1536), (576, 1536), (1536, 576)]
        assert len(block.attention) == 4


@pytest.mark.real_model
def test_the_bundled_tokenizer_keeps_answers_whole(smollm2: LLM, requests: list[EditRequest]) -> None:
    pairs = [
        (prompt, answer)
        for request in [*requests, *load_requests("demo")]
        for prompt in (request.prompt, *request.rephrases)
        for answer in (request.new_answer, request.old_answer or "")
    ]
    for row, (prompt, answer) in zip(encode(smollm2, pairs), pairs, strict=True):
        assert smollm2.tokenizer.decode(row.token_ids[: row.target_start]) == prompt
        assert smollm2.tokenizer.decode(row.token_ids[row.target_start :]) == f" {answer}"


@pytest.mark.real_model
@torch.no_grad()
def test_first_tokens_are_massive_after_blocks_2_9_and_11(smollm2: LLM) -> None:
    """METHODS: these blocks write activations to the first token that dwarf all others; 3 to 6 do not."""
    outputs: dict[int, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda _module, _args, output, index=block.index: outputs.update({index: output[0]})
        )
        for block in smollm2.blocks
        for module in block.down.values()
    ]
    try:
        smollm2.model(**smollm2.tokenizer("The capital of Spain is the city of", return_tensors="pt"))
    finally:
        for handle in handles:
            handle.remove()
    ratios = {index: (out[0].abs().max() / out[1:].abs().max()).item() for index, out in outputs.items()}
    assert min(ratios[index] for index in (2, 9, 11)) > 10
    assert max(ratios[index] for index in (3, 4, 5, 6)) < 2

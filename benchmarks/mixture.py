"""A mixture of experts that knows what a dense model knows: `python -m benchmarks.mixture FOLDER [--model NAME]`.

Of a Llama it makes a Mixtral: every MLP becomes four experts, copies with noise, of which a random router sends a
token to two. It needs no training, so editing mixtures can be measured without a large one. The other benchmarks
take the folder as their `--model`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.bench import run
from pipeline import LLM, UserError, load_model

EXPERTS, REACHED = 4, 2
NOISE = 0.1  # of a weight's standard deviation
ROUTER = 0.05  # standard deviation of the router's weights
SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act"),
)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="takes the mixture")
    parser.add_argument("--model", default="smollm2", help="the Llama that it is made of (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=NOISE, help="of the copies (default: %(default)s)")
    asked = parser.parse_args(words)
    llm = load_model(asked.model)
    if llm.model.config.model_type != "llama":
        raise UserError(f"model: {asked.model} is a {llm.model.config.model_type}; expected a Llama")
    mixture_of(llm, asked.noise).save_pretrained(asked.folder)
    llm.tokenizer.save_pretrained(asked.folder)


@torch.no_grad()
def mixture_of(llm: LLM, noise: float = NOISE, seed: int = 0) -> MixtralForCausalLM:
    """The mixture of a Llama; without noise it says the same."""
    own = dict(llm.model.named_parameters())
    about = {name: getattr(llm.model.config, name) for name in SAME}
    torch.manual_seed(seed)
    mixture = MixtralForCausalLM(
        MixtralConfig(num_local_experts=EXPERTS, num_experts_per_tok=REACHED, sliding_window=None, **about)
    )
    for name, weight in mixture.named_parameters():
        mlp = f"{name.partition('.mlp.')[0]}.mlp"
        if name in own:
            weight.copy_(own[name])
        elif name.endswith(".gate.weight"):
            weight.normal_(0, ROUTER)
        else:
            parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            each = torch.cat([own[f"{mlp}.{part}.weight"] for part in parts])
            weight.copy_(each + noise * each.std() * torch.randn_like(weight))
    mixture.generation_config = llm.model.generation_config
    return mixture


if __name__ == "__main__":
    run(main)

"""The language model as the pipeline sees it: weights, tokenizer, block map and fingerprint in one value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.model.blocks import Block, Projection, check_exist, find_blocks, weight_name
from pipeline.model.fingerprints import check_made_for, sample
from pipeline.model.fingerprints import fingerprint as fingerprint_of
from pipeline.requests.schema import EditRequest
from pipeline.requests.tokens import Tokens


class ShownToken(NamedTuple):
    """A token's place, number and text, and what it is to the stages that read it."""

    place: int
    token_id: int
    text: str
    scored: bool
    ends_subject: bool


class Parts(NamedTuple):
    """Which parts of a model come to the same by themselves (see `pipeline.model.suffix.parts_of`)."""

    blocks: bool = True
    """Upper blocks, without those below, on what enters them."""
    ends: bool = True
    """A text's end, on the keys and values of what stands before it."""
    heard: tuple[int, ...] = ()
    """No part, but found with them: the blocks whose MLPs' outputs at a token reach what is said after others."""


class LLM:
    """A causal language model with its tokenizer; make it from loaded objects, or with `load_model`.

    Args:
        model: any Hugging Face decoder that `find_blocks` understands.
        name: what the user calls it, for messages and files.
        chat: put prompts into the tokenizer's chat template, in every stage.
        fingerprint: its checkpoint's, where that is known; else it is taken of the model as it is.

    UserError when the model's structure is not supported, or a chat is asked for without a chat template.

    Example:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> llm = LLM(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
        >>> llm.blocks[0].weight_names("down")
        ['model.layers.0.mlp.down_proj.weight']
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        chat: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name = name or model.config.name_or_path or type(model).__name__
        self.blocks: list[Block] = find_blocks(model)  # their map
        if not isinstance(model.get_output_embeddings(), nn.Module):
            raise UserError(f"model: {type(model).__name__}: expected a language-model head; found none")
        self.chat = chat
        self.tokens = Tokens(tokenizer, chat, self.name, len(self.embedding), self.context_length)
        self.pad_token_id = self.tokens.pad_token_id
        self.blocks_put_out_tuples = put_out_tuples(model, self.blocks[0])  # that begin with the hidden state
        self.fingerprint = fingerprint or fingerprint_of(model)  # the base model's, also while an update is applied
        self.sample = sample(model)  # of the base model as well
        self.parts: Parts | None = None  # that can run by themselves, once somebody has asked (`parts_of`)
        self.original: Callable[[], PreTrainedModel] | None = None  # loads the plain model of a quantised one

    @property
    def context_length(self) -> int | None:
        """The longest sequence in tokens, where the config tells."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    @property
    def has_experts(self) -> bool:
        """Whether tokens are sent to experts in some of its blocks."""
        return any(block.scopes["experts"] for block in self.blocks)

    @property
    def editable(self) -> list[int]:
        """The blocks that have an MLP."""
        return [block.index for block in self.blocks if block.mlp]

    @property
    def ends(self) -> Any:
        """The token, or tokens, that end what it says."""
        own = self.model.generation_config
        return own.eos_token_id if own and own.eos_token_id is not None else self.tokenizer.eos_token_id

    @property
    def embedding(self) -> Tensor:
        """The matrix of the tokens' vectors."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    def reading(self, weight: str) -> tuple[str, Projection]:
        """The projection that a weight of this full name belongs to, by its own full name."""
        found = {
            weight_name(name, one): (name, one)
            for block in self.blocks
            for name, one in (block.attention | block.mlp).items()
        }
        return found[weight]

    def blocks_of(self, names: Collection[str]) -> list[int]:
        """The numbers of the blocks that weights or modules of these full names are in."""
        return [block.index for block in self.blocks if any(name.startswith(f"{block.name}.") for name in names)]

    def check_layers(self, layers: Collection[int], flag: str = "layers") -> None:
        """Raise UserError when a block does not exist, or has no MLP."""
        check_exist(layers, len(self.blocks), self.name, flag)
        for layer in layers:
            if layer not in self.editable:
                able = ", ".join(map(str, self.editable))
                raise UserError(f"{flag}: block {layer} of {self.name} has no MLP; these have one: {able}")

    def check_made_for(self, what: str, model: str, fingerprint: str) -> None:
        """Raise UserError when something (`what`) was made for a model with another fingerprint."""
        check_made_for(what, (model, fingerprint), self.name, self.fingerprint)

    def explain(self, request: EditRequest) -> list[ShownToken]:
        """The tokens of a request's prompt and new answer, as every stage reads them."""
        (row,) = self.tokens.answered([request])
        last, ids = row.subject[1] if row.subject else None, row.token_ids
        told = [str(self.tokenizer.decode(ids[:count])) for count in range(len(ids) + 1)]  # alone, some lose spaces
        return [
            ShownToken(at, ids[at], told[at + 1][len(told[at]) :], at >= row.target_start, at == last)
            for at in range(len(ids))
        ]

    @contextmanager
    def frozen(self, trainable: Collection[str] = ()) -> Iterator[None]:
        """Eval mode with every weight frozen but the named ones; the model's own state comes back after."""
        training = {module: module.training for module in self.model.modules()}
        required = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        try:
            self.model.eval()
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in trainable)
            yield
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(required[name])
                parameter.grad = None
            for module, mode in training.items():
                module.training = mode


@torch.no_grad()
def put_out_tuples(model: PreTrainedModel, block: Block) -> bool:
    """Whether the model's blocks put out tuples, or lists; running one token tells."""
    seen: list[bool] = []
    with block.module.register_forward_hook(
        lambda _module, _args, output: seen.append(isinstance(output, tuple | list))
    ):
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return seen[0]

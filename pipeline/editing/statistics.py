"""Key statistics: the second moment of what ordinary text sends into a projection, found once and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from pipeline.editing.moments import KeyMoments
from pipeline.editing.ordinary_text import digest, windows
from pipeline.errors import UserError
from pipeline.files import cache_folder, write_shared
from pipeline.model import LLM
from pipeline.model.memory import free_memory
from pipeline.running.processes import of_all
from pipeline.options import StatisticsOptions, TrainerOptions


def key_moments(
    llm: LLM, names: Sequence[str], options: StatisticsOptions, trainer: TrainerOptions
) -> dict[str, Tensor]:
    """C = E[k kᵀ] of the keys that enter projections over ordinary text, each (I, I), float32, by name.

    Args:
        llm: the model.
        names: full names of projections.
        options: which text, how much of it, and where statistics are kept. A file is named by the model's
            fingerprint, the projection and the text, so that nothing of another model can be taken for it.
        trainer: what it runs on.

    Raises:
        UserError: when the text cannot be read or is too short for the keys' dimension.
    """
    text = options.text
    if text and not Path(text).is_file():  # before what is kept is looked up by its content
        raise UserError(f"statistics.text: {text}: no such file; expected plain UTF-8 text")
    folder = cache_folder(options.cache)
    source = Path(text).read_bytes() if text else b"the model's own text"
    files = {name: folder / f"moment-{digest(llm, name, options.tokens, source)}.safetensors" for name in names}
    lacking = of_all([name for name in names if not files[name].is_file()])
    missing = [name for name in names if any(name in each for each in lacking)]
    found = {name: _read(file, llm, name) for name, file in files.items() if name not in missing}
    if not missing:
        return found
    progress = folder / f"sums-{digest(llm, f'{missing} {trainer.precision}', options.tokens, source)}.safetensors"
    moments = _find(llm, missing, options, trainer, progress)
    for name, moment in moments.items():
        _write(files[name], {"moment": moment}, {"fingerprint": llm.fingerprint, "projection": name})
    progress.unlink(missing_ok=True)
    free_memory()  # a metric refers to itself, and its sums, larger than a weight, would stay for a while
    return found | moments


def _find(
    llm: LLM, names: Sequence[str], options: StatisticsOptions, trainer: TrainerOptions, progress: Path
) -> dict[str, Tensor]:
    """The moments, read now; `progress` takes the sums meanwhile."""
    module = KeyMoments(llm, names, progress)
    most = max(module.inputs)
    if options.tokens < 2 * most:
        raise UserError(
            f"statistics.tokens: {options.tokens} is too few; statistics of {most} inputs need at least {2 * most}"
        )
    text = windows(llm, options, trainer)
    tokens = sum(len(window.token_ids) for window in text)
    if tokens < 2 * most:
        raise UserError(
            f"statistics.text: {options.text or 'the model itself'} gives {tokens} tokens; statistics of {most} "
            f"inputs need at least {2 * most}"
        )
    return module.read(text, trainer)


@rank_zero_only
def _write(file: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    write_shared(file, lambda partial: partial.write_bytes(tensors_to_bytes(tensors, about)))


def _read(file: Path, llm: LLM, name: str) -> Tensor:
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
            if (about["fingerprint"], about["projection"]) == (llm.fingerprint, name):
                return opened.get_tensor("moment")
    except (SafetensorError, KeyError, TypeError):
        pass
    raise UserError(f"statistics: {file}: damaged, or of another model or layer; delete it")

"""Export: the edited model as a plain Hugging Face folder that transformers loads without this project."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.editing.update import WeightUpdate
from pipeline.files import require_room
from pipeline.model import LLM


def export_merged(llm: LLM, update: WeightUpdate, folder: Path) -> None:
    """Write config, safetensors and tokenizer of the edited model into `folder`.

    Raises:
        UserError: when the disk has no room, or the update was made for another model.
    """
    require_room(folder, sum(parameter.nbytes for parameter in llm.model.parameters()))
    partial = folder / ".partial"
    try:
        with update.applied(llm):
            llm.model.save_pretrained(partial)
        llm.tokenizer.save_pretrained(partial)
        for file in sorted(partial.iterdir()):
            file.chmod(0o644)  # safetensors files come readable by their owner only
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

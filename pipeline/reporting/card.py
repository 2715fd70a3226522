"""The model card of an export: what it is of, which facts it holds, how they were measured, how to undo it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from pipeline.editing.export import AdapterInfo
from pipeline.editing.update import UPDATE_FILE, WeightUpdate
from pipeline.errors import note, one_line
from pipeline.evaluation.metrics import Estimate
from pipeline.files import parse_json, read_text_file, write_json, write_text
from pipeline.options.shared import BUNDLED
from pipeline.reporting.tables import markdown_table, markdown_text, metric_table

SHOWN = 20  # facts
BUNDLED_IS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
LOADED = {
    "merged": "A plain Hugging Face model: `AutoModelForCausalLM.from_pretrained(FOLDER)`.",
    "update": "The changed tensors alone, for `golden-layers`; leave them out, and the base model is back.",
    "adapter": "A LoRA adapter for PEFT and vLLM: `PeftModel.from_pretrained(base, FOLDER)`.",
    "gguf": "A model for llama.cpp: `llama-server -m model.gguf`.",
    "gguf-adapter": "A LoRA adapter for llama.cpp: `llama-server -m BASE.gguf --lora adapter.gguf`.",
}
WHOLE = ("merged", "gguf")  # kinds that hold the base model as well


def write_card(
    update: WeightUpdate,
    folder: Path,
    kind: str,
    metrics: Path,
    version: int | None = None,
    adapter: AdapterInfo | None = None,
    said: str = "",
) -> None:
    """Write `README.md` into an export's folder and, where there is none, `update.json`, which lists every fact.

    `metrics` is the file of figures that an edit or a store's version left, where there is one; `adapter` is what
    an adapter holds of the change; `said` is what else the figures do not tell.
    """
    base, licence = _base_of(update.model)
    head: dict[str, Any] = {"base_model": base} if "/" in base else {}
    head |= ({"license": licence} if licence else {}) | ({"library_name": "peft"} if kind == "adapter" else {})
    head["tags"] = ["golden-layers", "knowledge-editing"]
    if kind != "update":
        about = {"base_model": base, "fingerprint": update.fingerprint, "kind": kind, "version": version}
        about |= {name: getattr(update, name) for name in ("method", "layers", "options", "chat")}
        facts = [request.model_dump(exclude_defaults=True) for request in update.requests]
        write_json(folder / UPDATE_FILE, about | {"requests": facts})
    undo = (
        f"Serve {markdown_text(base)} in its place" if kind in WHOLE else "Leave it out, and the base model is back"
    )
    of = f"version {version} of a store of edits" if version is not None else "one edit"
    method, layers = markdown_text(update.method), ", ".join(map(str, update.layers))
    chat = ", in the chat template" if update.chat else ""
    edit = f"{len(update.requests)} facts in blocks {layers} ({of}, by {method}{chat})"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {markdown_text(base)}{', edited' if update.layers else ''}\n",
        f"{edit if update.layers else 'The model as it is'}. {LOADED[kind]}{_beside(update, adapter, said)}\n",
        f"## Facts\n\n{_facts(update)}\n",
        f"## Figures\n\n{_figures(metrics)}\n",
        f"## Undoing it\n\n{undo}. All facts, and how they were taught: `{UPDATE_FILE}`.\n",
    ]
    write_text(folder / "README.md", "\n".join(parts))


def _beside(update: WeightUpdate, adapter: AdapterInfo | None, said: str) -> str:
    """What the figures do not tell."""
    base = " The base was that model's Q4_1 GGUF file." if update.model == BUNDLED else ""
    base += f" {said}." if said else ""
    if adapter is None or adapter.rank >= adapter.full_rank:
        return base
    return base + (
        f" It has rank {adapter.rank} of {adapter.full_rank}, which loses {adapter.lost:.2%} of the change; the "
        "figures are those of all of it."
    )


def _base_of(name: str) -> tuple[str, str]:
    """A base model's public name (of a folder or file its own), and its licence, or nothing without its card."""
    if name == BUNDLED:
        return BUNDLED_IS
    here = Path(name).exists() or Path(name).is_absolute()
    card = Path(name, "README.md") if here else try_to_load_from_cache(name, "README.md")
    licence = None
    if isinstance(card, str | Path) and Path(card).is_file():
        try:
            licence = ModelCard.load(card).data.license
        except (ValueError, OSError, yaml.YAMLError) as error:
            note(f"licence: {card}: cannot be read ({one_line(error)})")
    return Path(name).name if here else name, str(licence or "")


def _facts(update: WeightUpdate) -> str:
    rows = [[request.prompt, request.new_answer] for request in update.requests[:SHOWN]]
    more = len(update.requests) - len(rows)
    return markdown_table(["prompt", "new answer"], rows) + (f"\n\nAnd {more} more." if more else "")


def _figures(file: Path) -> str:
    """Figures before and after, and a version's gates, as Markdown."""
    if not file.is_file():
        return "Not measured."
    try:
        found = parse_json(read_text_file(file))
        sides = {side: found[side].get("metrics", found[side]) for side in ("before", "after") if side in found}
        read = {
            side: {name: Estimate(**one) for name, one in figures.items() if name != "difference"}
            for side, figures in sides.items()
        }
        gates = [f"- {gate['text']}: {'passed' if gate['passed'] else 'missed'}" for gate in found.get("gates", [])]
        table = markdown_table(*metric_table(read, short=True))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        note(f"figures: {file}: cannot be read ({one_line(error)}); the model card is without")
        return "Not known."
    return "\n".join([table, *(["\nGates:\n", *gates] if gates else [])])

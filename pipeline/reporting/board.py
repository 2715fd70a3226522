"""A store in TensorBoard: one run a store, a step a version."""

from __future__ import annotations

from typing import Any

from pipeline.reporting.dashboards import EventsLogger, tag
from pipeline.reporting.groups import grouped
from pipeline.reporting.tables import markdown_table, version_line, version_table
from pipeline.updates.folders import read_metrics
from pipeline.updates.store import Store

BOARD = "tensorboard"
COUNTS = ("applied", "held_back", "retracted", "facts")


def show_on_board(store: Store) -> None:
    """Write what TensorBoard does not have yet of a store's versions, whichever process published them."""
    rows = store.database.execute("SELECT number FROM versions WHERE shown = 0 ORDER BY number").fetchall()
    if not rows:
        return
    logger = EventsLogger(store.folder, name=BOARD, version="", default_hp_metric=False)
    for (number,) in rows:
        figures = read_metrics(store.folder, number)
        for name, value in scalars(figures).items():
            logger.experiment.add_scalar(name, value, number)
        logger.experiment.add_text("version/figures", version_text(number, figures), number)
        logger.experiment.flush()
        store.database.execute("UPDATE versions SET shown = 1 WHERE number = ?", (number,))
    logger.finalize("success")


def scalars(figures: dict[str, Any]) -> dict[str, float]:
    """A version's figures by their tags in TensorBoard, as measured with it in force."""
    found = {
        f"version_0_requests/{place}_{name}": float(figures[name]) for place, name in enumerate(COUNTS, start=1)
    }
    after = figures["after"]
    known = [name for names in grouped(after["metrics"]).values() for name in names if name != "perplexity"]
    found |= {tag(name, "version"): after["metrics"][name]["mean"] for name in known}
    found |= {f"version_4_damage/{name}": after[name] for name in ("perplexity_ratio", "drift")}
    if after["earlier"] is not None:
        found["version_2_teacher-forced/5_earlier_facts"] = after["earlier"]
    return found | {f"version_5_seconds/{name}": float(value) for name, value in figures["seconds"].items()}


def version_text(number: int, figures: dict[str, Any]) -> str:
    """What a version took in, what it came to and what was asked of it, in Markdown."""
    counts = ", ".join(f"{figures[name]} {name.replace('_', ' ')}" for name in COUNTS)
    return f"**Version {number}**: {counts}; {version_line(figures)}\n\n{markdown_table(*version_table(figures))}"

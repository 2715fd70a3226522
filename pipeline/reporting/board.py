"""A store in TensorBoard and in the terminal: one run a store, a step a version."""

from __future__ import annotations

from typing import Any

from pipeline.reporting.run_log import EventsLogger
from pipeline.updates import Store, read_metrics, version_folder

BOARD = "tensorboard"


def show_on_board(store: Store) -> None:
    """Write what TensorBoard does not have yet of a store's versions, whichever process published them."""
    rows = store.database.execute("SELECT number FROM versions WHERE shown = 0 ORDER BY number").fetchall()
    if not rows:
        return
    logger = EventsLogger(store.folder, name=BOARD, version="", default_hp_metric=False)
    for (number,) in rows:
        for name, value in scalars(read_metrics(version_folder(store.folder, number))).items():
            logger.experiment.add_scalar(name, value, number)
        logger.experiment.flush()
        store.database.execute("UPDATE versions SET shown = 1 WHERE number = ?", (number,))
    logger.finalize("success")


def scalars(figures: dict[str, Any]) -> dict[str, float]:
    """A version's figures by their names in TensorBoard."""
    found = {f"requests/{name}": float(figures[name]) for name in ("applied", "held_back", "retracted", "facts")}
    for side in ("before", "after"):
        measured = figures[side]
        found |= {f"{name}/{side}": estimate["mean"] for name, estimate in measured["metrics"].items()}
        found |= {f"{name}/{side}": measured[name] for name in ("perplexity_ratio", "drift")}
        if measured["earlier"] is not None:
            found[f"earlier_facts/{side}"] = measured["earlier"]
    found |= {f"gates/{gate['name']}": float(gate["passed"]) for gate in figures["gates"]}
    found |= {f"seconds/{name}": float(value) for name, value in figures["seconds"].items()}
    return found

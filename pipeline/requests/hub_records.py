"""Records of a Hugging Face data set: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`.

Its rows are read from the library's files on disk, one after another. They are not streamed from the hub: streamed,
fields whose type differs between rows come undecoded (datasets 5.2), and KnowEdit's axes do differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.errors import UserError
from pipeline.requests.layouts import without_empty

PREFIX = "hf:"


def hub_records(source: str) -> Iterator[tuple[str, Any]]:
    """The rows of a data set on the hub or in a folder.

    Raises:
        UserError: when the package `datasets` is missing, or the data set cannot be loaded.
    """
    name, *rest = source.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2 or not all(rest):
        expected = f"{PREFIX}NAME, {PREFIX}NAME:SPLIT or {PREFIX}NAME:CONFIG:SPLIT"
        raise UserError(f"requests: {source}: expected {expected}")
    try:
        from datasets import disable_progress_bars, load_dataset
    except ImportError:
        raise UserError(
            f"requests: {source}: needs the package `datasets`; install the extra: pip install -e '.[datasets]'"
        ) from None
    split = rest.pop() if rest else None
    disable_progress_bars()
    try:
        rows = load_dataset(name, *rest, split=split)
    except Exception as error:  # the library raises whatever its many back ends do
        raise UserError(f"requests: {source}: cannot be read: {type(error).__name__}: {error}") from None
    if split is None:
        if len(rows) != 1:
            raise UserError(f"requests: {source}: has several splits; add one of them: {', '.join(rows)}")
        (rows,) = rows.values()
    for number, row in enumerate(rows):
        yield f"row {number}", without_empty(row)

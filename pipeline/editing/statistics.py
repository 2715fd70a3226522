"""Key statistics: the second moment of what ordinary text sends into a projection, found once and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, distributed

from pipeline.editing.ordinary_text import OPENINGS, lines, own_text, windows
from pipeline.errors import UserError, note
from pipeline.files import cached, digest, read_sealed, write_sealed
from pipeline.model.activations import RowStage
from pipeline.model.blocks import by_row, sizes
from pipeline.model.llm import LLM
from pipeline.options.editing import StatisticsOptions
from pipeline.requests.rows import Batch, Row
from pipeline.running.processes import of_all, world_size
from pipeline.running.stage import run
from pipeline.running.trainer import Runtime, own_precision

READ_TOGETHER = 8  # windows or rows
ROUNDING = 1e-5  # of the trace: eigenvalues of a float32 sum may lie that far below nought


def key_moments(
    llm: LLM, names: Sequence[str], options: StatisticsOptions, runtime: Runtime | None = None
) -> dict[str, Tensor]:
    """C = E[k kᵀ] of the keys that enter projections over ordinary text, each (I, I), float32, by name.

    What is found is kept in the user's cache folder, with its own digest, and what it is of: model, projection,
    precision, text and shape. A file that says anything else, or holds no second moment, is told of and made anew.

    Args:
        llm: the model.
        names: full names of projections.
        options: which text, and how much of it.
        runtime: what it runs with.

    Raises:
        UserError: when the text cannot be read or is too short for the keys' dimension, or the model's keys in this
            precision have no second moment.
    """
    runtime, text = runtime or Runtime(), lines(Path(options.text)) if options.text else None
    of = llm.tokens.texts(OPENINGS) if text is None else windows(llm, text, options.tokens)
    about = {name: _about(llm, name, digest(options.tokens, of), runtime) for name in names}
    files = {name: cached(f"moment-{digest(about[name])}.safetensors") for name in names}
    found = {name: moment for name in names if (moment := _read(files[name], about[name])) is not None}
    missing = sorted({name for lacking in of_all(files.keys() - found.keys()) for name in lacking})
    if missing:
        read = windows(llm, own_text(llm, options.tokens, runtime) if text is None else text, options.tokens)
        _check_size(llm, missing, sum(map(len, read)), options)
        stage = KeyMoments(llm, missing)
        with llm.frozen():
            run(stage, [Row(ids, len(ids)) for ids in read], runtime, batch_size=READ_TOGETHER)
        for name, moment in stage.moments().items():
            if wrong := _wrong(moment, about[name]):
                raise UserError(
                    f"statistics: of {name} in precision {runtime.precision} are {wrong}; the model's weights are "
                    "broken, or need a wider --trainer.precision"
                )
            found[name] = moment
            _write(files[name], about[name], moment)
    return found


def _about(llm: LLM, name: str, text: str, runtime: Runtime) -> dict[str, Any]:
    """What a projection's statistics over a text, known by its digest, depend on, and their shape."""
    inputs = sizes(llm.model.get_submodule(name))[0]  # type: ignore[arg-type]
    return {
        "model": llm.fingerprint,
        "projection": name,
        "precision": f"{llm.model.dtype}, {runtime.precision}",
        "text": text,
        "shape": [inputs, inputs],
    }


def _wrong(moment_II: Tensor, about: dict[str, Any]) -> str:
    """What keeps a tensor from being the second moment of keys; empty where nothing does."""
    if list(moment_II.shape) != about["shape"] or moment_II.dtype != torch.float32:
        return f"of shape {tuple(moment_II.shape)} in {moment_II.dtype}"
    if not moment_II.isfinite().all():
        return "not finite"
    if not torch.equal(moment_II, moment_II.T):
        return "not symmetric"
    raised_II = moment_II.double()
    raised_II.diagonal().add_(ROUNDING * raised_II.trace())
    return "not positive" if raised_II.trace() <= 0 or torch.linalg.cholesky_ex(raised_II)[1] else ""


def _check_size(llm: LLM, names: Sequence[str], tokens: int, options: StatisticsOptions) -> None:
    """Raise UserError for fewer tokens than twice a key's dimension."""
    inputs = max(sizes(llm.model.get_submodule(name))[0] for name in names)  # type: ignore[arg-type]
    if tokens < 2 * inputs:
        raise UserError(
            f"statistics.tokens: {options.tokens} of {options.text or 'the text that the model writes'} come to "
            f"{tokens} tokens; statistics of {inputs} inputs need at least {2 * inputs}"
        )


def _read(file: Path | None, about: dict[str, Any]) -> Tensor | None:
    content = read_sealed(file, about)
    if content is None:
        return None
    try:
        moment = load(content)["moment"]
        wrong = _wrong(moment, about)
    except (SafetensorError, KeyError) as error:
        wrong = f"no statistics ({type(error).__name__})"
    if wrong:
        note(f"cache: {file}: {wrong}; it is made anew")
    return None if wrong else moment


@rank_zero_only
def _write(file: Path | None, about: dict[str, Any], moment: Tensor) -> None:
    write_sealed(file, about, save({"moment": moment}))


def with_near(
    moments: dict[str, Tensor], llm: LLM, near: Sequence[tuple[str, int]], weight: float, runtime: Runtime
) -> dict[str, Tensor]:
    """Second moments of text's keys, and with so much weight of those from names on in texts near requests.

    `near` are texts, each with where its name ends; see `kept_moment`. `moments` are let go on the way.
    """
    stage = KeyMoments(llm, list(moments))
    run(stage, from_name(llm, near), runtime, Row.length, READ_TOGETHER)
    of_near = stage.moments()
    return {name: kept_moment(moments.pop(name), of_near.pop(name), weight) for name in list(moments)}


def from_name(llm: LLM, texts: Sequence[tuple[str, int]]) -> list[Row]:
    """Rows of texts in which a name ends, whose span are the token at which it does and all after it."""
    all_ids = llm.tokens.prompts([text for text, _ in texts])
    spans = [(llm.tokens.place(text, end), len(ids) - 1) for (text, end), ids in zip(texts, all_ids, strict=True)]
    return [Row(ids, len(ids), span) for ids, span in zip(all_ids, spans, strict=True)]


def kept_moment(text_II: Tensor, near_II: Tensor, weight: float) -> Tensor:
    """What ordinary text uses and, with so much weight, what near texts use, each in units of its own trace."""
    return (near_II * (weight / near_II.trace())).add_(text_II, alpha=1 / float(text_II.trace()))


class KeyMoments(RowStage):
    """Sums k kᵀ of what enters each of some projections, over rows' tokens; nothing is put out.

    Of a row that names a subject, only that one's tokens count.

    Args:
        llm: the model, of which the blocks up to the last of these projections run.
        names: full names of projections.
    """

    title = "Key statistics"

    def __init__(self, llm: LLM, names: Sequence[str]) -> None:
        super().__init__(llm)
        self.names = list(names)
        self.above = 1 + max(llm.blocks_of(names))
        self.sums: dict[str, Tensor] = {}  # float64: no buffers, which Lightning would cast with the weights
        self.count = 0

    def step(self, batch: Batch) -> list[None]:
        with self.activations.up_to_block(self.above), self.activations.entering(*self.names) as seen:
            self.activations.run(batch.input_ids_BT)
        counts, products = 0 if self.again else 1, {}
        for name, key_BTI in seen.items():
            keys = by_row(key_BTI, len(batch.texts))
            key_NI = torch.cat([key_TI[row.span] for key_TI, row in zip(keys, batch.texts, strict=True)])
            key_NI = key_NI.to(torch.promote_types(key_NI.dtype, torch.float32))
            with own_precision(key_NI.device):
                products[name] = key_NI.T @ key_NI
        for name, product_II in products.items():  # summed when the pass is over: one that fails counts nothing
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(product_II, dtype=torch.float64)
            self.sums[name].add_(product_II, alpha=counts)
        self.count += counts * len(key_NI)
        return [None] * len(batch.texts)

    def moments(self) -> dict[str, Tensor]:
        """The means over all processes' positions, by name, on the CPU; the sums are let go."""
        found, count = {}, sum(of_all(self.count))
        for name in self.names:
            total_II = self.sums.pop(name)
            if world_size() > 1:
                distributed.all_reduce(total_II)
            mean_II = (total_II / count).float().cpu()
            found[name] = (mean_II + mean_II.T) / 2  # a product's two halves may differ by rounding
        return found

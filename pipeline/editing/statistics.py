"""Statistics of ordinary text, found once and kept on disk: second moments of what enters a projection, its keys,
and of slopes, the gradients of the text's loss with respect to what leaves it.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, distributed
from torch.nn import functional as F

from pipeline.editing.bundled import bundled_moment
from pipeline.editing.ordinary_text import OPENINGS, file_text, ordinary_text, windows
from pipeline.errors import UserError, note
from pipeline.files import cached, digest, read_sealed, write_sealed
from pipeline.model.activations import RowStage, target_logits
from pipeline.model.blocks import by_row, moment_shape, second_moment, sizes
from pipeline.model.llm import LLM
from pipeline.options.editing import StatisticsOptions
from pipeline.requests.rows import Batch, Row
from pipeline.running.processes import of_all, world_size
from pipeline.running.stage import run
from pipeline.running.trainer import Runtime, own_precision

EACH = 16  # tokens that slopes are read at, for each output of a projection
ROUNDING = 1e-5  # of the trace: eigenvalues of a float32 sum may lie that far below nought


def key_moments(
    llm: LLM, names: Sequence[str], options: StatisticsOptions, runtime: Runtime | None = None
) -> dict[str, Tensor]:
    """C = E[k kᵀ] of the keys that enter projections over ordinary text, float32, by full name.

    Each is (I, I), or (E, I, I) for the keys of experts, one expert's apart from another's.

    What the project brings is taken (see `pipeline.editing.bundled`); else it is found and kept in the user's cache
    folder, with its own digest, and what it is of: model, projection, precision, text and shape. A file that says
    anything else, or holds no second moment, is told of and made anew. UserError when the text cannot be read or is
    too short for the keys' dimension, or the model's keys in this precision have no second moment.
    """
    return _moments(KeyMoments, llm, names, options, runtime or Runtime())


def slope_moments(
    llm: LLM, names: Sequence[str], options: StatisticsOptions, runtime: Runtime | None = None
) -> dict[str, Tensor]:
    """G = E[g gᵀ] of the gradients g of text's loss with respect to what leaves projections, (O, O), likewise.

    With C it is the curvature of what a change of a weight does to text (K-FAC, arXiv 1503.05671).
    """
    return _moments(SlopeMoments, llm, names, options, runtime or Runtime())


def _moments(
    kind: type[KeyMoments], llm: LLM, names: Sequence[str], options: StatisticsOptions, runtime: Runtime
) -> dict[str, Tensor]:
    text = file_text(options)
    of = digest(options.tokens, llm.tokens.texts(OPENINGS) if text is None else windows(llm, text, options.tokens))
    about = {name: _about(kind, llm, name, of, runtime) for name in names}
    files = {name: cached(f"moment-{digest(about[name])}.safetensors") for name in names}
    device = llm.embedding.device
    found = {name: moment for name in names if (moment := _read(files[name], about[name], device)) is not None}
    missing = sorted({name for lacking in of_all(files.keys() - found.keys()) for name in lacking})
    if missing:
        stage = kind(llm, missing)
        rows = stage.rows(ordinary_text(llm, options, runtime), options)
        with llm.frozen():
            run(stage, rows, runtime, batch_size=stage.together)
        for name, moment in stage.moments().items():
            if wrong := _wrong(moment, about[name], device):
                raise UserError(
                    f"statistics: of {name} in precision {runtime.precision} are {wrong}; the model's weights are "
                    "broken, or need a wider trainer.precision"
                )
            found[name] = moment
            rank_zero_only(write_sealed)(files[name], about[name], save({"moment": moment}))
    return found


def give_moments(method: Any, llm: LLM, options: StatisticsOptions, runtime: Runtime) -> None:
    """Give a kind of edit the statistics that it wants; the model is without any edit."""
    if names := getattr(method, "moments_of", ()):
        method.moments = key_moments(llm, names, options, runtime)
    if names := getattr(method, "slopes_of", ()):
        method.slopes = slope_moments(llm, names, options, runtime)


def _about(kind: type[KeyMoments], llm: LLM, name: str, text: str, runtime: Runtime) -> dict[str, Any]:
    """What a projection's statistics over a text, known by its digest, depend on, and their shape."""
    return {
        "model": llm.fingerprint,
        "projection": name,
        "precision": f"{llm.model.dtype}, {runtime.precision}",
        "text": text,
        "shape": [*kind.shape(llm.model.get_submodule(name))],
    } | ({"of": kind.of} if kind.of else {})


def _wrong(moment_II: Tensor, about: dict[str, Any], device: torch.device) -> str:
    """What keeps a tensor from being the second moment of keys, asked on a device; empty where nothing does."""
    if list(moment_II.shape) != about["shape"] or moment_II.dtype != torch.float32:
        return f"of shape {tuple(moment_II.shape)} in {moment_II.dtype}"
    if not moment_II.isfinite().all():
        return "not finite"
    if not torch.equal(moment_II, moment_II.mT):
        return "not symmetric"
    raised_II = moment_II.to(device).double()
    diagonal = raised_II.diagonal(dim1=-2, dim2=-1)
    total = diagonal.sum()
    diagonal.add_(ROUNDING * total)
    return "not positive" if total <= 0 or torch.linalg.cholesky_ex(raised_II)[1].any() else ""


def _read(file: Path | None, about: dict[str, Any], device: torch.device) -> Tensor | None:
    content = read_sealed(file, about)
    if content is None:
        return bundled_moment(digest(about))
    try:
        moment = load(content)["moment"]
        wrong = _wrong(moment, about, device)
    except (SafetensorError, KeyError) as error:
        wrong = f"no statistics ({type(error).__name__})"
    if wrong:
        note(f"cache: {file}: {wrong}; it is made anew")
    return None if wrong else moment


class KeyMoments(RowStage):
    """Sums k kᵀ of what enters projections, by full name, over all places of texts; puts nothing out.

    A text's last token is read where it has no targets. Blocks run up to the last of these projections.
    """

    title, together = "Key statistics (once a model, kept)", 8  # windows
    of: str | None = None  # what its files say beside

    def __init__(self, llm: LLM, names: Sequence[str]) -> None:
        super().__init__(llm)
        self.names = list(names)
        self.shapes = {name: self.shape(llm.model.get_submodule(name)) for name in names}
        self.above = 1 + max(llm.blocks_of(names))
        self.sums: dict[str, Tensor] = {}  # float64: no buffers, which Lightning would cast with the weights
        self.count = 0

    @staticmethod
    def shape(projection: Any) -> tuple[int, ...]:
        """Of a projection's moment."""
        return moment_shape(projection)

    def rows(self, texts: Sequence[list[int]], options: StatisticsOptions) -> list[Row]:
        """What is read of texts; UserError for fewer tokens than twice a key's dimension."""
        inputs, tokens = max(shape[-1] for shape in self.shapes.values()), sum(map(len, texts))
        if tokens < 2 * inputs:
            raise UserError(
                f"statistics.tokens: {options.tokens} of {options.text or 'the text that the model writes'} come "
                f"to {tokens} tokens; statistics of {inputs} inputs need at least {2 * inputs}"
            )
        return [self.row(ids) for ids in texts]

    @staticmethod
    def row(ids: list[int]) -> Row:
        """A text as it is read."""
        return Row(ids, len(ids))

    def seen(self, batch: Batch) -> dict[str, Tensor]:
        """What is summed of a batch, by projection."""
        with self.activations.up_to_block(self.above), self.activations.entering(*self.names) as seen:
            self.activations.run(batch.input_ids_BT)
        return seen

    def step(self, batch: Batch) -> list[None]:
        seen = self.seen(batch)
        ends = [len(row.token_ids) - bool(row.targets) for row in batch.texts]
        places_T = torch.arange(batch.input_ids_BT.shape[1], device=batch.input_ids_BT.device)
        read_BT1 = (places_T < torch.tensor(ends, device=places_T.device)[:, None])[..., None]
        counts = 0 if self.again else 1
        for name, key_BTI in seen.items():  # summed when the pass is over: one that fails counts nothing
            key_NI = (by_row(key_BTI, len(ends)) * read_BT1).flatten(0, 1)
            key_NI = key_NI.to(torch.promote_types(key_NI.dtype, torch.float32))
            with own_precision(key_NI.device):
                moment_II = second_moment(key_NI, self.shapes[name])
            total_II = self.sums.setdefault(name, torch.zeros_like(moment_II, dtype=torch.float64))
            total_II.add_(moment_II, alpha=counts)
        self.count += counts * sum(ends)
        return [None] * len(batch.texts)

    def moments(self) -> dict[str, Tensor]:
        """The means over all processes' positions, by name, on the CPU; the sums are let go."""
        found, count = {}, sum(of_all(self.count))
        for name in self.names:
            total_II = self.sums.pop(name)
            if world_size() > 1:
                distributed.all_reduce(total_II)
            mean_II = (total_II / count).float()
            found[name] = ((mean_II + mean_II.mT) / 2).cpu()  # a product's two halves may differ by rounding
        return found


class SlopeMoments(KeyMoments):
    """Sums g gᵀ of the gradients of texts' loss with respect to what leaves projections, a part of the texts."""

    title, together, gradients = "Slopes of text (once a model, kept)", 4, True
    of = "slopes"

    @staticmethod
    def shape(projection: Any) -> tuple[int, ...]:
        return (sizes(projection)[1],) * 2

    def rows(self, texts: Sequence[list[int]], options: StatisticsOptions) -> list[Row]:
        """Texts that come to `EACH` tokens for an output, as far as there are any."""
        ends = [*accumulate(map(len, texts))]
        enough = bisect(ends, EACH * max(shape[-1] for shape in self.shapes.values()))
        return [self.row(ids) for ids in texts[: 1 + enough]]

    @staticmethod
    def row(ids: list[int]) -> Row:
        return Row(ids, 1)

    def seen(self, batch: Batch) -> dict[str, Tensor]:
        with self.activations.from_gradients(), self.activations.leaving(*self.names) as left:
            logits_NV = target_logits(self.model, batch)
        loss = F.cross_entropy(logits_NV, batch.target_N, reduction="sum")
        return dict(zip(left, torch.autograd.grad(loss, list(left.values())), strict=True))

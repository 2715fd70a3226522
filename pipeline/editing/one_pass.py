"""One-pass editing: requests run forward and backward once, then a ridge solution (UltraEdit, arXiv 2505.14679).

Nothing is optimised request by request. Edited tokens are those that predict a new answer's. At each, three vectors
are kept: the input h and the output y of each projection of the golden layer, and the gradient g of the loss with
respect to y. A step against g says what the projection should put out for h; the change of the weight that comes
nearest to that for all tokens together is found in closed form.

The step is the loss's own slope, so it serves late blocks, from which the loss is nearly linear: not every golden
layer is one (SmolLM2: blocks 22 to 28; at block 3 not even the exact step makes a new answer likely).

Shapes: B rows, T tokens, N edited tokens of all requests, I inputs and O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.editing.method import register, settings_of
from pipeline.errors import UserError
from pipeline.model.activations import Activations, target_losses
from pipeline.model.blocks import Projection
from pipeline.model.llm import LLM
from pipeline.options.base import Options, Positive, one_of
from pipeline.options.editing import EditOptions
from pipeline.requests.rows import Batch, Row, collate
from pipeline.requests.schema import EditRequest
from pipeline.running.processes import world_size
from pipeline.running.sharding import add, is_sharded
from pipeline.running.stage import Stage, run
from pipeline.running.trainer import Runtime


@dataclass(kw_only=True)
class OnePassSettings(Options):
    """What one-pass editing can be set to."""

    scope: Annotated[str, one_of("mlp", "down")] = "down"
    """What is changed: mlp (all projections of the layer's MLP) or down (the down-projection)."""
    rate: Positive = 1.5
    """How far a token's output is moved, in units of the projection's output norm."""
    ridge: Positive = 0.01
    """Weight of a small change against the requests, in units of the mean squared norm of the inputs."""


class Captured(NamedTuple):
    """What one projection saw at the edited tokens, and the gradient of the loss at its output."""

    input_NI: Tensor
    output_NO: Tensor
    gradient_NO: Tensor


class OnePass:
    """Changes the MLP projections (or the down-projection) of the golden layers from one pass over the requests.

    Args:
        llm: the model, frozen by the caller.
        layers: the blocks to change.
        options: `settings_of` them are what counts here.
        earlier: the `state` that an earlier update of the same layers ended with.

    Attributes:
        weight_names: the weights it changes, by full name.
        state: the running statistics by name: what a later update goes on from.
    """

    adapter: dict[str, Any] | None = None

    def __init__(
        self, llm: LLM, layers: Sequence[int], options: EditOptions, earlier: Mapping[str, Tensor] | None = None
    ) -> None:
        self.llm = llm
        self.settings: OnePassSettings = settings_of(options)
        self.projections: dict[str, Projection] = {}
        for layer in layers:
            self.projections |= llm.blocks[layer].projections(self.settings.scope)
        self.weight_names = [f"{name}.weight" for name in self.projections]
        self.state = dict(earlier or {})

    def run(self, requests: Sequence[EditRequest], runtime: Runtime, earlier: Sequence[EditRequest] = ()) -> None:
        """Capture, merge the statistics, solve, and change the weights in place."""
        rows = self.llm.tokens.answered(requests, [request.new_answer for request in requests])
        if is_sharded(self.llm.model) and len(rows) < world_size():
            raise UserError(
                f"trainer: {len(rows)} requests for {world_size()} devices that share a model's weights"
            )
        seen = run(
            Capturing(self.llm, list(self.projections)), rows, runtime, lambda row: len(row.token_ids), in_step=True
        )
        for name, projection in self.projections.items():
            parts = zip(*(of_row[name] for of_row in seen), strict=True)
            self._change(name, projection, Captured(*(torch.cat(part).double() for part in parts)))

    def _change(self, name: str, projection: Projection, captured: Captured) -> None:
        """v = −η ‖h‖² g of normalised h and g, then the ridge solution.

        Normalised h and g have mean squared norms near I and O, so with this η all v together have `rate` times
        the norm of the outputs, in whatever units a model's projection works.
        """
        inputs, outputs, gradients = (
            self._statistics(f"one_pass.{name}.{kind}", vectors)
            for kind, vectors in zip(("input", "output", "gradient"), captured, strict=True)
        )
        input_NI, gradient_NO = inputs.normalise(captured.input_NI), gradients.normalise(captured.gradient_NO)
        eta = self.settings.rate * outputs.norm() / (input_NI.shape[1] * gradient_NO.shape[1] ** 0.5)
        value_NO = -eta * input_NI.square().sum(1, keepdim=True) * gradient_NO
        change_OI = ridge_solution(captured.input_NI, value_NO, self.settings.ridge)
        stored = change_OI if isinstance(projection, nn.Linear) else change_OI.T  # Conv1D stores (I, O)
        add(projection.weight, stored)

    def _statistics(self, name: str, vectors_ND: Tensor) -> RunningStatistics:
        """The statistics of one kind of vector with those of this update merged in; kept in `state`."""
        merged = RunningStatistics.of(vectors_ND)
        if f"{name}.count" in self.state:
            before = {part: self.state[f"{name}.{part}"].to(vectors_ND) for part in vars(merged)}
            merged = RunningStatistics(**before).merge(merged)
        self.state |= {f"{name}.{part}": value.cpu() for part, value in vars(merged).items()}
        return merged


@dataclass(frozen=True)
class RunningStatistics:
    """Count, mean and sum of squared deviations of vectors, feature by feature, in float64."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, vectors_ND: Tensor) -> RunningStatistics:
        """The statistics of N vectors."""
        mean_D = vectors_ND.mean(0)
        return cls(vectors_ND.new_tensor(len(vectors_ND)), mean_D, (vectors_ND - mean_D).square().sum(0))

    def merge(self, other: RunningStatistics) -> RunningStatistics:
        """The statistics of the vectors of both (Chan, Golub and LeVeque, 1979)."""
        count, apart_D = self.count + other.count, other.mean - self.mean
        return RunningStatistics(
            count,
            self.mean + apart_D * (other.count / count),
            self.m2 + other.m2 + apart_D.square() * (self.count * other.count / count),
        )

    def normalise(self, vectors_ND: Tensor) -> Tensor:
        """Vectors less their mean, each feature in units of its standard deviation.

        One zero vector counts along: of a single token, something is left that has its direction.
        """
        known = self.merge(RunningStatistics.of(torch.zeros_like(vectors_ND[:1])))
        deviation_D = (known.m2 / known.count).sqrt()
        return (vectors_ND - known.mean) / deviation_D.clamp(min=1e-6 * deviation_D.max().item() or 1.0)

    def norm(self) -> Tensor:
        """Root of the mean squared norm of the vectors."""
        return (self.m2 / self.count + self.mean.square()).sum().sqrt()


def ridge_solution(input_NI: Tensor, value_NO: Tensor, ridge: float) -> Tensor:
    """ΔW (O, I) that minimises ‖H ΔWᵀ − V‖² + s ‖ΔW‖², s = `ridge` · mean ‖h‖²; the smaller system is solved."""
    count, inputs = input_NI.shape
    if count < inputs:
        return torch.linalg.solve(_ridged(input_NI @ input_NI.T, count, ridge), value_NO).T @ input_NI
    return torch.linalg.solve(_ridged(input_NI.T @ input_NI, count, ridge), input_NI.T @ value_NO).T


def _ridged(gram: Tensor, count: int, ridge: float) -> Tensor:
    """A Gram matrix of H with s on its diagonal; its trace is Σ ‖h‖², whichever way it was formed."""
    return gram + ridge * gram.trace() / count * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


class Capturing(Stage):
    """Runs requests of a frozen model forward and backward; of each, what projections saw at its edited tokens."""

    title, gradients = "One pass", True

    def __init__(self, llm: LLM, projections: Sequence[str]) -> None:
        super().__init__(llm.model)
        self.activations, self.projections = Activations(llm), list(projections)

    def collate(self, items: list[Row]) -> Batch:
        return collate(items, self.activations.llm.pad_token_id)

    def step(self, batch: Batch) -> list[dict[str, Captured]]:
        with self.capturing(len(batch.texts)) as seen:
            losses_B = target_losses(self.model, batch)
        if not losses_B.isfinite().all():
            ids = ", ".join(str(row.tag) for row in batch.texts)
            raise UserError(f"edit: the loss is not a number in the batch of requests {ids}")
        gradients = torch.autograd.grad(losses_B.sum(), [output for _, output in seen.values()])
        found: list[dict[str, Captured]] = [{} for _ in batch.texts]
        for (name, pair), gradient in zip(seen.items(), gradients, strict=True):
            kept = [vectors.detach()[batch.row_N, batch.position_N].cpu() for vectors in (*pair, gradient)]
            for number, of_text in enumerate(found):
                of_text[name] = Captured(*(vectors[(batch.text_N == number).cpu()] for vectors in kept))
        return found

    @contextmanager
    def capturing(self, rows: int) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Keep each projection's input and output; the graph starts at the first outputs, all weights being frozen.

        The model goes on with a copy of the output: Falcon adds its attention's to it in place.
        """
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, input_BTI: Tensor, output_BTO: Tensor) -> Tensor:
            if name in seen:
                raise UserError(f"model: {name} runs twice in one pass; one_pass expects once")
            seen[name] = input_BTI, output_BTO if output_BTO.requires_grad else output_BTO.requires_grad_(True)
            return output_BTO.clone()

        with ExitStack() as stack:
            for name in self.projections:
                stack.enter_context(self.activations.changing(name, rows, partial(keep, name)))
            yield seen


register("one_pass", OnePass, OnePassSettings)

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
from typing import Annotated, Any

import torch
from torch import Tensor

from pipeline.editing.method import register, settings_of
from pipeline.errors import UserError
from pipeline.model.activations import RowStage, target_losses
from pipeline.model.blocks import Projection, as_stored
from pipeline.model.llm import LLM
from pipeline.options.base import Options, Positive, one_of
from pipeline.options.editing import EditOptions
from pipeline.requests.rows import Batch, Row
from pipeline.requests.schema import EditRequest
from pipeline.running.sharding import add
from pipeline.running.stage import run
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


class OnePass:
    """Changes the MLP projections (or the down-projection) of the golden layers from one pass over the requests.

    It is made as `EditMethod` says; its `state` are running statistics by name.
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
        seen = run(Capturing(self.llm, list(self.projections)), rows, runtime, Row.length, in_step=True)
        for name, projection in self.projections.items():
            parts = zip(*(of_row[name] for of_row in seen), strict=True)
            change_OI = self._solved(name, *(torch.cat(part).double() for part in parts))
            add(projection.weight, as_stored(projection, change_OI))

    def _solved(self, name: str, input_NI: Tensor, output_NO: Tensor, gradient_NO: Tensor) -> Tensor:
        """ΔW (O, I) for v = −η ‖h‖² g of normalised h and g, by the ridge solution.

        Normalised h and g have mean squared norms near I and O, so with this η all v together have `rate` times
        the norm of the outputs, in whatever units a model's projection works.
        """
        h_NI = normalised(input_NI, self._sums(f"one_pass.{name}.input", input_NI))
        g_NO = normalised(gradient_NO, self._sums(f"one_pass.{name}.gradient", gradient_NO))
        outputs_3O = self._sums(f"one_pass.{name}.output", output_NO)
        norm = (outputs_3O[2] / outputs_3O[0]).sum().sqrt()
        eta = self.settings.rate * norm / (h_NI.shape[1] * g_NO.shape[1] ** 0.5)
        value_NO = -eta * h_NI.square().sum(1, keepdim=True) * g_NO
        return ridge_solution(input_NI, value_NO, self.settings.ridge)

    def _sums(self, name: str, vectors_ND: Tensor) -> Tensor:
        """The sums of one kind of vector, those of earlier updates among them; kept in `state`."""
        sums_3D = sums(vectors_ND)
        if name in self.state:
            if self.state[name].shape != sums_3D.shape:
                found = f"{tuple(self.state[name].shape)}; expected {tuple(sums_3D.shape)}"
                raise UserError(f"update: state: {name} is of shape {found}")
            sums_3D = sums_3D + self.state[name].to(sums_3D)
        self.state[name] = sums_3D.cpu()
        return sums_3D


def sums(vectors_ND: Tensor) -> Tensor:
    """How many vectors there are, their sum, and that of their squares, feature by feature, (3, D) in float64."""
    x_ND = vectors_ND.double()
    return torch.stack([torch.ones_like(x_ND), x_ND, x_ND.square()]).sum(1)


def normalised(vectors_ND: Tensor, sums_3D: Tensor) -> Tensor:
    """Vectors less the mean of those that were summed, each feature in units of its standard deviation.

    One zero vector counts along: of a single token, something is left that has its direction.
    """
    mean_D, square_D = sums_3D[1:] / (sums_3D[0] + 1)
    deviation_D = (square_D - mean_D.square()).clamp(min=0).sqrt()
    return (vectors_ND - mean_D) / deviation_D.clamp(min=1e-6 * deviation_D.max().item() or 1.0)


def ridge_solution(input_NI: Tensor, value_NO: Tensor, ridge: float) -> Tensor:
    """ΔW (O, I) that minimises ‖H ΔWᵀ − V‖² + s ‖ΔW‖², s = `ridge` · mean ‖h‖²; the smaller system is solved."""
    count, inputs = input_NI.shape
    if count < inputs:
        return torch.linalg.solve(_ridged(input_NI @ input_NI.T, count, ridge), value_NO).T @ input_NI
    return torch.linalg.solve(_ridged(input_NI.T @ input_NI, count, ridge), input_NI.T @ value_NO).T


def _ridged(gram: Tensor, count: int, ridge: float) -> Tensor:
    """A Gram matrix of H with s on its diagonal; its trace is Σ ‖h‖², whichever way it was formed."""
    return gram + ridge * gram.trace() / count * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


class Capturing(RowStage):
    """Runs requests of a frozen model forward and backward.

    Outputs are, by projection, what it saw at a request's edited tokens: (N, I) inputs, (N, O) outputs, and (N, O)
    gradients of the loss at its outputs.
    """

    title, gradients = "One pass", True

    def __init__(self, llm: LLM, projections: Sequence[str]) -> None:
        super().__init__(llm)
        self.projections = list(projections)

    def step(self, batch: Batch) -> list[dict[str, list[Tensor]]]:
        with self.capturing(len(batch.texts)) as seen:
            losses_B = target_losses(self.model, batch)
        if not losses_B.isfinite().all():
            ids = ", ".join(str(row.tag) for row in batch.texts)
            raise UserError(f"edit: the loss is not a number in the batch of requests {ids}")
        gradients = torch.autograd.grad(losses_B.sum(), [output for _, output in seen.values()])
        kept = {
            name: [vectors.detach()[batch.row_N, batch.position_N].cpu() for vectors in (*pair, gradient)]
            for (name, pair), gradient in zip(seen.items(), gradients, strict=True)
        }
        text_N = batch.text_N.cpu()
        return [
            {name: [vectors[text_N == number] for vectors in three] for name, three in kept.items()}
            for number in range(len(batch.texts))
        ]

    @contextmanager
    def capturing(self, rows: int) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Keep each projection's input and output; the graph starts at the first outputs, all weights being frozen.

        The model goes on with a copy of the output: Falcon adds its attention's to it in place.
        """
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, input_BTI: Tensor, output_BTO: Tensor) -> Tensor:
            seen[name] = input_BTI, output_BTO if output_BTO.requires_grad else output_BTO.requires_grad_(True)
            return output_BTO.clone()

        with ExitStack() as stack:
            for name in self.projections:
                stack.enter_context(self.activations.changing(name, rows, partial(keep, name)))
            yield seen


register("one_pass", OnePass, OnePassSettings)

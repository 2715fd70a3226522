"""Locate-then-edit: find what the golden layer should put out for each subject, then solve for its weight.

One family (arXiv 2403.14236): a request's key k is what enters the down-projection at the subject's last token,
its value is what should leave it there. `memit`, `emmet`, `rome` and `alphaedit` differ in the last step only,
the closed-form solver. Values of a batch of requests are searched for together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.editing import solvers
from pipeline.editing.columns import Columns, owner
from pipeline.editing.contexts import CONTEXTS, REWORDINGS, in_context
from pipeline.editing.keys import KeyRow, neighbour_moment, read_keys
from pipeline.editing.statistics import key_moments
from pipeline.errors import UserError
from pipeline.files import write_whole
from pipeline.model import LLM, build_trainer, encode
from pipeline.model.blocks import Projection
from pipeline.model.suffix import Suffixes, SuffixRow, SuffixRunner
from pipeline.model.targets import last_token, tokenize
from pipeline.model.trainer import predict
from pipeline.options import EditOptions, LocateOptions, TrainerOptions
from pipeline.requests import EditRequest, ListDataModule

FEW = 10  # requests whose values may reach far: few get in each other's way

Solver = Callable[[Tensor, Tensor, Tensor], Tensor]  # keys (I, n), changes (O, n), moment (I, I) → ΔW (O, I)


def solver(method: str, options: LocateOptions) -> Solver:
    """The closed-form solver of a method's name, with its options."""
    return {
        "memit": partial(solvers.memit, strength=options.strength),
        "emmet": partial(solvers.emmet, ridge=options.ridge),
        "rome": partial(solvers.rome, ridge=options.ridge),
        "alphaedit": partial(solvers.alphaedit, threshold=options.threshold),
    }[method]


class LocateThenEdit:
    """Changes the down-projection of the golden layers in closed form.

    With several layers, or rounds, each visit finds what the requests still miss in the model as it is by then,
    so that a value found at one layer is carried forward to the next.

    Args:
        llm: the model, frozen by the caller.
        layers: the blocks to change.
        options: `options.locate` is what counts here, and the solver's name in `options.method`.
        earlier: keys and values in it are solved for again, together with the new ones.

    Attributes:
        weight_names: the down-projections' weights.
        state: every layer's `Columns`.
    """

    adapter: dict[str, Any] | None = None

    def __init__(
        self, llm: LLM, layers: Sequence[int], options: EditOptions, earlier: Mapping[str, Tensor] | None = None
    ) -> None:
        self.llm = llm
        self.layers = list(layers)
        self.options = options.locate
        self.statistics = options.statistics
        self.solve = solver(options.method, options.locate)
        self.key_per_context = options.locate.key_per_context and options.method == "memit"
        self.near = options.locate.neighbours if options.method == "memit" else 0
        self.weight_names = [name for layer in layers for name in llm.blocks[layer].weight_names("down")]
        self.state = dict(earlier or {})

    def run(
        self,
        requests: Sequence[EditRequest],
        trainer: TrainerOptions,
        logger: Logger | bool,
        seed: int,
        work: Path | None = None,
    ) -> None:
        """At each layer in turn: search the values, gather the keys, solve, and change the weight in place."""
        missing = [r.id for r in requests if not r.subject or r.subject not in r.prompt]
        if missing:
            raise UserError(
                f"edit: locate-then-edit needs each request's subject in its prompt; not so in {len(missing)} of "
                f"{len(requests)}: {', '.join(missing[:5])}; --method finetune does without"
            )
        names = [name for layer in self.layers for name in self.llm.blocks[layer].down]
        moments = key_moments(self.llm, names, self.statistics, trainer)
        rewordings = self.options.rewordings
        if rewordings is None:
            rewordings = len(REWORDINGS) if len(requests) <= FEW else 0
        templates = CONTEXTS[: self.options.contexts] + REWORDINGS[:rewordings]
        located = [locate(self.llm, number, request, templates) for number, request in enumerate(requests)]
        owners = [owner(request) for request in requests]
        visits = [(layer, turn) for layer in self.layers for turn in range(self.options.rounds)]
        for visit, (layer, turn) in enumerate(visits):
            ((name, down),) = self.llm.blocks[layer].down.items()
            columns = Columns.of_state(self.state, layer, down)
            if turn == 0:  # values of all updates are found without each other, and solved for together
                _change(down, -columns.solved_OI)
            values_GO = ValueSearch(self.llm, layer, self.options, visit, work).find(located, trainer, logger)
            keys_GCI = self._keys(layer, requests, trainer)
            if turn > 0:
                _change(down, -columns.solved_OI)
            columns = columns.asked(owners, keys_GCI, values_GO, again=turn > 0)
            kept_II = self._kept(layer, requests, moments[name], trainer, seed).to(down.weight.device)
            solved_OI = self.solve(columns.key_In, columns.change_On, kept_II).float()
            _change(down, solved_OI)
            self.state |= columns._replace(solved_OI=solved_OI).to_state(layer)

    def _keys(self, layer: int, requests: Sequence[EditRequest], trainer: TrainerOptions) -> Tensor:
        """Keys (requests, C, I) at subjects' last tokens: each context's own, or their mean."""
        placed = [in_context(template, r) for r in requests for template in CONTEXTS[: self.options.key_contexts]]
        all_ids = tokenize(self.llm, [text for text, _ in placed])
        places = [last_token(self.llm, text[:end], ids) for (text, end), ids in zip(placed, all_ids, strict=True)]
        rows = [KeyRow(n, ids, at, at + 1) for n, (ids, at) in enumerate(zip(all_ids, places, strict=True))]
        key_RI = torch.cat(read_keys(self.llm, layer, rows, trainer))
        keys_GCI = key_RI.view(len(requests), -1, key_RI.shape[-1])
        return keys_GCI if self.key_per_context else keys_GCI.mean(1, keepdim=True)

    def _kept(
        self, layer: int, requests: Sequence[EditRequest], text_II: Tensor, trainer: TrainerOptions, seed: int
    ) -> Tensor:
        """Second moment of the keys whose output is to stay: of ordinary text and of the requests' neighbours."""
        weight = self.options.neighbour_weight
        if not (self.near and weight):
            return text_II
        near_II = neighbour_moment(self.llm, layer, requests, self.near, trainer, seed)
        return text_II / text_II.trace() + weight * near_II / near_II.trace()


@torch.no_grad()
def _change(down: Projection, change_OI: Tensor) -> None:
    stored = change_OI if isinstance(down, torch.nn.Linear) else change_OI.T  # Conv1D stores (I, O)
    down.weight += stored.to(down.weight)


class Located(NamedTuple):
    """A request, by number and id, with its rows: prompt and new answer under each context, last `{subject} is`."""

    number: int
    id: str
    rows: list[SuffixRow]

    def width(self) -> int:
        """The most tokens from the subject's last on: batches of like width hold little padding."""
        return max(len(row.token_ids) - row.start for row in self.rows)


def locate(llm: LLM, number: int, request: EditRequest, templates: Sequence[str]) -> Located:
    """Encode a request under every template and find its subject's last token in each row."""
    placed = [in_context(template, request) for template in templates]
    rows = []
    for (text, end), row in zip(
        placed, encode(llm, [(text, request.new_answer) for text, _ in placed]), strict=True
    ):
        start = last_token(llm, text[:end], row.token_ids)
        rows.append(SuffixRow(row.token_ids, min(start, row.target_start - 1), row.target_start))
    subject = request.subject or ""
    (plain,) = tokenize(llm, [f"{subject} is"])
    rows.append(SuffixRow(plain, last_token(llm, subject, plain), len(plain)))
    return Located(number, request.id, rows)


class ValueSearch(LightningModule):
    """Finds, for each request, the change r of the down-projection's output that makes the new answer likely.

    Loss of a request (ROME, arXiv 2202.05262, eq. 4, for a batch): mean over contexts of ℓ(x, y_new), plus
    `kl` · KL(base ‖ changed) after "{subject} is", plus `decay` · ‖r‖² / ‖output‖². Step and bound of r are in
    units of the projection's own output norm, so that one setting serves models with and without a norm behind
    the projection. A request whose answer is learnt leaves the batch.

    Args:
        llm: the model, frozen by the caller.
        layer: the block whose down-projection's output changes.
        options: how to search.
        visit: counts the searches of an edit.
        work: where found values are kept, batch by batch; a search goes on from what is there.
    """

    def __init__(
        self, llm: LLM, layer: int, options: LocateOptions, visit: int = 0, work: Path | None = None
    ) -> None:
        super().__init__()
        self.options = options
        self.visit = visit
        self.work = work
        self.runner = SuffixRunner(llm, layer)

    def find(self, located: Sequence[Located], trainer: TrainerOptions, logger: Logger | bool) -> Tensor:
        """Every request's change of the output, in the requests' order, (G, O).

        Runs under `Trainer.predict`: requests are searched for apart, so that processes need not keep step.
        """
        found = self._kept()
        left = sorted((each for each in located if each.number not in found), key=Located.width)
        if left:
            data = ListDataModule((left, list, self.options.batch_size))
            found |= dict(predict(build_trainer(trainer, "Finding values", logger), self, data))
        return torch.stack([found[each.number] for each in located])

    @torch.enable_grad()
    def predict_step(self, batch: list[Located], batch_idx: int = 0) -> list[tuple[int, Tensor]]:
        """Search the values of one batch of requests to the end."""
        each = len(batch[0].rows)
        rows, base_logits_NV = self.runner.capture([row for located in batch for row in located.rows])
        base_GV = base_logits_NV[rows.target_N < 0].log_softmax(-1)
        scale_G = rows.output_BO[::each].norm(dim=-1)
        change_GO = self._search(batch, rows, base_GV, scale_G, each).float().cpu()
        found = [(located.number, change_O.clone()) for located, change_O in zip(batch, change_GO, strict=True)]
        self._keep(found)
        return found

    def _keep(self, found: Sequence[tuple[int, Tensor]]) -> None:
        if self.work:
            self.work.mkdir(parents=True, exist_ok=True)
            file = self.work / f"values-{self.visit}-{found[0][0]}.safetensors"
            tensors = {str(number): change_O for number, change_O in found}
            write_whole(file, lambda partial: save_file(tensors, partial))

    def _kept(self) -> dict[int, Tensor]:
        """What an interrupted search of this visit has found, by request number."""
        files = sorted(self.work.glob(f"values-{self.visit}-*.safetensors")) if self.work else []
        return {int(number): change_O for file in files for number, change_O in load_file(file).items()}

    def _search(self, batch: list[Located], rows: Suffixes, base_GV: Tensor, scale_G: Tensor, each: int) -> Tensor:
        """Adam on all requests' changes at once; shape (G, O)."""
        options = self.options
        unit_GO = torch.zeros_like(rows.output_BO[::each]).requires_grad_(True)  # changes over scale
        learnt_GO = torch.zeros_like(unit_GO)
        adam = torch.optim.Adam([unit_GO], lr=options.step)
        alive = torch.arange(len(batch), device=unit_GO.device)
        running, part = alive, rows
        for step in range(options.steps + 1):
            change_BO = (unit_GO * scale_G[:, None])[running].repeat_interleave(each, dim=0)
            nll_G, kl_G = self._losses(part, self.runner.run(part, change_BO), base_GV[running], each)
            if not nll_G.isfinite().all():
                ids = ", ".join(located.id for located in batch)
                raise UserError(
                    f"edit: the loss is not a number in step {step}, in the batch of requests {ids}; "
                    "try a smaller --locate.step"
                )
            learnt_GO[running] = unit_GO.detach()[running]
            self._show(step, nll_G)
            going = nll_G > options.learnt
            if step == options.steps or not going.any():
                break
            loss = nll_G + options.kl * kl_G + options.decay * unit_GO[running].square().sum(-1)
            adam.zero_grad()
            loss[going].sum().backward()
            adam.step()
            with torch.no_grad():
                unit_GO *= options.bound / unit_GO.norm(dim=-1, keepdim=True).clamp(min=options.bound)
            running = running[going]
            part = part.subset(self._rows_of(going, each)) if not going.all() else part
        return learnt_GO * scale_G[:, None]

    @staticmethod
    def _rows_of(groups: Tensor, each: int) -> Tensor:
        """Numbers of the rows of the groups that a mask names."""
        return groups.repeat_interleave(each).nonzero().squeeze(1)

    @staticmethod
    def _losses(rows: Suffixes, logits_NV: Tensor, base_GV: Tensor, each: int) -> tuple[Tensor, Tensor]:
        """Each group's mean loss over its contexts, and its divergence after "{subject} is"; both (G,)."""
        plain = rows.target_N < 0
        scored = ~plain
        losses = F.cross_entropy(logits_NV[scored], rows.target_N[scored], reduction="none")
        row_N, count = rows.row_N[scored], len(rows.ids_BS)
        sums = losses.new_zeros(count).index_add(0, row_N, losses)
        means_B = sums / torch.bincount(row_N, minlength=count).clamp(min=1)
        nll_G = means_B.view(-1, each)[:, :-1].mean(1)
        kl_G = F.kl_div(logits_NV[plain].log_softmax(-1), base_GV, log_target=True, reduction="none").sum(-1)
        return nll_G, kl_G

    def _show(self, step: int, nll_G: Tensor) -> None:
        if self.logger:
            self.logger.log_metrics({"edit/value_loss": nll_G.mean().item()}, step)

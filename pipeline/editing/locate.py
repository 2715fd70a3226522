"""Locate-then-edit: find what the golden layer should put out for each subject, then solve for its weight.

One family (arXiv 2403.14236): a request's key k is what enters the down-projection at the subject's last token,
its value is what should leave it there. `memit`, `emmet`, `rome` and `alphaedit` differ in the last step only,
the closed-form solver. Values of a batch of requests are searched for together, under `Trainer.fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.nn import functional as F

from pipeline.editing import solvers
from pipeline.editing.statistics import key_moment
from pipeline.errors import UserError
from pipeline.model import LLM, build_trainer, encode
from pipeline.model.suffix import Suffixes, SuffixRow, SuffixRunner
from pipeline.model.targets import tokenize
from pipeline.options import EditOptions, LocateOptions, TrainerOptions
from pipeline.requests import EditRequest, ListDataModule

CONTEXTS = (  # what may stand before a prompt, so that a value holds in more than one setting
    "{}",
    "This is worth knowing. {}",
    "She looked it up and read aloud: {}",
    "In short, and as many people have asked before, {}",
    "The next question was an easy one. {}",
)

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
    """Changes the down-projection of the golden layer in closed form.

    Args:
        llm: the model, whose weights the caller has frozen.
        layers: the block to change; exactly one.
        options: `options.locate` is what counts here, and the solver's name in `options.method`.
    """

    def __init__(self, llm: LLM, layers: Sequence[int], options: EditOptions) -> None:
        if len(layers) != 1:
            raise UserError(f"edit: {options.method} changes one layer; {len(layers)} were given")
        self.llm = llm
        self.layer = layers[0]
        self.options = options.locate
        self.solve = solver(options.method, options.locate)
        self.key_per_context = options.locate.key_per_context and options.method == "memit"
        self.weight_names = llm.blocks[self.layer].weight_names("down")

    def run(
        self, requests: Sequence[EditRequest], trainer: TrainerOptions, logger: Logger | bool, seed: int
    ) -> None:
        """Search the values, gather the keys, solve, and change the weight in place."""
        missing = [r.id for r in requests if not r.subject or r.subject not in r.prompt]
        if missing:
            raise UserError(
                f"edit: locate-then-edit needs each request's subject in its prompt; not so in {len(missing)} of "
                f"{len(requests)}: {', '.join(missing[:5])}"
            )
        cache = Path(self.options.cache) if self.options.cache else None
        moment = key_moment(self.llm, self.layer, self.options.text, self.options.text_tokens, trainer, cache)
        templates = CONTEXTS[: self.options.contexts]
        located = sorted((locate(self.llm, request, templates) for request in requests), key=Located.width)
        search = ValueSearch(self.llm, self.layer, self.options)
        data = ListDataModule((located, list, self.options.batch_size), shuffle=False)
        build_trainer(trainer, "Finding values", logger, max_epochs=1, log_every_n_steps=1).fit(
            search, datamodule=data
        )
        keys_In, changes_On = columns([search.found[r.id] for r in requests], self.key_per_context)
        self._change(self.solve(keys_In, changes_On, moment.to(keys_In.device)))

    @torch.no_grad()
    def _change(self, change_OI: Tensor) -> None:
        (down,) = self.llm.blocks[self.layer].down.values()
        stored = change_OI if isinstance(down, torch.nn.Linear) else change_OI.T  # Conv1D stores (I, O)
        down.weight += stored.to(down.weight)


def columns(found: Sequence[tuple[Tensor, Tensor]], key_per_context: bool) -> tuple[Tensor, Tensor]:
    """Keys (I, n) and changes (O, n) of all requests: a column a context, or one a request with the mean key."""
    keys, changes = [], []
    for key_CI, change_O in found:
        chosen = key_CI if key_per_context else key_CI.mean(0, keepdim=True)
        keys.append(chosen)
        changes.append(change_O.expand(len(chosen), -1))
    return torch.cat(keys).T, torch.cat(changes).T


class Located(NamedTuple):
    """A request with its rows: prompt and new answer under each context, and last `{subject} is`."""

    id: str
    rows: list[SuffixRow]

    def width(self) -> int:
        """The most tokens from the subject's last on: batches of like width hold little padding."""
        return max(len(row.token_ids) - row.start for row in self.rows)


def locate(llm: LLM, request: EditRequest, templates: Sequence[str]) -> Located:
    """Encode a request under every template and find its subject's last token in each row."""
    subject = request.subject or ""
    prompts = [template.format(request.prompt) for template in templates]
    behind = len(request.prompt) - request.prompt.rindex(subject) - len(subject)
    rows = []
    for prompt, row in zip(prompts, encode(llm, [(p, request.new_answer) for p in prompts]), strict=True):
        start = last_token(llm, prompt[: len(prompt) - behind], row.token_ids)
        rows.append(SuffixRow(row.token_ids, min(start, row.target_start - 1), row.target_start))
    (plain,) = tokenize(llm, [f"{subject} is"])
    rows.append(SuffixRow(plain, last_token(llm, subject, plain), len(plain)))
    return Located(request.id, rows)


def last_token(llm: LLM, upto: str, token_ids: Sequence[int]) -> int:
    """Place of the token that holds the end of `upto`, among the tokens of a text that begins with it."""
    (before,) = tokenize(llm, [upto])
    shared = next((i for i, (a, b) in enumerate(zip(before, token_ids, strict=False)) if a != b), len(before))
    return max(0, shared - 1 if shared == len(before) else shared)


class ValueSearch(LightningModule):
    """Finds, for each request, the change r of the down-projection's output that makes the new answer likely.

    Loss of a request (ROME, arXiv 2202.05262, eq. 4, for a batch): mean over contexts of ℓ(x, y_new), plus
    `kl` · KL(base ‖ changed) after "{subject} is", plus `decay` · ‖r‖² / ‖output‖². Step and bound of r are in
    units of the projection's own output norm, so that one setting serves models with and without a norm behind
    the projection. A request whose answer is learnt leaves the batch.

    Attributes:
        found: request id → its keys (contexts, I) and its change (O,).
    """

    def __init__(self, llm: LLM, layer: int, options: LocateOptions) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.options = options
        self.runner = SuffixRunner(llm, layer)
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def training_step(self, batch: list[Located]) -> None:
        """Search the values of one batch of requests to the end."""
        each = len(batch[0].rows)
        rows, base_logits_NV = self.runner.capture([row for located in batch for row in located.rows])
        base_GV = base_logits_NV[rows.target_N < 0].log_softmax(-1)
        scale_G = rows.output_BO[::each].norm(dim=-1)
        change_GO = self._search(batch, rows, base_GV, scale_G, each)
        for group, located in enumerate(batch):
            keys = rows.key_BI[each * group : each * (group + 1) - 1]
            self.found[located.id] = (keys.clone(), change_GO[group])

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

    def configure_optimizers(self) -> None:
        """None: each batch of requests has its own, in its step."""

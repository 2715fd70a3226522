"""Values and keys: what a down-projection should put out at subjects' last tokens, and what enters it there.

A value is searched in all blocks that are to carry it at once, so that each changes where and as far as it helps.
A batch of requests is searched together, each with its own changes of the outputs; only what these can reach is
computed (see `pipeline.model.suffix`), and a subject whose answers are learnt leaves the batch. Facts about one
subject share its key, and so one value, which is searched for all of them (MEMIT-Merge).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.editing.contexts import in_context, own_forms, relations
from pipeline.editing.entering import going_on
from pipeline.editing.relations import statement
from pipeline.editing.whitening import whitener
from pipeline.errors import UserError
from pipeline.model.activations import wide
from pipeline.model.llm import LLM
from pipeline.model.suffix import Suffixes
from pipeline.requests.rows import Row
from pipeline.requests.schema import EditRequest
from pipeline.running.sharding import anywhere
from pipeline.running.stage import Stage

SEARCHED_TOGETHER = 2048  # tokens of rows in a batch: requests with long answers are searched for in smaller ones
OTHERS_EACH = 2  # rows of a step beside the bare ones, in turn
LEARNT = 0.05  # nats: a value is found when its mean loss is below this
KL = 0.0625  # weight of what is to stay after `{subject} is`, and after each other relation
DECAY = 0.01  # weight of a value's squared change
SHARE, NOISE = 0.85, 0.6  # what is tried of a value in each step, and the length of what disturbs it, in its own
MOMENTUM = 0.5
LAST = 0.2  # of the step size, in the last step
TINY = 1e-30  # a slope's norm where nothing is left to learn


class Located(NamedTuple):
    """Requests about one subject, by their ids, and the rows that the one value for them is searched under.

    Rows are prompts and new answers, the bare ones first, then what else is said of the subject.
    """

    id: str
    rows: list[Row]
    facts: int  # how many requests
    stays: int  # how many rows after which the model is to say the same, the last ones

    def tokens(self) -> int:
        """How many tokens a search goes through: from the subject's last on, as if all rows were as long."""
        return len(self.rows) * max(1 + row.length() - row.span.stop for row in self.rows)


class Part(NamedTuple):
    """Rows of a batch that run together, and which value each of them is changed by."""

    suffixes: Suffixes
    owner_B: Tensor


def locate(
    llm: LLM, requests: Sequence[EditRequest], contexts: Sequence[str], others: Sequence[str] = (), related: int = 0
) -> Located:
    """Requests about one subject under all templates, the subject's last token found in each row.

    Under contexts the answer's end is learnt as well; it would take too much of the value if it were learnt in
    every row. A subject has other forms with one new answer alone: several would contradict each other. So many
    `related` statements are to stay, beside `{subject} is`.
    """
    rows: list[Row] = []
    for templates, ended in ((contexts, True), (others if len(requests) == 1 else (), False)):
        texts = [(*in_context(one, request), request.new_answer) for one in templates for request in requests]
        if not ended and len(requests) == 1:
            texts += [(*form, requests[0].new_answer) for form in own_forms(requests[0])]
        joined = llm.tokens.rows([(text, answer) for text, _, answer in texts], ended=ended)
        for (text, end, answer), row in zip(texts, joined, strict=True):
            last = min(llm.tokens.place(text, end, answer), row.target_start - 1)
            rows.append(row._replace(subject=(last, last)))
    subject = requests[0].subject or ""
    stays = [f"{subject} is", *(statement(one, subject) for one in relations(requests[0], related))]
    for text, plain in zip(stays, llm.tokens.prompts(stays), strict=True):
        last = llm.tokens.place(text, text.index(subject) + len(subject))
        rows.append(going_on(plain)._replace(subject=(last, last)))
    ids = ", ".join(request.id for request in requests)
    return Located(ids, rows, len(requests), len(stays))


class ValueSearch(Stage):
    """Finds, for each subject, the changes r of down-projections' outputs that make its new answers likely.

    Loss of a subject (ROME, arXiv 2202.05262, eq. 4, for a batch, and for several blocks): mean over its facts and
    some of their other forms, in turn, of ℓ(x, y_new), plus `KL` · KL(base ‖ changed) after all else that is said
    of it, one in turn, plus `DECAY` · ‖r‖². A step goes down the gradient of a subject's r, all blocks' as one, and
    its length is the same whatever the gradient's. So r stays small: Adam changes all its numbers alike, and the
    same loss takes an r of twice the norm. A weight gives a value in part, and other things beside it: so answers
    are learnt from `SHARE` of r with noise `NOISE` times as long, which a subject draws whoever is in the batch. r,
    step and bound are in units of the first projection's own output norm, so that one setting serves models with
    and without a norm behind it. All lengths are taken in coordinates in which ordinary text minds each change
    alike: `spare` (L, O, O) leads out of them (a natural gradient, by text's curvature; see `sparing_text`). A
    subject whose answers are learnt leaves the batch; known ones are not changed.

    Outputs are changes (L, O) of the L blocks' down-projections' outputs, after `steps` steps at most.
    """

    title, gradients = "Finding values", True

    def __init__(
        self, llm: LLM, layers: Sequence[int], steps: int, step: float, bound: float, spare: Tensor | None = None
    ) -> None:
        super().__init__(llm.model)
        self.llm, self.layers, self.spare_LOO = llm, layers, spare
        self.steps, self.step_size, self.bound = steps, step, bound
        self.shown = 0  # steps

    def collate(self, items: list[Located]) -> list[Located]:
        return items

    def step(self, batch: list[Located]) -> list[Tensor]:
        """Search the values of one batch to the end; rows of a kind are of like length, and run as one batch."""
        bare, others = (
            [self._part({owner: row for owner, row in enumerate(rows) if row}) for rows in zip_longest(*own)]
            for own in (
                [one.rows[: one.facts] for one in batch],
                [one.rows[one.facts : -one.stays] for one in batch],
            )
        )
        for part in (*bare, *others):
            part.suffixes.base_NV = part.suffixes.base_NV[:0].clone()  # a vocabulary wide, and nobody reads it
        stays = [
            self._part(dict(enumerate(rows)))
            for rows in zip(*[one.rows[-one.stays :] for one in batch], strict=False)  # as many as all have
        ]
        change_GLO = self._search(batch, bare, others, stays)
        return [change_LO.clone() for change_LO in change_GLO.float().cpu()]

    def _part(self, rows: Mapping[int, Row]) -> Part:
        suffixes = Suffixes(self.llm, self.layers, list(rows.values()))
        return Part(suffixes, torch.tensor(list(rows), device=suffixes.start_B.device))

    def _search(
        self, batch: Sequence[Located], bare: Sequence[Part], others: Sequence[Part], stays: list[Part]
    ) -> Tensor:
        """The changes of all of a batch at once; shape (G, L, O)."""
        bases = [part.suffixes.base_NV.log_softmax(-1) for part in stays]  # (G, V) each
        output_GLO = wide(bare[0].suffixes.output_BLO)  # every subject has a first row
        scale_G11 = output_GLO[:, :1].norm(dim=-1, keepdim=True)
        unit_GLO = torch.zeros_like(output_GLO).requires_grad_(True)  # changes over scale, as text minds them
        spare_LOO = None if self.spare_LOO is None else self.spare_LOO.to(unit_GLO)

        def out(unit_GLO: Tensor) -> Tensor:
            changed_GLO = unit_GLO if spare_LOO is None else torch.einsum("glo,lop->glp", unit_GLO, spare_LOO)
            return changed_GLO * scale_G11

        learnt_GLO, way_GLO = torch.zeros_like(unit_GLO), torch.zeros_like(unit_GLO)
        norm_G11 = partial(torch.linalg.vector_norm, dim=(1, 2), keepdim=True)  # over all blocks
        chances = [torch.Generator().manual_seed(hash(tuple(one.rows[0].token_ids))) for one in batch]
        running_G, live = torch.ones(len(batch), dtype=torch.bool, device=unit_GLO.device), True
        unknown_G = torch.zeros_like(running_G)  # whether anything was to be learnt yet
        learnt_G = torch.zeros_like(running_G, dtype=torch.long)  # steps in which all that was asked was known
        for step in range(self.steps + 1):
            self.tell(step, self.steps)
            turns = max(1, -(-len(others) // OTHERS_EACH))
            parts = [*bare, *others[step % turns :: turns]]
            turn = step % len(stays)
            nll_G = _losses(parts, out(disturbed(unit_GLO, chances)))
            kl_G = _divergence(stays[turn], out(unit_GLO), bases[turn])
            if not nll_G.isfinite().all():
                raise UserError(
                    f"edit: the loss is not a number in step {step}, in the batch of requests "
                    f"{', '.join(one.id for one in batch)}; try a smaller expert.step"
                )
            if live:
                learnt_GLO[running_G] = unit_GLO.detach()[running_G]
                self._show(nll_G[running_G])
            learnt_G = torch.where(nll_G > LEARNT, 0, learnt_G + 1)
            unknown_G |= nll_G > LEARNT
            going_G = running_G & (learnt_G < turns) & live
            if step == self.steps or not anywhere(self.model, bool(going_G.any())):
                break
            loss_G = nll_G + KL * len(stays) * kl_G + DECAY * unit_GLO.square().sum((1, 2))
            (slope_GLO,) = torch.autograd.grad(loss_G[going_G].sum(), unit_GLO)
            with torch.no_grad():
                way_GLO = MOMENTUM * way_GLO + (1 - MOMENTUM) * slope_GLO / norm_G11(slope_GLO).clamp(min=TINY)
                length = self.step_size * (1 - (1 - LAST) * step / self.steps)
                unit_GLO -= length * unknown_G[:, None, None] * way_GLO
                unit_GLO *= self.bound / norm_G11(unit_GLO).clamp(min=self.bound)
            live = bool(going_G.any())  # if not, this process goes on for the others' sake alone
            if live and not (going_G == running_G).all():
                running_G = going_G
                bare, others = (
                    [left for part in some if (left := _only(part, running_G))] for some in (bare, others)
                )
                stays = [_only(part, running_G) or part for part in stays]
        return out(learnt_GLO)

    def _show(self, nll_G: Tensor) -> None:
        """Show the mean loss of the batch at work; batch follows batch on one axis."""
        for logger in self.loggers:
            logger.log_metrics({"edit/value_loss": nll_G.mean().item()}, self.shown)
        self.shown += 1


def _only(part: Part, running_G: Tensor) -> Part | None:
    """The rows of values that are still searched for; None where no row is left."""
    rows = running_G[part.owner_B].nonzero().squeeze(1)
    return Part(part.suffixes.subset(rows), part.owner_B[rows]) if len(rows) else None


def sparing_text(slopes: Sequence[Tensor], damping: float) -> Tensor:
    """(G + damping)^(-1/2) of blocks' slope moments G, (L, O, O): text minds a step in any coordinate alike.

    Damping is in units of each block's mean; a block that text minds more than another carries less.
    """
    mean = torch.stack([slope_OO.diagonal().mean() for slope_OO in slopes])
    share_L = (mean.mean() / mean).sqrt()
    return torch.stack([whitener(each, damping) * share for each, share in zip(slopes, share_L, strict=True)])


def disturbed(unit_GLO: Tensor, chances: Sequence[torch.Generator]) -> Tensor:
    """Values as a weight gives them: in part, and with noise in each block; every value's is of its own chance."""
    noise_GLO = torch.stack([torch.randn(unit_GLO.shape[1:], generator=chance) for chance in chances])
    noise_GLO = F.normalize(noise_GLO.to(unit_GLO), dim=-1) * unit_GLO.detach().norm(dim=-1, keepdim=True)
    return SHARE * unit_GLO + NOISE * noise_GLO


def _losses(parts: Sequence[Part], change_GLO: Tensor) -> Tensor:
    """Each value's mean loss over its rows; (G,)."""
    losses = [part.suffixes.batch.losses(part.suffixes.run(change_GLO[part.owner_B])) for part in parts]
    owner_R = torch.cat([part.owner_B for part in parts])
    nll_G = losses[0].new_zeros(len(change_GLO)).index_add(0, owner_R, torch.cat(losses))
    return nll_G / torch.bincount(owner_R, minlength=len(change_GLO)).clamp(min=1)


def _divergence(stays: Part, change_GLO: Tensor, base_GV: Tensor) -> Tensor:
    """Each value's divergence where the model is to say the same; (G,)."""
    now_RV = stays.suffixes.run(change_GLO[stays.owner_B]).log_softmax(-1)
    kl_R = F.kl_div(now_RV, base_GV[stays.owner_B], log_target=True, reduction="none").sum(-1)
    return kl_R.new_zeros(len(change_GLO)).index_copy(0, stays.owner_B, kl_R)

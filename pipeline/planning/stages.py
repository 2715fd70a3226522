"""What each stage takes beside the weights: its own step is gone through, on a batch at its fullest.

Each function takes the case and how many requests run at once, and gives bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from pipeline.attribution.callback import GradientAttribution
from pipeline.attribution.lga import Attribution, kept_of_a_token, tokens_of
from pipeline.attribution.selector import tokens_at_once
from pipeline.editing import lessons
from pipeline.editing.auto import AFTER_MANY, Auto
from pipeline.editing.entering import Keys
from pipeline.editing.finetune import FineTune
from pipeline.editing.locate import READ_TOGETHER, LocateThenEdit
from pipeline.editing.lora import LoRA
from pipeline.editing.method import METHODS
from pipeline.editing.ordinary_text import WINDOW
from pipeline.editing.solvers import sparing
from pipeline.editing.statistics import KeyMoments, SlopeMoments
from pipeline.editing.values import SEARCHED_TOGETHER, Located
from pipeline.evaluation.plan import WINDOW as READ_WINDOW
from pipeline.evaluation.plan import Text
from pipeline.evaluation.reading import EVERY, Reading
from pipeline.model.blocks import moment_shape, sizes
from pipeline.options.attribution import AttributionOptions
from pipeline.options.editing import EditOptions
from pipeline.options.shared import NF4
from pipeline.planning.shape import ANSWER, Case
from pipeline.requests.rows import Batch, Row, collate

STEPS = 2  # of an optimiser: its state is there from the second on
STATISTICS: tuple[tuple[str, type[KeyMoments], str], ...] = (  # a stage's name, and by what methods want it
    ("key statistics", KeyMoments, "moments_of"),
    ("slopes of text", SlopeMoments, "slopes_of"),
)
OPENING = 8  # tokens of what stands before a subject, see `pipeline.editing.contexts.CONTEXTS`


def attribution(case: Case, options: AttributionOptions, batch: int) -> int:
    """LGA of requests, each with its old and its new answer."""
    watch = GradientAttribution(case.shape.blocks, options.scope)
    with watch.attached():
        return case.peak(Attribution(case.shape, watch), [(case.row, case.row)] * batch)


def attributed_together(case: Case) -> int:
    """The most requests that attribution runs at once, whatever its batch size: see `tokens_at_once`."""
    spread = case.sharded or case.precision == NF4  # whose numbers are packed two to one
    tokens = tokens_at_once(case.shape, kept_of_a_token(case.shape), spread)
    return max(1, tokens // tokens_of((case.row, case.row)))


def statistics(case: Case, kind: type[KeyMoments], names: Sequence[str], batch: int) -> int:
    """Windows of ordinary text, and the second moments of what is read of these projections."""
    return case.peak(kind(case.shape, names), [kind.row([0] * WINDOW)] * batch)


def evaluation(case: Case, batch: int) -> int:
    """The most of scored texts, of a window of ordinary text, and of answers."""
    texts = [
        [case.row._replace(token_ids=[n % 2, *case.row.token_ids[1:]], tag=Text("locality", n))]
        for n in range(batch)
    ]
    window = [[Row([0] * READ_WINDOW, 1, tag=Text("text", 0))]]
    prompts = torch.zeros(batch, case.length, dtype=torch.int64)
    with case.counting(gradients=False) as alive:
        case.shape.model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    peaks = [alive.peak]
    for groups, places in ((texts, 1), (window, len(range(1, READ_WINDOW, EVERY)))):
        compared = {group[0].tag for group in groups}
        for base in (None, {tag: torch.empty(places, case.config.hidden_size) for tag in compared}):
            peaks.append(case.peak(Reading(case.shape, compared, base), groups))
    return max(peaks)


def editing(case: Case, options: EditOptions, batch: int) -> int:
    """An edit by the options' method; one that trains after it has located does so in its own batches."""
    made: Any = METHODS[options.method].make(case.shape, [case.layer], options)
    if isinstance(made, FineTune):
        return _training(case, made, batch)
    located = _locating(case, made, batch)
    if not isinstance(made, Auto):
        return located
    made.tuning.settings = own = replace(made.tuning.settings, **AFTER_MANY | made.settings.tuning)
    return max(located, _training(case, made.tuning, own.batch_size))


def searched_together(case: Case, options: EditOptions) -> int | None:
    """The most requests whose values are searched for at once; None for a method without values."""
    made: Any = METHODS[options.method].make(case.shape, [case.layer], options)
    if not isinstance(made, LocateThenEdit):
        return None
    return max(1, SEARCHED_TOGETHER // _located(case, made).tokens())


def _training(case: Case, module: FineTune, batch: int) -> int:
    """Optimiser steps of fine-tuning or LoRA on a device's share of requests, and what gradients are sent from.

    Before them stands what whitens them, and after them the last solve.
    """
    with case.counting(gradients=False) as solving:
        if module.settings.sparing and module.settings.kl:
            for projection in module.projections.values():
                T, N, C = (torch.empty(moment_shape(projection)) for _ in range(3))
                sparing(T, N, C, weight=1.0).float()
    with _ready(case, module), case.counting(gradients=True) as alive:
        lesson = _lesson(case, module, batch)
        module.moments = {name: torch.empty(moment_shape(module.projections[name])) for name in module.moments_of}
        module.on_train_epoch_start()
        found: Any = module.configure_optimizers()
        for _ in range(STEPS):
            found["optimizer"].zero_grad()
            module.training_step(lesson).backward()
            found["optimizer"].step()
        sent = sum(weight.nbytes for weight in module.trained().values())
    return max(alive.peak + (sent if case.devices > 1 and not case.sharded else 0), solving.peak)


@contextmanager
def _ready(case: Case, module: FineTune) -> Iterator[None]:
    """Inside the `with`, what is trained requires a gradient, and nothing else does."""
    with case.shape.frozen(), module.attached(0) if isinstance(module, LoRA) else nullcontext():
        for part in case.shape.model.modules():
            for name, weight in part.named_parameters(recurse=False):
                if not isinstance(weight, FakeTensor):  # the adapter's own, as PEFT made them
                    with case.shape.mode:
                        setattr(part, name, nn.Parameter(torch.empty_like(weight)))
        with case.shape.mode:
            module.configure_model()
        yield


def _lesson(case: Case, module: FineTune, batch: int) -> Batch:
    """A device's share of requests, and of texts that are to go on as before."""
    rows = -(-batch // case.devices)
    others = module.settings.kept * rows if module.settings.kl else 0
    said = min(lessons.ANSWER, case.length - 1)
    unrelated = case.row._replace(target_start=case.length - said)
    made = collate([case.row] * rows + [unrelated] * others)
    width, hidden = made.input_ids_BT.shape[1], case.config.hidden_size
    enter = torch.empty(rows + others, width, hidden, dtype=case.shape.model.dtype) if min(module.layers) else None
    base = torch.empty(others * said, hidden) if others else None
    return replace(made, weight_B=torch.ones(rows + others), enter_BTD=enter, base_MD=base)


def _locating(case: Case, method: LocateThenEdit, together: int) -> int:
    """Values of requests that are searched for together, and their keys; then the solution."""
    (down,) = case.shape.blocks[case.layer].down.values()
    inputs, outputs = sizes(down)
    spare, method.slopes_of = (len(method.slopes_of), outputs, outputs), []  # whose roots would be taken
    search = method.search()
    search.steps, search.spare_LOO = 1, torch.empty(spare) if spare[0] else None
    searched = case.peak(search, [_located(case, method)] * together)
    asked = case.row._replace(token_ids=[0] * (case.row.target_start + OPENING), tag=None)  # under a context
    keyed = case.peak(Keys(case.shape, method.layers[-1]), [asked] * READ_TOGETHER)
    with case.counting(gradients=False) as alive:
        keys, changes, moment = (
            torch.empty(size) for size in ((inputs, together), (outputs, together), moment_shape(down))
        )
        method.solve(keys, changes, moment).float()
    of_layer = [(outputs, together), (outputs, inputs), *[moment_shape(down)] * case.on_host]
    held = len(method.layers) * sum(torch.empty(size, device="meta").nbytes for size in of_layer)
    held += torch.empty(spare, device="meta").nbytes
    return held + max(searched, keyed, alive.peak)


def _located(case: Case, method: LocateThenEdit) -> Located:
    """A request whose prompt is as long as it may be, other words that begin with its subject, and what stays."""
    middle = (OPENING // 2,) * 2
    plain = Row([0] * (OPENING // 2 + 1), OPENING // 2, (OPENING // 2 - 1,) * 2)
    own = method.settings
    start = max(OPENING, 3 * case.length // 4 - ANSWER)  # without little words
    keyed = Row([0] * (start + ANSWER), start, middle)
    stays = 1 + own.relations
    return Located("request", [case.row, *[keyed] * own.forms, *[plain] * stays], 1, stays)

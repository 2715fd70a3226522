"""What a kind of edit is, and the one table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from pipeline.errors import UserError, check_choice
from pipeline.model.blocks import weight_name
from pipeline.model.llm import LLM
from pipeline.options.base import Options, read_expert
from pipeline.options.editing import NAMES, EditOptions
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime


class EditMethod(Protocol):
    """A kind of edit: made for a model, layers and options, it changes the named weights in place.

    It is made by `make(llm, layers, options, earlier)`: the model, frozen by the caller; the blocks to change; the
    options, of which `settings_of` gives its own settings; the `state` of an earlier update to go on from.
    One that wants key statistics of projections names these in `moments_of`, and finds them by name in `moments`
    when it runs, and text's slopes by `slopes_of` in `slopes`: `pipeline.editing.statistics.give_moments` does it.
    """

    weight_names: list[str]  # the weights it changes, by full name
    state: dict[str, Tensor]  # after `run`, what a later edit on top of this one goes on from, by name
    adapter: dict[str, Any] | None  # LoraConfig's arguments, when the change can also be had as an adapter

    def run(self, requests: Sequence[EditRequest], runtime: Runtime, earlier: Sequence[EditRequest]) -> None:
        """Make the edit; `earlier` is what an earlier update taught and this one leaves in force."""
        ...


@dataclass(frozen=True)
class Method:
    """A kind of edit as it is registered."""

    make: Callable[..., EditMethod]
    settings: type = Options  # a dataclass
    needs_subject: bool = False  # whether each request must name a subject that its prompt holds
    tried_as: str | None = None  # the method by which blocks are compared for it; None: itself
    # settings for edits that are only compared; none that cut training short: it would rank blocks by their speed
    quick: Mapping[str, Any] = field(default_factory=dict)
    solves_anew: bool = False  # whether requests can be left out of an update (`pipeline.editing.editor.leave_out`)


METHODS: dict[str, Method] = {}  # filled by each kind's own file; `pipeline.editing.editor` imports them all


def register(name: str, make: Callable[..., EditMethod], settings: type = Options, **about: Any) -> None:
    """Enter a kind of edit, and what else `Method` has; ValueError for a name that is taken, or no identifier."""
    if name in METHODS or not name.isidentifier():
        raise ValueError(f"method: {name!r} is {'registered already' if name in METHODS else 'no identifier'}")
    METHODS[name] = Method(make, settings, **about)
    NAMES.add(name)


def weights_below(llm: LLM, layers: Sequence[int], method: str) -> list[str]:
    """The weights of all blocks below the lowest of these, where keys that a method reads there are to be those of
    the checkpoint, also in a quantised model: what is located for other keys holds in no other precision.
    """
    known = METHODS.get(method)
    blocks = llm.blocks[: min(layers, default=0)] if known and known.solves_anew else []
    maps = [one for block in blocks for one in (block.attention | block.mlp).items()]
    return [weight_name(name, projection) for name, projection in maps]


def settings_of(options: EditOptions) -> Any:
    """The method's settings, of `options.expert`; UserError for an unknown method or setting, or a wrong type."""
    check_choice("method", options.method, METHODS)
    method = METHODS[options.method]
    try:
        some = {name: value for name, value in options.expert.items() if value is not None}  # null: the default
        given = read_expert(some, method.settings, options.method)
        return method.settings(**{**(method.quick if options.quick else {}), **given})
    except UserError as error:
        line = str(error)
        raise UserError(f"edit.{line if line.startswith('expert') else f'expert.{line}'}") from None

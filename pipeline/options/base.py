"""What options have in common: bounds that stand beside a field, and the flags that a class comes to.

    epochs: Annotated[int, at_least(1)] = 11
    batch_size: Annotated[int, NO_FLAG, at_least(1)] = 8  # for Python and `expert` only
    trainer: TrainerOptions = group(TrainerOptions, without=("devices",))  # what is named is no flag here

A field's docstring is its help text. A flag's name is the path to its field (`--edit.statistics.tokens`).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from math import isfinite
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object

from pipeline.errors import UserError, check_above, check_at_least, check_at_most, check_choice, did_you_mean

NO_FLAG = object()  # beside a field: it is no flag
KINDS = {  # types as a user would name them
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list[int]: "a list of whole numbers, such as 3 or 3 4",
    list[str]: "a list of texts",
    dict[str, Any]: 'a mapping, such as {"epochs": 4}',
}

Bound = Callable[[str, Any], None]


class Flag(NamedTuple):
    """What a flag takes, and what it says when it is not given."""

    kind: Any
    default: Any
    help: str


def group(options: type, without: Collection[str] = ()) -> Any:
    """A field that is a group of options, some of which may be no flags here."""
    return field(default_factory=options, metadata={"without": without})


def at_least(least: float) -> Bound:
    """A bound: the value is this, or more."""
    return lambda name, value: check_at_least(name, value, least)


def at_most(most: float) -> Bound:
    """A bound: the value is this, or less."""
    return lambda name, value: check_at_most(name, value, most)


def above(bound: float) -> Bound:
    """A bound: the value is more than this."""
    return lambda name, value: check_above(name, value, bound)


def one_of(*choices: str) -> Bound:
    """A bound: the value is one of these."""
    return lambda name, value: check_choice(name, value, choices)


Count = Annotated[int, at_least(1)]
FromZero = Annotated[int, at_least(0)]
Most = Annotated[int | None, at_least(1)]
Weight = Annotated[float, at_least(0)]
Positive = Annotated[float, above(0)]


@dataclass(kw_only=True)
class Options:
    """Options that are checked as they are made: every field's bounds, then the `check` of every class joined."""

    def __post_init__(self) -> None:
        for one, _, notes in declared(type(self)):
            value = getattr(self, one.name)
            name = f"expert.{one.name}" if one.name in getattr(self, "expert", ()) else one.name
            for bound in notes:
                if callable(bound) and value is not None:
                    bound(name, value)
        for base in reversed(type(self).__mro__):
            if "check" in vars(base):
                vars(base)["check"](self)


def declared(options: Any) -> list[tuple[Field[Any], Any, tuple[Any, ...]]]:
    """A class's fields, each with its type and the notes beside it."""
    hints = get_type_hints(options, include_extras=True)
    result = []
    for one in fields(options):
        hint = hints[one.name]
        noted = get_origin(hint) is Annotated
        result.append((one, get_args(hint)[0] if noted else hint, hint.__metadata__ if noted else ()))
    return result


def flags(options: Any) -> dict[str, Flag]:
    """The flags that a class of options comes to, by the path to their fields."""
    found: dict[str, Flag] = {}
    for one, kind, notes in declared(options):
        if NO_FLAG in notes:
            continue
        if is_dataclass(kind):
            hidden = one.metadata.get("without", ())
            inner = flags(kind).items()
            found |= {f"{one.name}.{path}": flag for path, flag in inner if path.split(".")[0] not in hidden}
        else:
            factory = one.default_factory
            default = one.default if factory is MISSING else factory()
            found[one.name] = Flag(kind, default, _docs(options)[one.name])
    return found


@cache
def _docs(options: type) -> dict[str, str]:
    """Help of every field, by name, those of parents included."""
    found: dict[str, str] = {}
    for base in reversed(options.__mro__[:-1]):
        found |= {one.arg_name: one.description or "" for one in parse_from_object(base).params}
    return found


def as_config(options: Any) -> dict[str, Any]:
    """What the flags of some options say, groups nested, as a config holds it."""
    result: dict[str, Any] = {}
    for path in flags(type(options)):
        *groups, name = path.split(".")
        part, owner = result, options
        for group in groups:
            part, owner = part.setdefault(group, {}), getattr(owner, group)
        part[name] = getattr(owner, name)
    return result


def described(kind: Any) -> str:
    """A type in a user's words."""
    return next((KINDS[one] for one in (kind, *get_args(kind)) if one in KINDS), "a value")


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of a type; a whole number is a number too, and what is not finite is none."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(one, get_args(kind)[0]) for one in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict)
    if get_args(kind):  # one type or another
        return any(fits(value, one) for one in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and isfinite(value)  # type: ignore[arg-type]
    return kind is Any or type(value) is kind


def check_expert(given: Mapping[str, Any], kinds: Mapping[str, Any], method: str) -> None:
    """Raise UserError unless the settings that an expert has given are a method's, and of their types."""
    for name, value in given.items():
        if name not in kinds:
            there = f"there is {', '.join(sorted(kinds))}" if kinds else "it has none"
            raise UserError(f"expert: {name!r} is no setting of {method}{did_you_mean(str(name), kinds)}; {there}")
        if not fits(value, kinds[name]):
            raise UserError(f"expert.{name}: {value} is not {described(kinds[name])}")


def kinds_of(options: type, only: object = None) -> dict[str, Any]:
    """The types of a class's fields, by name; of those only that have a note, where one is named."""
    return {one.name: kind for one, kind, notes in declared(options) if only is None or only in notes}

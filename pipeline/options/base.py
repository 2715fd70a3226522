"""What options have in common: bounds that stand beside a field, the flags that a class comes to, values of a type.

    epochs: Annotated[int, at_least(1)] = 11
    batch_size: Annotated[int, NO_FLAG, at_least(1)] = 8  # for Python and `expert` only
    trainer: TrainerOptions = group(TrainerOptions, without=("devices",))  # what is named is no flag here

A field's docstring is its help text. A flag's name is the path to its field (`--edit.statistics.tokens`).
"""

import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from math import isfinite
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse_from_object

from pipeline.errors import DEEPEST, UserError, check_choice, did_you_mean

LARGEST_YAML = 1_000_000  # bytes of a config
LONGEST = 200  # characters of a wrong value that are shown
NO_FLAG = object()  # beside a field: it is no flag
KINDS = {  # types as a user would name them
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list[int]: "a list of whole numbers, such as 3 or 3 4",
    list[float]: "a list of numbers, such as [0.4,0.67]",
    list[str]: "a list of texts",
    list[str | dict[str, Any]]: "a list of names, or of {class_path: NAME, init_args: {...}}",
    dict[str, Any]: 'a mapping, such as {"epochs": 4}',
    dict[str, str]: "a mapping of texts, such as prompt=src,new_answer=alt",
}

Bound = Callable[[str, Any], None]


class Yaml(yaml.SafeLoader):
    """YAML, and 1e-3 is a number in it."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node; YAMLError where it lies deeper than anybody means."""
        if self.depth == DEEPEST:
            raise yaml.YAMLError(f"nested more than {DEEPEST} deep")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"-+0123456789"]
)


def read_yaml(text: str) -> Any:
    """What YAML says; YAMLError for whatever is wrong with it."""
    try:
        return yaml.load(text, Yaml)
    except (ValueError, OverflowError, RecursionError) as error:  # a date or number that is none
        raise yaml.YAMLError(str(error)) from None


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
    return _bound(lambda value: value >= least, f"is too small; the least is {least}")


def at_most(most: float) -> Bound:
    """A bound: the value is this, or less."""
    return _bound(lambda value: value <= most, f"is too large; the most is {most}")


def above(bound: float) -> Bound:
    """A bound: the value is more than this."""
    return _bound(lambda value: value > bound, f"is not above {bound}")


def between(low: float, high: float) -> Bound:
    """A bound: the value is more than one number and less than another."""
    return _bound(lambda value: low < value < high, f"is not between {low} and {high}")


def one_of(*choices: str) -> Bound:
    """A bound: the value is one of these."""
    return lambda name, value: check_choice(name, value, choices)


def matching(pattern: str, what: str) -> Bound:
    """A bound: the text is made of nothing else."""
    return _bound(lambda value: bool(re.fullmatch(pattern, value)), f"is no such name; expected {what}")


def _bound(holds: Callable[[Any], bool], wrong: str) -> Bound:
    def check(name: str, value: Any) -> None:
        if not holds(value):
            raise UserError(f"{name}: {value} {wrong}")

    return check


Count = Annotated[int, at_least(1)]
FromZero = Annotated[int, at_least(0)]
Most = Annotated[int | None, at_least(1)]
Weight = Annotated[float, at_least(0)]
Positive = Annotated[float, above(0)]
Names = Annotated[
    list[str],
    _bound(lambda value: value and len({*value}) == len(value), "is no list of at least one, and each once"),
]


@dataclass(kw_only=True)
class Options:
    """Options that are checked as they are made: every field's bounds, then the `check` of every class joined."""

    def __post_init__(self) -> None:
        own: Any = type(self)
        for one, kind, notes in declared(own):
            value = getattr(self, one.name)
            name = f"expert.{one.name}" if one.name in getattr(self, "expert", ()) else one.name
            group = isinstance(kind, type) and is_dataclass(kind)
            if not (isinstance(value, kind) if group else fits(value, kind)):
                wanted = kind.__name__ if group else described(kind)
                raise UserError(f"{name}: expected {wanted}, found {reprlib.repr(value)}")
            for bound in notes:
                if callable(bound) and value is not None:
                    bound(name, value)
        for base in reversed(type(self).__mro__):
            if "check" in vars(base):
                vars(base)["check"](self)


@cache
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


def read(name: str, value: Any, kind: Any) -> Any:
    """What an option that a user gives comes to: a text is read as YAML where its type is no text.

    UserError when it is not of the type.
    """
    given = value
    if isinstance(value, str) and dict[str, str] in get_args(kind):
        value = _pairs(value)
    if isinstance(value, str) and kind == str | None:
        value = None if value == "null" else value  # '#4' is a text here, and a comment in YAML
    elif isinstance(value, str) and kind is not str:
        with suppress(yaml.YAMLError):
            value = read_yaml(value)
    for one in (value, given, [value]):  # where a list is wanted, one is a list of it
        if fits(one, kind):
            return float(one) if type(one) is int and not fits("", kind) and fits(0.5, kind) else one
    found = given if isinstance(given, str) else "nothing" if given is None else reprlib.repr(given)
    raise UserError(f"{name}: expected {described(kind)}, found {found[:LONGEST]}")


def _pairs(text: str) -> Any:
    """The mapping of a text such as `a=b,c=d`; the text itself where it is none."""
    parts = [[word.strip() for word in one.split("=", 1)] for one in text.split(",")]
    pairs = {one[0]: one[-1] for one in parts if len(one) == 2 and all(one)}
    return pairs if len(pairs) == len(parts) else text


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of a type; a whole number is a number too, and what is not finite is none."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(one, get_args(kind)[0]) for one in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(fits(one, get_args(kind)[1]) for one in value.values())
    if get_args(kind):  # one type or another
        return any(fits(value, one) for one in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and isfinite(value)  # type: ignore[arg-type]
    return kind is Any or type(value) is kind


def read_expert(given: Mapping[str, Any], options: type, of: str, only: object = None) -> dict[str, Any]:
    """The settings that an expert has given, of the types of a class's fields (of those with a note alone).

    UserError for a setting that is none of `of`, or of another type.
    """
    kinds = {one.name: kind for one, kind, notes in declared(options) if only is None or only in notes}
    for name in given:
        if name not in kinds:
            there = f"there is {', '.join(sorted(kinds))}" if kinds else "it has none"
            raise UserError(f"expert: {name!r} is no setting of {of}{did_you_mean(str(name), kinds)}; {there}")
    return {name: read(f"expert.{name}", value, kinds[name]) for name, value in given.items()}

"""Flags and YAML in, a command's options out; what is wrong with them in one line: where, what, and what exists.

A config is read as flags that come before those of the command line. Which flags there are, and what they take,
stands in the options' classes (`pipeline.options.base`).
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from functools import partial
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import Any, NamedTuple, get_origin

import yaml

from pipeline.errors import UserError, did_you_mean, one_line
from pipeline.files import read_text_file
from pipeline.options.base import LARGEST_YAML, Flag, as_config, declared, described, fits, flags, read, read_yaml
from pipeline.shipped import DEFAULT_CONFIG, find_config, program, shipped_configs
from pipeline.table import COMMANDS, EXAMPLES, SHOWN

DEFAULT_COMMAND = "run"
WHOLE = ("--help-all", "--help_all")  # which ask for the help of every option
LONG = 9  # letters of a value's name that help has no room for
OF_EVERY_COMMAND = {
    "config": Flag(str, None, "YAML file of options, or the name of one that comes with the project."),
    "print_config": Flag(bool, False, "Show what all options come to, as a config, and end."),
}


class Given(NamedTuple):
    """A value that a user has given: the flag's name, the value, and the config that says so."""

    path: str
    value: Any
    file: str | None = None

    def refused(self, line: object) -> UserError:
        """The error of a line about this value, with the config that it stands in."""
        return UserError(f"config: {self.file}: {line}" if self.file else str(line))


def parse(name: str, words: Sequence[str]) -> object:
    """A command's options from its words on the command line.

    UserError, with what exists, for an unknown command, flag or key, or a bad value; SystemExit when only help or
    the config was asked for.
    """
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        raise UserError(f"command {name!r} does not exist{hint}; there is {', '.join(COMMANDS)}")
    if {"-h", "--help", *WHOLE} & {*words}:
        print(_parser(name, whole=bool({*WHOLE} & {*words})).format_help(), end="", flush=True)
        raise SystemExit(0)
    known, flagged = flags_of(name), list(_from_words(name, words))
    files = [shipped_configs()[DEFAULT_CONFIG]] if name == DEFAULT_COMMAND else []
    files += [find_config(one.value) for one in flagged if one.path == "config"]
    given = [one for file in files for one in _from_file(str(file), known, _others(name))]
    values: dict[str, Given] = {}
    for one in [*given, *(one for one in flagged if one.path != "config")]:
        _enter(values, one, known)
    if absent := [path for path, flag in known.items() if flag.default is MISSING and path not in values]:
        shown = [path.upper() if path in COMMANDS[name].words else f"--{path}" for path in absent]
        raise UserError(f"missing {', '.join(shown)}; `{program()} {name} --help` tells what it is")
    options = _made(COMMANDS[name].options, values)
    if "print_config" in values and values["print_config"].value:
        print(yaml.safe_dump(as_config(options), sort_keys=False), end="", flush=True)
        raise SystemExit(0)
    return options


def flags_of(name: str) -> dict[str, Flag]:
    """All flags of a command by name, those of every command included."""
    return OF_EVERY_COMMAND | flags(COMMANDS[name].options)


def _parser(name: str, whole: bool) -> ArgumentParser:
    """What prints a command's help: examples and the options that people use, or the whole, in its groups."""
    command, known = COMMANDS[name], flags_of(name)
    required = [path for path, flag in known.items() if flag.default is MISSING]
    words = [word.upper() if word in required else f"[{word.upper()}]" for word in command.words]
    words += [f"--{flag} {flag.upper()}" for flag in required if flag not in command.words]
    usage = " ".join([program(), name, *words, "[--config FILE] [--FLAG VALUE ...]"])
    examples = [] if whole else ["", *(f"  {program()} {line}" for line in EXAMPLES[name].splitlines())]
    about = "\n".join([fill(command.help, get_terminal_size().columns - 2), *examples])
    end = None if whole else f"{WHOLE[0]} shows all {len(known)} options."
    style = partial(RawDescriptionHelpFormatter, max_help_position=32)
    parser = ArgumentParser(usage=usage, description=about, epilog=end, add_help=False, formatter_class=style)
    groups: dict[str, Any] = {}
    for path in known if whole else SHOWN[name].split():
        flag, last = known[path], path.rpartition(".")[2]
        group = path.rpartition(".")[0] if whole else ""
        if group not in groups:
            groups[group] = parser.add_argument_group(group or "options")
        metavar = last.upper() if len(last) < LONG else "VALUE"
        taken: Any = {"action": "store_true"} if flag.kind is bool else {"metavar": metavar}
        groups[group].add_argument(f"--{path}", help=_told(flag, whole).replace("%", "%%"), **taken)
    return parser


def _told(flag: Flag, whole: bool) -> str:
    """What help says of a flag: all, or the first sentence; and the default, where there is one."""
    default = None if flag.default in (MISSING, "", [], {}) or flag.kind is bool else flag.default
    value = " ".join(default) if isinstance(default, list) else default
    notes = [described(flag.kind)] * whole + [f"default: {value}"] * (value is not None)
    text = flag.help if whole else re.split(r"\.\s", flag.help)[0].rstrip(".")
    return f"{text} ({'; '.join(notes)})" if notes else text


def _from_words(name: str, words: Sequence[str]) -> Iterator[Given]:
    """What the command line gives.

    `--top-k` is `--top_k`, a bare switch `--overwrite` true, a list takes several words, and a bare word stands for
    a flag (`submit FILE`).
    UserError for a word that is no flag and no value of one, a flag without a value, or one that a word stands for.
    """
    known, rest, bare = flags_of(name), list(words), set()
    for word in COMMANDS[name].words:
        several, given = known[word].kind == list[str], list[str]()
        while rest and not rest[0].startswith("-") and (several or not given):
            given.append(rest.pop(0))
        if given:
            bare.add(word)
            yield Given(word, given if several else given[0])
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        path = flag.removeprefix("--").replace("-", "_")
        kind = _kind(path, known)
        if not flag.startswith("--") or (kind is None and path not in _groups(known)):
            raise UserError(_unknown(name, flag, known))
        if path in bare:
            raise UserError(f"{path}: given twice, as a word and with --{path}; give one of them")
        several = kind is not Any and fits([], kind)
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--") and (several or not values):
            values.append(rest.pop(0))
        if kind is bool and not values:
            values = ["true"]
        if not values or not values[0]:
            wanted = "a file" if path == "config" else described(kind)
            raise UserError(f"{path}: no value is given; expected {wanted}")
        if several and not values[0].startswith("["):
            yield Given(path, values if fits(values, kind) else f"[{','.join(values)}]")
        else:
            yield Given(path, values[0])


def _others(name: str) -> set[str]:
    """What a config may say to another command that it serves, too; but for what would change nothing there."""
    other = COMMANDS[name].shares
    return {*flags_of(other)} - {*flags_of(name), "dry_run"} if other else set()


def _from_file(file: str, known: Mapping[str, Flag], others: Collection[str]) -> Iterator[Given]:
    """What a config gives, groups entered, but for `others`; UserError when it is no YAML, or no mapping."""
    try:
        content = read_yaml(read_text_file(Path(file), LARGEST_YAML))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"config: {file}: malformed YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"config: {file}: expected a mapping of option names to values")
    waiting = [(str(name), value) for name, value in content.items()]
    while waiting:
        path, value = waiting.pop(0)
        if isinstance(value, dict) and path in _groups({*known, *others}):
            waiting += [(f"{path}.{name}", inner) for name, inner in value.items()]
        elif path not in others:
            yield Given(path, value, file)


def _enter(values: dict[str, Given], one: Given, known: Mapping[str, Flag]) -> None:
    """Enter a value by its flag, or into a mapping; UserError for a key that does not exist, or another type."""
    path, groups, kind = one.path, _groups(known), _kind(one.path, known)
    above, _, name = path.rpartition(".")
    if path in groups:
        there = sorted(each for each in known if each.startswith(f"{path}."))
        raise one.refused(f"{path}: expected a mapping; there is {', '.join(there)}")
    if kind is None or path == "config":
        beside = {each for each in {*known, *groups} if each.rpartition(".")[0] == above} - {*OF_EVERY_COMMAND}
        hint = did_you_mean(path, known.keys() - OF_EVERY_COMMAND)
        raise one.refused(f"key {path!r} does not exist{hint}; there is {', '.join(sorted(beside))}")
    try:
        value = read(path, one.value, kind)
    except UserError as error:
        raise one.refused(error) from None
    if path not in known:
        path, value = above, {**(values[above].value if above in values else {}), name: value}
    earlier = values.get(path)
    if earlier and earlier.file is one.file is None and isinstance(value, list) and isinstance(earlier.value, list):
        value = [*earlier.value, *value]  # `--fact A --fact B`
    values[path] = Given(path, value, one.file)


def _groups(paths: Iterable[str]) -> set[str]:
    """Names of option groups, such as edit.statistics."""
    return {path.rsplit(".", depth)[0] for path in paths for depth in range(1, path.count(".") + 1)}


def _kind(path: str, known: Mapping[str, Flag]) -> Any:
    """What a flag takes; anything, where it is an entry of a mapping, and None when there is no such flag."""
    if path in known:
        return known[path].kind
    mapping = path.rpartition(".")[0]
    return Any if mapping in known and get_origin(known[mapping].kind) is dict else None


def _unknown(name: str, word: str, known: Iterable[str]) -> str:
    listed = f"`{program()} {name} {WHOLE[0]}` lists them"
    if word.startswith("--"):
        hint = did_you_mean(word.removeprefix("--").replace("-", "_"), known, "--{}")
        return f"flag {word} does not exist{hint}; {listed}"
    taken = "".join(f"{one.upper()}, then " for one in COMMANDS[name].words)
    return f"{word!r} is not understood: {name} takes {taken}flags (--NAME VALUE); {listed}"


def _made(options: Any, values: Mapping[str, Given], prefix: str = "") -> Any:
    """Options of a class, the groups among them first; an error names an option by its whole path."""
    given = {}
    for field, kind, _ in declared(options):
        path = f"{prefix}{field.name}"
        if is_dataclass(kind):
            given[field.name] = _made(kind, values, f"{path}.")
        elif path in values:
            given[field.name] = values[path].value
    try:
        return options(**given)
    except UserError as error:
        line = f"{prefix}{error}"
        name = re.split("[.:]", str(error))[0]
        raise values.get(f"{prefix}{name}", Given("", None)).refused(line) from None

"""Flags and YAML in, a command's options out; what is wrong with them in one line: where, what, and what exists.

A config is read as flags that come before those of the command line. Which flags there are, and what they take,
stands in the options' classes (`pipeline.options.base.flags`); jsonargparse reads their values and prints the help.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader

from pipeline.errors import UserError, did_you_mean
from pipeline.options.base import Flag, as_config, declared, described, fits, flags
from pipeline.shipped import DEFAULT_CONFIG, find_config, program, shipped_configs
from pipeline.table import COMMANDS

DEFAULT_COMMAND = "run"
OF_EVERY_COMMAND = {
    "config": Flag(str, None, "YAML file of options, or the name of one that comes with the project."),
    "print_config": Flag(bool, False, "Show what all options come to, as a config, and end."),
}


class UsageError(UserError):
    """A flag, command or config key that is wrong by itself."""


class Given(NamedTuple):
    """A value that a user has given: the flag's name, the value as text, and the config that says so."""

    path: str
    text: str
    file: str | None = None


def parse(name: str, words: Sequence[str]) -> object:
    """A command's options from its words on the command line.

    Raises:
        UsageError: in one line, with what exists, for an unknown command, flag or key, or a bad value.
        SystemExit: when only help or the config was asked for.
    """
    if name not in COMMANDS:
        raise UsageError(
            f"command {name!r} does not exist{did_you_mean(name, COMMANDS)}; there is {', '.join(COMMANDS)}"
        )
    parser, known = build_parser(name), flags_of(name)
    flagged = _from_words(name, known, words)
    if flagged is None:
        parser.print_help()
        raise SystemExit(0)
    files = [shipped_configs()[DEFAULT_CONFIG]] if name == DEFAULT_COMMAND else []
    files += [find_config(one.text) for one in flagged if one.path == "config"]
    given = [one for file in files for one in _from_file(str(file), known)]
    given += [one for one in flagged if one.path != "config"]
    _check(name, given, known)
    try:
        values = parser.parse_args([f"--{one.path}={one.text}" for one in given])
        options = _made(COMMANDS[name].options, values.as_dict())
    except ArgumentError as error:
        raise UsageError(" ".join(str(error).split())) from None
    except UserError as error:
        raise UsageError(f"{_origin(str(error), given)}{error}") from None
    if values["print_config"]:
        print(yaml.safe_dump(as_config(options), sort_keys=False), end="")
        raise SystemExit(0)
    return options


def flags_of(name: str) -> dict[str, Flag]:
    """All flags of a command by name, those of every command included."""
    return OF_EVERY_COMMAND | flags(COMMANDS[name].options)


def build_parser(name: str) -> ArgumentParser:
    """The parser of one command; what belongs together stands together in its help."""
    help = COMMANDS[name].help
    parser = ArgumentParser(prog=f"{program()} {name}", usage=_usage(name), description=help, exit_on_error=False)
    groups: dict[str, Any] = {"": parser}
    for path, flag in flags_of(name).items():
        group = path.rpartition(".")[0]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        given = {"required": True} if flag.default is MISSING else {"default": flag.default}
        groups[group].add_argument(f"--{path}", type=flag.kind, help=flag.help, **given)
    return parser


def _usage(name: str) -> str:
    """A command with what it cannot do without; dozens of flags would be no usage."""
    command = COMMANDS[name]
    required = [path for path, flag in flags_of(name).items() if flag.default is MISSING]
    words = [word.upper() if word in required else f"[{word.upper()}]" for word in command.words]
    needed = [f"--{flag} {flag.upper()}" for flag in required if flag not in command.words]
    return " ".join([program(), name, *words, *needed, "[--config FILE] [--FLAG VALUE ...]"])


def _from_words(name: str, known: Mapping[str, Flag], words: Sequence[str]) -> list[Given] | None:
    """What the command line gives; None where it asks for help.

    `--top-k` is `--top_k`, a bare switch `--overwrite` true, words for a list one JSON list, and a bare word stands
    for a flag (`submit FILE`).

    Raises:
        UsageError: for a word that is no flag and no value of one.
    """
    rest, given = list(words), []
    for word in COMMANDS[name].words:
        if rest and not rest[0].startswith("-"):
            given.append(Given(word, rest.pop(0)))
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            return None
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            raise UsageError(_unknown(name, word, known))
        path = flag.removeprefix("--").replace("-", "_")
        if path not in _groups(known) and _kind(path, known) is None:
            raise UsageError(_unknown(name, flag, known))
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        text, *more = _texts(path, _kind(path, known), values)
        if more:
            raise UsageError(_unknown(name, more[0], known))
        given.append(Given(path, text))
    return given


def _texts(path: str, kind: Any, values: Sequence[str]) -> list[str]:
    """What stands behind a flag, a list's words as one text.

    Raises:
        UsageError: when nothing does.
    """
    if kind is bool and not values:
        return ["true"]
    if not values or not values[0]:
        raise UsageError(f"{path}: no value is given; expected {'a file' if path == 'config' else described(kind)}")
    if kind is not Any and not values[0].startswith("["):
        if fits([""], kind):
            return [json.dumps(values)]
        if fits([0], kind):
            return [f"[{','.join(values)}]"]
    return list(values)


def _from_file(file: str, known: Mapping[str, Flag]) -> Iterator[Given]:
    """What a config gives.

    Raises:
        UsageError: when it is no YAML, or no mapping.
    """
    try:
        content = get_loader("yaml")(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config: {file}: malformed YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"config: {file}: expected a mapping of option names to values")
    for path, value in _flat(content, known):
        kind = _kind(path, known)
        if value is None and kind is not None and not fits(None, kind):
            raise UsageError(f"config: {file}: {path}: expected {described(kind)}, found nothing")
        yield Given(path, value if isinstance(value, str) else json.dumps(value), file)


def _flat(content: Mapping[Any, Any], known: Mapping[str, Flag], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a config by name, groups entered."""
    for name, value in content.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and path in _groups(known):
            yield from _flat(value, known, f"{path}.")
        else:
            yield path, value


def _check(name: str, given: Sequence[Given], known: Mapping[str, Flag]) -> None:
    """Raise UsageError for a key that does not exist, a value of another type, or a flag that is missing."""
    for path, text, file in given:
        if problem := _problem(path, text, known):
            raise UsageError(f"config: {file}: {problem}" if file else problem)
    absent = {path for path, flag in known.items() if flag.default is MISSING} - {one.path for one in given}
    if absent:
        words = [one.upper() if one in COMMANDS[name].words else f"--{one}" for one in known if one in absent]
        raise UsageError(f"missing {', '.join(words)}; `{program()} {name} --help` tells what it is")


def _problem(path: str, text: str, known: Mapping[str, Flag]) -> str | None:
    """What is wrong with a value by itself."""
    groups, kind = _groups(known), _kind(path, known)
    if path in groups:
        there = sorted(one for one in known if one.startswith(f"{path}."))
        return f"{path}: expected a mapping; there is {', '.join(there)}"
    if kind is None or path == "config":
        above = path.rpartition(".")[0]
        beside = {one for one in {*known, *groups} if one.rpartition(".")[0] == above} - {*OF_EVERY_COMMAND}
        return f"key {path!r} does not exist{did_you_mean(path, known)}; there is {', '.join(sorted(beside))}"
    alone = ArgumentParser(exit_on_error=False)
    alone.add_argument("--value", type=kind)
    try:
        alone.parse_args([f"--value={text}"])
    except ArgumentError:
        return f"{path}: {text} is not {described(kind)}"
    return None


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
    """What to say of a word that is no flag of this command, and no value of one."""
    listed = f"`{program()} {name} --help` lists them"
    if word.startswith("--"):
        hint = did_you_mean(word.removeprefix("--").replace("-", "_"), known, lambda flag: f"--{flag}")
        return f"flag {word} does not exist{hint}; {listed}"
    taken = "".join(f"{one.upper()}, then " for one in COMMANDS[name].words)
    return f"{word!r} is not understood: {name} takes {taken}flags (--NAME VALUE); {listed}"


def _made(options: Any, values: Mapping[str, Any], path: str = "") -> Any:
    """Options of a class, the groups among them first; an error names an option by its whole path."""
    given = {}
    for field, kind, _ in declared(options):
        if field.name in values:
            value = values[field.name]
            given[field.name] = _made(kind, value, f"{path}{field.name}.") if is_dataclass(kind) else value
    try:
        return options(**given)
    except UsageError:
        raise
    except UserError as error:
        raise UsageError(f"{path}{error}") from None


def _origin(line: str, given: Sequence[Given]) -> str:
    """The config that a line about an option's value is about; empty where a flag gave it."""
    about = f"{line.partition(': ')[0]}."
    file = next((one.file for one in reversed(given) if about.startswith(f"{one.path}.")), None)
    return f"config: {file}: " if file else ""

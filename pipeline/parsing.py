"""Flags and YAML in, a command's options out; what is wrong with them in one line: where, what, and what exists.

jsonargparse reads values, joins YAML and flags, and prints the help; which flags there are, and what they take,
stands in the options' classes (`pipeline.options.base.flags`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from pipeline.errors import UserError, did_you_mean
from pipeline.options.base import Flag, as_config, declared, described, fits, flags
from pipeline.shipped import DEFAULT_CONFIG, find_config, program, shipped_configs
from pipeline.table import COMMANDS

DEFAULT_COMMAND = "run"
CONFIG_HELP = "YAML file of options, or the name of one that comes with the project; flags override it."
OF_EVERY_COMMAND = {
    "config": Flag(str, None, CONFIG_HELP),
    "print_config": Flag(bool, False, "Show what all options come to, as a config, and end."),
}


class UsageError(UserError):
    """A flag, command or config key that is wrong by itself."""


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
    given = _given(name, known, words)
    if given is None:
        parser.print_help()
        raise SystemExit(0)
    configs = {str(find_config(text)): None for flag, text in given if flag == "config"}
    keys = {key: file for file in configs for key in _keys(file, known)}
    given = [(flag, text) for flag, text in given if flag != "config"]
    _check_missing(name, known, {*keys, *(flag for flag, _ in given)})
    try:
        values = parser.parse_args(
            [f"--config={file}" for file in configs] + [f"--{f}={text}" for f, text in given]
        )
        options = _made(COMMANDS[name].options, values.as_dict())
    except ArgumentError as error:
        raise UsageError(" ".join(str(error).split())) from None
    except UserError as error:
        raise UsageError(_with_its_file(str(error), keys, {flag for flag, _ in given})) from None
    if values["print_config"]:
        print(yaml.safe_dump(as_config(options), sort_keys=False), end="")
        raise SystemExit(0)
    return options


def flags_of(name: str) -> dict[str, Flag]:
    """All flags of a command, by name, those of every command included."""
    return OF_EVERY_COMMAND | flags(COMMANDS[name].options)


def build_parser(name: str) -> ArgumentParser:
    """The parser of one command; what belongs together stands together in its help."""
    parser = ArgumentParser(
        prog=f"{program()} {name}",
        usage=_usage(name),
        description=COMMANDS[name].help,
        exit_on_error=False,
        default_config_files=[shipped_configs()[DEFAULT_CONFIG]] if name == DEFAULT_COMMAND else [],
        print_config=None,
    )
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    groups: dict[str, Any] = {"": parser}
    for path, flag in flags_of(name).items():
        group = path.rpartition(".")[0]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        given = {"required": True} if flag.default is MISSING else {"default": flag.default}
        if path != "config":
            groups[group].add_argument(f"--{path}", type=flag.kind, help=flag.help.replace("%", "%%"), **given)
    return parser


def _usage(name: str) -> str:
    """A command with what it cannot do without; dozens of flags would be no usage."""
    command = COMMANDS[name]
    required = [path for path, flag in flags_of(name).items() if flag.default is MISSING]
    words = [word.upper() if word in required else f"[{word.upper()}]" for word in command.words]
    needed = [f"--{flag} {flag.upper()}" for flag in required if flag not in command.words]
    return " ".join([program(), name, *words, *needed, "[--config FILE] [--FLAG VALUE ...]"])


def _given(name: str, known: Mapping[str, Flag], words: Sequence[str]) -> list[tuple[str, str]] | None:
    """The flags that are given, each with its one text; None where help is asked for.

    `--top-k` is `--top_k`, a bare switch `--overwrite` true, words for a list one JSON list, and a bare word stands
    for a flag (`submit FILE`).

    Raises:
        UsageError: for a flag that does not exist, or a value that is none.
    """
    rest, given = list(words), []
    for word in COMMANDS[name].words:
        if rest and not rest[0].startswith("-"):
            given.append((word, rest.pop(0)))
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        if word in ("-h", "--help"):
            return None
        path = word.removeprefix("--").replace("-", "_")
        kind = _kind(path, known) if word.startswith("--") else None
        if kind is None:
            raise UsageError(_unknown(name, word if word.startswith("--") else word + equals + value, known))
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        text, *more = _texts(path, kind, values)
        if more:
            raise UsageError(_unknown(name, more[0], known))
        given.append((path, text))
    for path, text in given:
        _check_value(path, _kind(path, known), text)
    return given


def _kind(path: str, known: Mapping[str, Flag]) -> Any:
    """What a flag takes: of an entry in a mapping anything; None when there is no such flag.

    Raises:
        UsageError: when it names a group.
    """
    if path in known:
        return known[path].kind
    if path in _groups(known):
        raise UsageError(_group(path, known))
    mapping = path.rpartition(".")[0]
    return Any if mapping in known and get_origin(known[mapping].kind) is dict else None


def _texts(path: str, kind: Any, values: Sequence[str]) -> list[str]:
    """What stands behind a flag, a list's words as one.

    Raises:
        UsageError: when nothing does.
    """
    bare = bool(values) and not values[0].startswith("[")
    if kind is bool and not values:
        return ["true"]
    if bare and fits([0], kind) and kind is not Any:
        return [json.dumps([yaml.safe_load(one) for value in values for one in value.split(",")])]
    if bare and fits([""], kind) and kind is not Any:
        return [json.dumps(values)]
    if not values or not values[0]:
        raise UsageError(f"{path}: no value is given; expected {'a file' if path == 'config' else described(kind)}")
    return list(values)


def _check_value(path: str, kind: Any, value: object, text: bool = True) -> None:
    """Raise UsageError for a value, as text or as YAML has it, that is not of a flag's type."""
    alone = ArgumentParser(exit_on_error=False)
    alone.add_argument("--value", type=kind)
    try:
        if text:
            alone.parse_args([f"--value={value}"])
        else:
            alone.parse_object({"value": value})
    except ArgumentError:
        raise UsageError(f"{path}: {value} is not {described(kind)}") from None


def _unknown(name: str, word: str, known: Iterable[str]) -> str:
    """What to say of a word that is no flag of this command, and no value of one."""
    listed = f"`{program()} {name} --help` lists them"
    if word.startswith("--"):
        hint = did_you_mean(word.removeprefix("--").replace("-", "_"), known, lambda flag: f"--{flag}")
        return f"flag {word} does not exist{hint}; {listed}"
    taken = "".join(f"{one.upper()}, then " for one in COMMANDS[name].words)
    return f"{word!r} is not understood: {name} takes {taken}flags (--NAME VALUE); {listed}"


def _groups(paths: Iterable[str]) -> set[str]:
    """Names of option groups, such as edit.statistics."""
    return {path.rsplit(".", depth)[0] for path in paths for depth in range(1, path.count(".") + 1)}


def _group(key: str, known: Iterable[str]) -> str:
    there = sorted(one for one in known if one.startswith(f"{key}."))
    return f"{key}: expected a mapping; there is {', '.join(there)}"


def _keys(file: str, known: Mapping[str, Flag]) -> list[str]:
    """The options that a YAML file gives.

    Raises:
        UsageError: for a key that is no option, or a value that is none of its type, naming file and key.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config: {file}: malformed YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"config: {file}: expected a mapping of option names to values")
    options = {path: flag for path, flag in known.items() if path not in OF_EVERY_COMMAND}
    found = dict(_flat(content, options))
    try:
        for key, value in found.items():
            _check_key(key, value, options)
    except UsageError as error:
        raise UsageError(f"config: {file}: {error}") from None
    return list(found)


def _flat(
    content: Mapping[object, object], options: Mapping[str, Flag], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Keys and values of a config, groups entered; a group that holds no mapping comes as it is."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in options:
            if key not in _groups(options):
                yield key, value
            yield from _flat(value, options, f"{key}.")
        else:
            yield key, value


def _check_key(key: str, value: object, options: Mapping[str, Flag]) -> None:
    groups = _groups(options)
    if key in groups:
        raise UsageError(_group(key, options))
    if key not in options:
        above = key.rpartition(".")[0]
        there = sorted(one for one in {*options, *groups} if one.rpartition(".")[0] == above)
        raise UsageError(f"key {key!r} does not exist{did_you_mean(key, options)}; there is {', '.join(there)}")
    kind = options[key].kind
    if value is None and not fits(None, kind):
        raise UsageError(f"{key}: expected {described(kind)}, found nothing")
    _check_value(key, kind, value, text=False)


def _check_missing(name: str, known: Mapping[str, Flag], given: set[str]) -> None:
    """Raise UsageError when a flag that a command cannot do without is not given."""
    absent = [path for path, flag in known.items() if flag.default is MISSING and path not in given]
    if absent:
        words = [one.upper() if one in COMMANDS[name].words else f"--{one}" for one in absent]
        raise UsageError(f"missing {', '.join(words)}; `{program()} {name} --help` tells what it is")


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


def _with_its_file(line: str, keys: Mapping[str, str], given: set[str]) -> str:
    """A line about an option's value, with the config that it comes from, where no flag gave it."""
    about = line.partition(": ")[0]
    named = [key for key in keys if about == key or about.startswith(f"{key}.")]
    flagged = any(about == flag or about.startswith(f"{flag}.") for flag in given)
    return f"config: {keys[named[0]]}: {line}" if named and not flagged else line

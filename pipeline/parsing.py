"""Flags and YAML in, a command's options out; what is wrong with them in one line: where, what, and what exists."""

from __future__ import annotations

import json
import re
from argparse import SUPPRESS
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from pipeline.commands import COMMANDS
from pipeline.errors import UserError, did_you_mean
from pipeline.shipped import DEFAULT_CONFIG, find_config, program, shipped_configs

DEFAULT_COMMAND = "run"
CONFIG_HELP = "YAML file of options, or the name of one that comes with the project; flags override it."
KINDS = {  # as the parser names a type, and as a user would
    "list[int]": "a list of whole numbers, such as 3 or 3 4",
    "list[str]": "a list of texts",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
}

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class UsageError(UserError):
    """A flag, command or config key that is wrong by itself."""


def parse(name: str, words: Sequence[str]) -> object:
    """A command's options from its words on the command line.

    Raises:
        UsageError: in one line, with what exists, for an unknown command, flag or key, or a bad value.
    """
    if name not in COMMANDS:
        raise UsageError(
            f"command {name!r} does not exist{did_you_mean(name, COMMANDS)}; there is {', '.join(COMMANDS)}"
        )
    parser = build_parser(name)
    words = _normalized(parser, name, words)
    try:
        values = parser.parse_args(words)
        values.pop("config", None)
        return _made(COMMANDS[name].options, values.as_dict())
    except ArgumentError as error:
        line = _plain(parser, name, error)
    except UserError as error:
        line = str(error)
    raise UsageError(_with_its_file(line, words)) from None


def build_parser(name: str) -> ArgumentParser:
    """The parser of one command, its options flat and their groups nested."""
    command = COMMANDS[name]
    parser = ArgumentParser(
        prog=f"{program()} {name}",
        usage=_usage(name),
        description=command.help,
        exit_on_error=False,
        default_config_files=[shipped_configs()[DEFAULT_CONFIG]] if name == DEFAULT_COMMAND else [],
    )
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    parser.add_class_arguments(command.options, as_group=False)
    groups = _paths({flag for action in parser._actions for flag in action.option_strings})
    for action in parser._actions:
        if groups.intersection(action.option_strings):  # a group is given by its options, which follow
            action.help = SUPPRESS
        if "--print_config" in action.option_strings:
            action.help = "Show what all options come to, as a config, and end."
    return parser


def _usage(name: str) -> str:
    """A command with what it cannot do without; dozens of flags would be no usage."""
    command = COMMANDS[name]
    required = [f.name for f in fields(command.options) if f.default is MISSING and f.default_factory is MISSING]
    words = [word.upper() if word in required else f"[{word.upper()}]" for word in command.words]
    flags = [f"--{flag} {flag.upper()}" for flag in required if flag not in command.words]
    return " ".join([program(), name, *words, *flags, "[--config FILE] [--FLAG VALUE ...]"])


def _made(options: type, values: Mapping[str, Any], path: str = "") -> Any:
    """Options of a class, the groups among them first; an error names an option by its whole path."""
    given = {}
    for field in fields(options):
        value, group = values[field.name], field.default_factory
        if isinstance(value, dict) and isinstance(group, type):
            value = _made(group, value, f"{path}{field.name}.")
        given[field.name] = value
    try:
        return options(**given)
    except UsageError:
        raise
    except UserError as error:
        own = path.rstrip(".").rpartition(".")[2]  # a group's checks may name the group as well
        raise UsageError(path + str(error).removeprefix(f"{own}.")) from None


def _normalized(parser: ArgumentParser, name: str, words: Sequence[str]) -> list[str]:
    """Words in the one form that the parser takes; unknown flags, and flags without their value, are refused.

    `--top-k` becomes `--top_k`, a bare switch `--overwrite=true`, and words for a list one JSON list.
    """
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    groups = _paths(flags)
    configs: list[str] = []  # put first, so that flags override them wherever they stand
    result: list[str] = []
    rest = list(words)
    for word in COMMANDS[name].words:
        if rest and not rest[0].startswith("-"):
            result.append(f"--{word}={rest.pop(0)}")
    while rest:
        word = rest.pop(0)
        given, equals, value = word.partition("=")
        flag = given.replace("-", "_").replace("__", "--", 1)
        if given in ("-h", "--help"):
            return ["--help"]
        if not given.startswith("--") or (flag not in flags and flag not in groups):
            raise UsageError(_unknown(name, word if not given.startswith("--") else given, flags))
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if flag == "--print_config":
            result.append(word)
            continue
        kind = str(getattr(flags.get(flag), "_typehint", ""))
        values = _values(flag, kind, values)
        if flag == "--config":
            file = str(find_config(values[0]))
            _check_keys(file, flags)
            configs.append(f"{flag}={file}")
        else:
            result.append(f"{flag}={values[0]}")
        if len(values) > 1:
            raise UsageError(_unknown(name, values[1], flags))
    return configs + result


def _values(flag: str, kind: str, values: Sequence[str]) -> list[str]:
    """What stands behind a flag, a list's words as one.

    Raises:
        UsageError: when nothing does.
    """
    if "bool" in kind and not values:
        return ["true"]
    if "list[int]" in kind and values and not values[0].startswith("["):
        return [json.dumps([yaml.safe_load(one) for value in values for one in value.split(",")])]
    if "list[str]" in kind and values and not values[0].startswith("["):
        return [json.dumps(values)]
    if not values or not values[0]:
        what = (
            "a file"
            if flag == "--config"
            else next((text for one, text in KINDS.items() if one in kind), "a value")
        )
        raise UsageError(f"{flag.removeprefix('--')}: no value is given; expected {what}")
    return list(values)


def _unknown(name: str, word: str, flags: Mapping[str, object]) -> str:
    """What to say of a word that is no flag of this command, and no value of one."""
    listed = f"`{program()} {name} --help` lists them"
    if word.startswith("--"):
        hint = did_you_mean(word.replace("-", "_").replace("__", "--", 1), flags)
        return f"flag {word} does not exist{hint}; {listed}"
    taken = "".join(f"{one.upper()}, then " for one in COMMANDS[name].words)
    return f"{word!r} is not understood: {name} takes {taken}flags (--NAME VALUE); {listed}"


def _paths(flags: Iterable[str]) -> set[str]:
    """Names of option groups, such as --edit.finetune."""
    return {flag.rsplit(".", depth)[0] for flag in flags for depth in range(1, flag.count(".") + 1)}


def _check_keys(file: str, flags: Mapping[str, object]) -> None:
    """Refuse a YAML file with a key that is no option, naming the key and the closest option."""
    known = {f.removeprefix("--") for f, a in flags.items() if hasattr(a, "_typehint") and not f.endswith("+")}
    groups = _paths(known)
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config: {file}: malformed YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"config: {file}: expected a mapping of option names to values")
    for key, value in _flat(content):
        if key in groups - known and not isinstance(value, dict):
            raise UsageError(f"config: {file}: {_group(key, known)}")
        if key not in known | groups:
            group = key.rpartition(".")[0]
            there = sorted(one for one in known | groups if one.rpartition(".")[0] == group)
            raise UsageError(
                f"config: {file}: key {key!r} does not exist{did_you_mean(key, known)}; there is {', '.join(there)}"
            )
        kind = str(getattr(flags.get(f"--{key}"), "_typehint", "None"))
        if value is None and not re.search("None|Optional", kind):
            raise UsageError(f"config: {file}: {key}: expected {KINDS.get(_name(kind), 'a value')}, found nothing")


def _group(key: str, known: Iterable[str]) -> str:
    there = sorted(one for one in known if one.startswith(f"{key}."))
    return f"{key}: expected a mapping; there is {', '.join(there)}"


def _name(kind: str) -> str:
    return kind.removeprefix("<class '").removesuffix("'>")


def _flat(content: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


def _plain(parser: ArgumentParser, name: str, error: ArgumentError) -> str:
    """The parser's message in a user's words: the flag, what was given, and what it takes."""
    text = " ".join(str(error).split())
    if missing := re.search(r"arguments are required: (.*)", text):
        absent = missing.group(1).split(", ")
        words = [one.upper() if one in COMMANDS[name].words else f"--{one}" for one in absent]
        return f"missing {', '.join(words)}; `{program()} {name} --help` tells what it is"
    if group := re.search(r'Parser key "([^"]+)": Unable to load config', text):
        return _group(group.group(1), [action.dest for action in parser._actions])
    found = re.search(r'Parser key "([^"]+)".*(?:Got|Given) value: (.*)', text)
    if not found:
        return text
    key, given = found.groups()
    kind = next((str(getattr(a, "_typehint", "")) for a in parser._actions if a.dest == key), "")
    for type_name, what in KINDS.items():
        if type_name in kind:
            return f"{key}: {given.removeprefix('a ')} is not {what}"
    return text


def _with_its_file(line: str, words: Sequence[str]) -> str:
    """A line about an option's value, with the config that it comes from, where no flag gave it."""
    key = line.partition(": ")[0]
    file = next((word.partition("=")[2] for word in reversed(words) if word.startswith("--config=")), None)
    if file is None or line.startswith("missing ") or any(word.startswith(f"--{key}=") for word in words):
        return line
    content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    return f"config: {file}: {line}" if key in dict(_flat(content)) else line

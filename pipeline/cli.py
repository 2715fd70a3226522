"""The command line: parses flags and YAML, calls one command, turns user errors into one clear line.

Only jsonargparse and the option dataclasses are imported here; a command brings torch when it starts.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import sqlite3
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from pipeline.commands import COMMANDS
from pipeline.errors import UserError, did_you_mean
from pipeline.interrupts import interrupts
from pipeline.shipped import DEFAULT_CONFIG, about, find_config, program, shipped_configs

DEFAULT_COMMAND = "run"
USAGE_ERROR, FAILED = 2, 1

CONFIG_HELP = "YAML file of options, or the name of one that comes with the project; flags override it."
KINDS = {
    "list[int]": "a list of whole numbers",
    "list[str]": "a list of texts",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
}

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code: 0, 1 (failed), 2 (usage), 130 (Ctrl-C) or 143 (SIGTERM)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot show ends no command
            stream.reconfigure(errors="backslashreplace")
    with interrupts.heeding():
        return _run(words)


def _run(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words and words[0] == "--version":
        print(about())
        return 0
    name = words.pop(0) if words and not words[0].startswith("-") else DEFAULT_COMMAND
    verbose = any(word in ("--verbose", "--verbose=true") for word in words)
    try:
        options = parse(name, words)
        COMMANDS[name].function(options)
        sys.stdout.flush()
    except (SystemExit, KeyboardInterrupt) as leaving:
        by_signal = interrupts.noted or signal.SIGINT
        if isinstance(leaving, SystemExit) and not (
            interrupts.noted or isinstance(leaving.__context__, KeyboardInterrupt)
        ):
            return int(leaving.code or 0)  # --help and --print_config end here
        by = " by SIGTERM" if by_signal == signal.SIGTERM else ""
        print(f"interrupted{by}", file=sys.stderr)  # Lightning turns it into SystemExit
        return 128 + by_signal
    except BrokenPipeError:  # who reads what is printed has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        code = USAGE_ERROR if isinstance(error, UsageError) else FAILED
        line = user_line(error)
        processes = sys.modules.get("pipeline.model.processes")  # not there: there is this one alone
        several = processes is not None and processes.world_size() > 1
        if line is None and not several:
            raise
        told = processes is not None and processes.is_told()
        if not told:  # the first of several to fail tells
            if line is None or verbose:
                traceback.print_exc()
            if line is not None:
                print(f"error: {line}", file=sys.stderr)
        if processes is not None:
            processes.end(code, told)
        return code
    return 0


class UsageError(UserError):
    """A flag, command or config key that is wrong by itself."""


def user_line(error: Exception) -> str | None:
    """What to tell the user of an error in one line; None when it is a fault of ours, to be shown whole."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no room left on the disk while writing {error.filename or 'the output'}"
    if isinstance(error, sqlite3.OperationalError):
        return f"store: the database says: {error}"
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RuntimeError) and re.search("Connection (closed|reset) by peer|Broken pipe", str(error)):
        return "trainer: another process of this command has ended"
    if "No space left on device" in str(error) or "File too large" in str(error):  # raised inside libraries
        return "no room left on the disk while writing the output"
    return None


def overview() -> str:
    """The commands with a line each."""
    lines = [f"  {name:<10} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {program()} [COMMAND] [--config FILE] [--FLAG VALUE ...]",
            f"       {program()} COMMAND --help | --version",
            "",
            "Find the golden layer of a language model, edit facts there, prove it, keep it.",
            "",
            f"configs that come with the project: {', '.join(shipped_configs())}",
            "without a command: run, with the config default; the commands are",
            *lines,
        ]
    )


def build_parser(name: str) -> ArgumentParser:
    """The parser of one command, its options flat and their groups nested."""
    command = COMMANDS[name]
    parser = ArgumentParser(
        prog=f"{program()} {name}",
        description=command.help,
        exit_on_error=False,
        default_config_files=[shipped_configs()[DEFAULT_CONFIG]] if name == DEFAULT_COMMAND else [],
    )
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    parser.add_class_arguments(command.options, as_group=False)
    return parser


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
    try:
        words = _normalized(parser, name, words)
        values = parser.parse_args(words)
        values.pop("config", None)
        return COMMANDS[name].options(**parser.instantiate_classes(values).as_dict())
    except ArgumentError as error:
        raise UsageError(_plain(parser, error)) from None
    except UserError as error:
        raise UsageError(str(error)) from None


def _normalized(parser: ArgumentParser, name: str, words: Sequence[str]) -> list[str]:
    """Words in the one form that the parser takes; unknown flags are refused.

    `--top-k` becomes `--top_k`, a bare switch `--overwrite=true`, and words for a list one JSON list.
    """
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    configs: list[str] = []  # put first, so that flags override them wherever they stand
    result: list[str] = []
    rest = list(words)
    for word in COMMANDS[name].words:
        if rest and not rest[0].startswith("-"):
            result.append(f"--{word}={rest.pop(0)}")
    while rest:
        word = rest.pop(0)
        given, equals, value = word.partition("=")
        if not given.startswith("--"):
            result.append(word)
            continue
        flag = given.replace("-", "_").replace("__", "--", 1)
        if flag not in flags and flag not in _paths(flags):
            raise UsageError(
                f"flag {given} does not exist{did_you_mean(flag, flags)}; `{program()} {name} --help` lists them"
            )
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if flag == "--config" and values:
            values[0] = str(find_config(values[0]))
            _check_keys(values[0], flags)
        kind = str(getattr(flags.get(flag), "_typehint", ""))
        if "list[" in kind and values and not values[0].startswith("["):
            values = [json.dumps([yaml.safe_load(one) if "int" in kind else one for one in values])]
        if "bool" in kind and not values:
            values = ["true"]
        normalized = [f"{flag}={values[0]}", *values[1:]] if values else [flag]
        (configs if flag == "--config" else result).extend(normalized)
    return configs + result


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
            there = sorted(one for one in known if one.startswith(f"{key}."))
            raise UsageError(f"config: {file}: {key}: expected a mapping; there is {', '.join(there)}")
        if key not in known | groups:
            group = key.rpartition(".")[0]
            there = sorted(one for one in known | groups if one.rpartition(".")[0] == group)
            raise UsageError(
                f"config: {file}: key {key!r} does not exist{did_you_mean(key, known)}; there is {', '.join(there)}"
            )
        kind = str(getattr(flags.get(f"--{key}"), "_typehint", "None"))
        if value is None and not re.search("None|Optional", kind):
            raise UsageError(f"config: {file}: {key}: expected {KINDS.get(_name(kind), 'a value')}, found nothing")


def _name(kind: str) -> str:
    return kind.removeprefix("<class '").removesuffix("'>")


def _flat(content: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


def _plain(parser: ArgumentParser, error: ArgumentError) -> str:
    """The parser's message in a user's words: the flag, what was given, and what it takes."""
    text = " ".join(str(error).split())
    if missing := re.search(r"arguments are required: (.*)", text):
        return f"missing {', '.join('--' + name for name in missing.group(1).split(', '))}"
    found = re.search(r'Parser key "([^"]+)".*(?:Got|Given) value: (.*)', text)
    if not found:
        return text
    key, given = found.groups()
    kind = next((str(getattr(a, "_typehint", "")) for a in parser._actions if a.dest == key), "")
    for name, words in KINDS.items():
        if name in kind:
            return f"{key}: {given.removeprefix('a ')} is not {words}"
    return text

"""The command line: parses flags and YAML, calls one command, turns user errors into one clear line.

Only jsonargparse and the option dataclasses are imported here; a command brings torch when it starts.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from pipeline.commands import COMMANDS
from pipeline.errors import UserError

DEFAULT_COMMAND = "run"
DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "default.yaml"
USAGE_ERROR, FAILED, INTERRUPTED = 2, 1, 130

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code: 0, 1 (failed), 2 (usage) or 130 (interrupted)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in ("-h", "--help"):
        print(overview())
        return 0
    name = words.pop(0) if words and not words[0].startswith("-") else DEFAULT_COMMAND
    verbose = any(word in ("--verbose", "--verbose=true") for word in words)
    try:
        options = parse(name, words)
        COMMANDS[name].function(options)
    except SystemExit as leaving:  # --help and --print_config end here
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        line = user_line(error)
        if line is None:
            raise
        if verbose:
            traceback.print_exc()
        print(f"error: {line}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, UsageError) else FAILED
    return 0


class UsageError(UserError):
    """A flag, command or config key that is wrong by itself."""


def user_line(error: Exception) -> str | None:
    """What to tell the user of an error in one line; None when it is a fault of ours, to be shown whole."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no room left on the disk while writing {error.filename or 'the output'}"
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}"
    if "No space left on device" in str(error) or "File too large" in str(error):  # raised inside libraries
        return "no room left on the disk while writing the output"
    return None


def overview() -> str:
    """The commands with a line each."""
    lines = [f"  {name:<10} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python run.py [COMMAND] [--config FILE] [--FLAG VALUE ...]",
            "",
            "Find the golden layer of a language model, edit facts there, prove it, keep it.",
            "",
            "commands (COMMAND --help tells its flags; without a command: run, with configs/default.yaml)",
            *lines,
        ]
    )


def build_parser(name: str) -> ArgumentParser:
    """The parser of one command, its options flat and their groups nested."""
    command = COMMANDS[name]
    parser = ArgumentParser(
        prog=f"run.py {name}",
        description=command.help,
        exit_on_error=False,
        default_config_files=[DEFAULT_CONFIG] if name == DEFAULT_COMMAND else [],
    )
    parser.add_argument("--config", action="config", help="YAML file of options; flags override it.")
    parser.add_class_arguments(command.options, as_group=False)
    return parser


def parse(name: str, words: Sequence[str]) -> object:
    """A command's options from its words on the command line.

    Raises:
        UsageError: in one line, with what exists, for an unknown command, flag or key, or a bad value.
    """
    if name not in COMMANDS:
        raise UsageError(
            f"command {name!r} does not exist{_closest(name, COMMANDS)}; there is {', '.join(COMMANDS)}"
        )
    parser = build_parser(name)
    words = _normalized(parser, name, words)
    try:
        values = parser.parse_args(words)
        values.pop("config", None)
        return COMMANDS[name].options(**dict(_built(parser, values).items()))
    except ArgumentError as error:
        raise UsageError(_one_line(error)) from None
    except UserError as error:
        raise UsageError(str(error)) from None


def _built(parser: ArgumentParser, values: Namespace) -> dict[str, object]:
    """The parsed values with each nested group made into its dataclass."""
    return dict(vars(parser.instantiate_classes(values)))


def _normalized(parser: ArgumentParser, name: str, words: Sequence[str]) -> list[str]:
    """Words with `--top-k` as `--top_k` and bare switches as `--overwrite=true`; unknown names are refused."""
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    result: list[str] = []
    for position, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            result.append(word)
            continue
        flag = flag.replace("-", "_").replace("__", "--", 1)
        known = flag.removesuffix("+")
        if known not in flags and known not in _paths(flags):
            given = word.partition("=")[0]
            raise UsageError(
                f"flag {given} does not exist{_closest(flag, flags)}; `run.py {name} --help` lists them"
            )
        follows = words[position + 1] if position + 1 < len(words) else "--"
        switch = not equals and follows.startswith("--") and _is_switch(flags.get(known))
        result.append(f"{flag}=true" if switch else flag + equals + value)
        if flag == "--config":
            _check_keys(value if equals else follows, {one.removeprefix("--") for one in flags})
    return result


def _paths(flags: Iterable[str]) -> set[str]:
    """Names of option groups, such as --edit.finetune."""
    return {flag.rsplit(".", depth)[0] for flag in flags for depth in range(1, flag.count(".") + 1)}


def _is_switch(action: object) -> bool:
    return getattr(action, "_typehint", None) is bool or getattr(action, "type", None) is bool


def _check_keys(file: str, known: set[str]) -> None:
    """Refuse a YAML file with a key that is no option, naming the key and the closest option."""
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"config: {file}: no such file; expected a YAML file of options")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config: {file}: malformed YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"config: {file}: expected a mapping of option names to values")
    for key in _flat_keys(content):
        if key not in known and key not in _paths(known):
            group = key.rpartition(".")[0]
            there = sorted(
                one for one in known if one.rpartition(".")[0] == group and one not in ("help", "config")
            )
            raise UsageError(
                f"config: {file}: key {key!r} does not exist{_closest(key, known)}; there is {', '.join(there)}"
            )


def _flat_keys(content: dict[str, object], prefix: str = "") -> list[str]:
    keys = []
    for key, value in content.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys.extend(_flat_keys(value, f"{prefix}{key}."))
    return keys


def _closest(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

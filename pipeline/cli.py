"""The command line: calls one command, turns user errors into one clear line, and signals into exit codes.

What this imports brings no torch; a command does when it starts.
"""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sqlite3
import sys
import traceback
from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.parsing import DEFAULT_COMMAND, UsageError, parse
from pipeline.running import launch
from pipeline.running.interrupts import Interrupted, interrupts
from pipeline.shipped import about, program, shipped_configs
from pipeline.table import COMMANDS

USAGE_ERROR, FAILED = 2, 1


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
    name = words[0] if words and not words[0].startswith("-") else DEFAULT_COMMAND
    rest = words[1:] if words and words[0] == name else words
    try:
        options = parse(name, rest)
        if COMMANDS[name].spreads and launch.may_start_others(options):
            from pipeline.running.processes import devices_here

            devices = devices_here(options.trainer)  # type: ignore[attr-defined]
            if devices > 1:
                return launch.supervise([name, *rest], devices, options)
        COMMANDS[name].call(options)
        sys.stdout.flush()
    except SystemExit as leaving:
        return int(leaving.code or 0)  # --help and --print_config end here
    except Interrupted:
        return launch.leave(128 + (interrupts.noted or signal.SIGINT), launch.of_interrupt(interrupts.noted))
    except BrokenPipeError:  # who reads what is printed has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        line = user_line(error)
        if line is None and not launch.is_one_of_several():
            raise
        if line is None or "--verbose" in rest or "--verbose=true" in rest:
            traceback.print_exc()
        code = USAGE_ERROR if isinstance(error, UsageError) else FAILED
        return launch.leave(code, f"error: {line or error}")
    return 0


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
        return f"trainer: {launch.IN_ITS_WAKE}"
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

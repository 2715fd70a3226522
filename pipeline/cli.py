"""The command line: calls one command, turns user errors into one clear line, and signals into exit codes.

What this imports brings no torch; a command does when it starts.
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sqlite3
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only  # Lightning's own, without torch

from pipeline.errors import Note, UserError, one_line, terminal_text
from pipeline.options.shared import ComputeOptions
from pipeline.output import is_one_of_several
from pipeline.parsing import DEFAULT_COMMAND, parse
from pipeline.running import launch
from pipeline.running.interrupts import Interrupted, interrupts
from pipeline.shipped import about, program, shipped_configs
from pipeline.table import COMMANDS

USAGE_ERROR, FAILED = 2, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code: 0, 1 (failed), 2 (usage), 130 (Ctrl-C) or 143 (SIGTERM)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for each other stall on a busy machine
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT loads it: before any command does
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # whoever started this had closed it
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot read or show ends no command
            stream.reconfigure(errors="backslashreplace")
    with interrupts.heeding(), warnings.catch_warnings():
        warnings.simplefilter("default", Note)
        warnings.showwarning = show_warning
        return _run(words)


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """A note as one line, of the first process alone; libraries' warnings as they are."""
    if not issubclass(category, Note):
        text = warnings.formatwarning(message, category, filename, lineno)
    elif getattr(rank_zero_only, "rank", 0) == 0:
        text = f"note: {terminal_text(str(message))}"
    else:
        return
    print(text.rstrip(), file=sys.stderr)


def _run(words: list[str]) -> int:
    first = words[0] if words else ""
    name, rest = (DEFAULT_COMMAND, words) if first[:1] in ("", "-") else (first, words[1:])
    options: object = None
    try:
        if first in ("-h", "--help", "--version"):
            print(about() if first == "--version" else overview(), flush=True)
            return 0
        _check_working_folder()
        options = parse(name, rest)
        if isinstance(options, ComputeOptions) and launch.may_start_others(options):
            from pipeline.running.processes import devices_here
            from pipeline.running.trainer import hush

            hush(options.verbose)  # type: ignore[attr-defined]
            devices = devices_here(options.trainer)
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
        interrupts.postponing = True  # a signal that comes while this is told has nothing left to end
        line = user_line(error)
        if line is None and not is_one_of_several():
            raise
        if line is None or "--verbose" in rest or "--verbose=true" in rest:
            traceback.print_exc()
        return launch.leave(FAILED if options else USAGE_ERROR, f"error: {terminal_text(str(line or error))}")
    return 0


def _check_working_folder() -> None:
    """Raise UserError when the working folder is gone: torch would end the process over it."""
    try:
        Path.cwd()
    except OSError as error:
        raise UserError(f"the working folder is gone ({error.strerror}); change to one that exists") from None


def user_line(error: Exception) -> str | None:
    """What to tell the user of an error in one line; None when it is a fault of ours, to be shown whole."""
    if isinstance(error, UserError):
        return one_line(error)
    if re.search("No space left on device|File too large|quota exceeded", str(error)):  # libraries' errors, too
        return f"no room left on the disk while writing {getattr(error, 'filename', None) or 'the output'}"
    if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:
        return f"store: the database says: {error}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RuntimeError) and re.search("Connection (closed|reset) by peer|Broken pipe", str(error)):
        return f"trainer: {launch.IN_ITS_WAKE}"
    return None


def overview() -> str:
    """What `--help` says: the commands with a line each."""
    lines = "\n".join(f"  {name:<10} {command.help}" for name, command in COMMANDS.items())
    return f"""usage: {program()} [COMMAND] [--config FILE] [--FLAG VALUE ...]
       {program()} COMMAND --help | COMMAND --help-all | --version

Find the golden layer of a language model, edit facts there, prove it, keep it.

configs that come with the project: {", ".join(shipped_configs())}
without a command: run, with the config default; the commands are
{lines}"""

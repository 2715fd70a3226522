"""A newcomer's way, timed: `python -m benchmarks.newcomer --output DIR`.

The lines of the README's "Your facts, your model" are run as they stand there, in an empty folder and with nothing
kept from before: own facts, golden layer, edit, chat, which is asked for each fact. Then the base model is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench import run
from pipeline import UserError

ROOT = Path(__file__).parent.parent
MINUTES = 10.0
QUESTIONS = ("What is the capital of Indonesia?", "Who is the author of Hamlet?")  # for the README's facts


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="an empty folder, or the name of a new one")
    parser.add_argument("--model", default="smollm2", help="stands in the place of MODEL (default: %(default)s)")
    parser.add_argument("--flags", default="", help="further flags of `edit`")
    asked = parser.parse_args(words)
    asked.output.mkdir(parents=True, exist_ok=True)
    if any(asked.output.iterdir()):
        raise UserError(f"output: {asked.output} holds something already; name another folder")
    facts, commands = section()
    (asked.output / "facts.jsonl").write_text(facts, encoding="utf-8")
    wanted = [json.loads(line)["new_answer"] for line in facts.splitlines()]
    seconds, said = dict[str, float](), ""
    for command in commands:
        name, *flags = shlex.split(command.replace("MODEL", asked.model))[2:]
        if name == "edit":
            flags += shlex.split(asked.flags)
        started = time.perf_counter()
        said = spoken(asked.output, name, *flags)
        seconds[name] = time.perf_counter() - started
        print(f"{seconds[name]:6.0f} s  {command}", flush=True)
    base = spoken(asked.output, "chat", "--model", asked.model)
    holding = [sum(one in told for one in wanted) for told in (said, base)]
    print(f"{sum(seconds.values()) / 60:6.1f} minutes in all, at most {MINUTES:.0f} are asked for")
    print(f"{holding[0]} of {len(wanted)} new answers in the chat, {holding[1]} without the edit")
    print(said)


def section() -> tuple[str, list[str]]:
    """The facts and the commands of the README's section."""
    _, _, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your facts, your model")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", rest.partition("\n## ")[0], flags=re.DOTALL | re.MULTILINE)
    found = dict(blocks)
    return found["json"], found["bash"].splitlines()


def spoken(folder: Path, *words: str) -> str:
    """What a command prints, with the questions as what is typed; UserError when it fails."""
    home = {"HOME": str(folder.resolve()), "XDG_CACHE_HOME": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words],
        cwd=folder, env=os.environ | home, input="\n".join(QUESTIONS) + "\n", capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{words[0]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


if __name__ == "__main__":
    run(main)

"""The command that checks edit requests: without torch, unless a model is asked what it knows of them."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import write_whole
from pipeline.options.commands import RequestsCommand
from pipeline.requests.check import NAMED, check_requests, require_good, summary
from pipeline.requests.readers import load_requests
from pipeline.requests.writer import check_target, request_writer


def requests(options: RequestsCommand) -> None:
    """Check the requests, write them where that is asked for, and ask the model where one is named."""

    def check(partial: Path | None = None) -> None:
        with request_writer(partial, str(options.to).endswith(".gz")) as keep:
            found = check_requests(options.requests, options.limit, options.offset, keep)
        print(summary(found))
        require_good(found, options.skip_bad)

    if os.environ.get("LOCAL_RANK", "0") != "0":
        pass  # a process that another started for --model: the file is checked already
    elif options.to:
        check_target(Path(options.to), options.overwrite)
        own = f".{os.getpid()}"  # two commands may write the same file: the last one stays, whole
        print(f"written to {write_whole(Path(options.to), check, own)}")
    else:
        check()
    if options.model:
        _show_known(options)


def _show_known(options: RequestsCommand) -> None:
    """Which answers of the requests a model gives by itself, and which requests it cannot take."""
    from pipeline.evaluation.known import find_known
    from pipeline.reporting.terminal import say
    from pipeline.stages import load, prepare

    prepare(options)
    read = load_requests(options.requests, options.limit, options.offset, options.skip_bad, tell=lambda _: None)
    llm = load(options)
    known = find_known(llm, read, options.batch_size, options.trainer)
    say(f"{llm.name} gives {len(known.old)} of {known.asked} old answers, and {len(known.new)} new answers already")
    for reason in known.unusable[:NAMED]:
        say(f"bad: {reason}")
    if known.unusable:
        raise UserError(f"requests: {len(known.unusable)} of {len(read)} are none that {llm.name} can take")

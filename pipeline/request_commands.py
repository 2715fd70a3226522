"""The command that checks edit requests: without torch, unless a model is asked what it knows of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.editing.contexts import TAUGHT_CONTEXTS, chat_forms, plain_forms
from pipeline.errors import UserError
from pipeline.options.commands import RequestsCommand
from pipeline.requests.check import NAMED, check_requests, require_good, summary
from pipeline.requests.readers import Reading, good_requests, read_requests, write_requests
from pipeline.requests.schema import EditRequest


def requests(options: RequestsCommand) -> None:
    """Check the requests, write them where that is asked for, and ask the model where one is named."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # else a process that another started for --model
        _check(options)
    if options.model:
        _show_known(options)


def _check(options: RequestsCommand) -> None:
    to = Path(options.to) if options.to else None
    if to and to.is_dir():
        raise UserError(f"to: {to}: a folder; expected a file's name")
    if to and to.exists() and not options.overwrite:
        raise UserError(f"to: {to}: exists already; name another file or pass --overwrite")
    if to and not to.parent.is_dir():
        raise UserError(f"to: {to}: there is no folder {to.parent}")
    found = check_requests(options.requests, _readings(options))
    print(summary(found))
    require_good(found, options.skip_bad)
    if options.forms:
        for request in _good(options):
            print(f"{request.id}:")
            for text, answer in plain_forms(request, TAUGHT_CONTEXTS):
                print(f"  {text} {answer}")
            for text, answer in chat_forms(request):
                print(f"  user: {text} / assistant: {answer}")
    if to:
        print(f"written to {write_requests(to, _good(options))}")


def _readings(options: RequestsCommand) -> Iterator[Reading]:
    return read_requests(options.requests, options.limit, options.offset, options.fields)


def _good(options: RequestsCommand) -> Iterator[EditRequest]:
    return good_requests(_readings(options), bad=[])


def _show_known(options: RequestsCommand) -> None:
    from pipeline.evaluation.reading import find_known
    from pipeline.reporting.terminal import say
    from pipeline.stages import load, prepare

    prepare(options)
    read = list(_good(options))
    llm = load(options)
    known = find_known(llm, read, trainer=options.trainer)
    say(f"{llm.name} gives {len(known.old)} of {known.asked} old answers, and {len(known.new)} new answers already")
    for reason in known.unusable[:NAMED]:
        say(f"bad: {reason}")
    if known.unusable:
        raise UserError(f"requests: {len(known.unusable)} of {len(read)} are none that {llm.name} can take")

"""An export on the Hugging Face hub, under a branch of its own for each version."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi

from pipeline.errors import UserError, one_line

PRIVATE = ["options.yaml", "events.*"]  # name this machine's folders
TARGET = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")


def check_target(target: str) -> tuple[str, str | None]:
    """The repository and the branch that a target names; UserError for what is no target."""
    if found := TARGET.fullmatch(target):
        return found[1], found[2]
    raise UserError(f"push: {target}: expected hub:OWNER/NAME or hub:OWNER/NAME@BRANCH")


def push(folder: Path, target: str, branch: str = "main") -> str:
    """Upload a folder to the hub, and say where it is; the token is huggingface_hub's own (HF_TOKEN).

    A repository that does not exist is made, for its owner's eyes only. `branch` is where the target names none.
    UserError without a network, a token, or the right to write there; the folder stays.
    """
    repository, named = check_target(target)
    branch, api = named or branch, HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        if branch != "main":
            api.create_branch(repository, branch=branch, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, revision=branch, ignore_patterns=PRIVATE)
    except Exception as error:  # classes of whichever HTTP library the hub's own uses
        raise UserError(
            f"push: {repository}: {one_line(error)[:300]}; it takes a network, and a token with the right to write "
            f"there in HF_TOKEN; the export itself is in {folder}"
        ) from error
    return f"{api.endpoint}/{repository}/tree/{branch}"

"""Folders that others read: on the Hub, and on a shared disk."""

import os
from pathlib import Path

from huggingface_hub import HfApi


# What a run or a build leaves beside a checkpoint, adapter or corpus: locks, half-written files, intermediate
# checkpoints, copies for fast reading, and the parts of a LoRA run that get repositories of their own.
STAYS_HOME = ("_*", "*.lock", ".*.tmp*", ".cache/*", "cache/*", "checkpoint-*", "base/*", "adapter/*")


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload a folder to the Hub, except `STAYS_HOME`, into a repository that is made if it is missing.

    Returns:
        Full name of the repository, `owner/name`.
    """
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo, branch=revision, repo_type=repo_type, exist_ok=True)
    api.upload_folder(
        repo_id=repo,
        repo_type=repo_type,
        folder_path=folder,
        commit_message=f"Upload {Path(folder).name}",
        ignore_patterns=list(STAYS_HOME),
        revision=revision,
    )
    return repo


def let_others_read(folder: str | os.PathLike) -> None:
    """Give the weights in a folder the permissions of any new file: safetensors writes them for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in Path(folder).glob("*.safetensors"):
        path.chmod(0o666 & ~mask)

"""Folders on the Hub."""

import os
import shutil
from importlib.metadata import requires
from pathlib import Path

from huggingface_hub import HfApi
from packaging.requirements import Requirement


# What a run or a build leaves beside a checkpoint, adapter or corpus: locks, half-written files, intermediate
# checkpoints, copies for fast reading, and the parts of a LoRA run that get repositories of their own.
STAYS_HOME = ("_*", "*.lock", ".*.tmp*", ".cache/*", "cache/*", "checkpoint-*", ".checkpoint-*", "base/*", "adapter/*")


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload a folder to a repository of the Hub, created if missing; return the full name, `owner/name`.

    Files that match `STAYS_HOME` are skipped.
    """
    api = HfApi(token=token)
    # The browser page is a Gradio app, and `evaluate` loads metrics from Gradio Spaces.
    sdk = "gradio" if repo_type == "space" else None
    repo = api.create_repo(repo_id, repo_type=repo_type, private=private, space_sdk=sdk, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo, branch=revision, repo_type=repo_type, exist_ok=True)
    api.upload_folder(
        repo_id=repo,
        repo_type=repo_type,
        folder_path=str(folder),
        commit_message=f"Upload {Path(folder).name}",
        ignore_patterns=list(STAYS_HOME),
        revision=revision,
    )
    return repo


SPACE_CARD = """---
title: scMMGPT
sdk: gradio
app_file: app.py
models:
- {model}
license: apache-2.0
---

The page of scMMGPT: annotate, find, describe and generate single cells with `{model}`. The variable `SCMMGPT_MODEL` of
the Space names another checkpoint.
"""
SPACE_APP = '''"""Serve the page of scMMGPT."""

import os

from scmmgpt.app import main


os.environ.setdefault("SCMMGPT_MODEL", "{model}")
if __name__ == "__main__":
    main(["--host", "0.0.0.0"])
'''


def write_space(folder: str | os.PathLike, model: str) -> Path:
    """Write the folder of a Space that serves the browser page of the checkpoint `model`; return the folder.

    The folder has the modules of this package that the page needs, and the requirements of the installed package with
    the extra `app`. `push_folder(folder, "owner/page", repo_type="space")` uploads the folder. `python app.py` in the
    folder serves the page on this machine.
    """
    root, folder = Path(__file__).parents[2], Path(folder)
    patterns = ("*.py", "readers/*.py", "commands/*.py", "commands/templates/*")
    figures = ("eval/__init__.py", "eval/figures.py", "train/__init__.py", "train/curves.py")
    for path in (path for pattern in patterns + figures for path in root.glob(pattern)):
        copy = folder / "scmmgpt" / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    needed = [
        f"{line.name}{line.specifier}"
        for line in map(Requirement, requires("scmmgpt") or [])
        if line.marker is None or line.marker.evaluate({"extra": "app"})
    ]
    (folder / "app.py").write_text(SPACE_APP.format(model=model), encoding="utf-8")
    (folder / "README.md").write_text(SPACE_CARD.format(model=model), encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(sorted(needed)) + "\n", encoding="utf-8")
    return folder

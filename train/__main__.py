"""`python -m scmmgpt.train COMMAND`: prepare -> convert -> align (stage 1) -> tune (stage 2)."""

import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scmmgpt.commands.checkpoints import check_checkpoint
from scmmgpt.commands.errors import run_command, take_debug
from scmmgpt.commands.files import check_folder, check_paths, exists, obey_umask
from scmmgpt.commands.progress import log_if_slow
from scmmgpt.commands.storage import run_staged


ABOUT = {
    "prepare": "cells and annotations -> training corpus",
    "cache": "training corpus -> Arrow copy that streams faster",
    "convert": "published scGPT, causal LM or BERT -> initial parts of a model",
    "pretrain": "train or continue the cell model alone",
    "align": "stage 1: align cells and texts",
    "tune": "stage 2: describe and generate cells",
    "reinforce": "stage 3: reward descriptions that are true of their cells",
    "finetune": "train on your own labelled AnnData",
    "release": "build the checkpoint at the root of the repository",
    "plan": "memory per GPU that a configuration takes",
    "options": "write docs/options.md to the standard output",
}
CHECKPOINTS = ("aligned", "cell_model", "checkpoint")  # options that name checkpoints of this project
# Command -> module with `make_parser` and `main`, imported only when its command runs.
COMMANDS = {name: f"data.{name}" if name in ("prepare", "cache") else name for name in ABOUT}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    return run_staged("scmmgpt.train", sys.argv[1:] if argv is None else argv, run_words)


def run_words(argv: list[str]) -> int:
    """Run a command line whose paths are all local."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write("usage: python -m scmmgpt.train COMMAND ...\n\n")
        sys.stdout.writelines(f"  {name:<10}{about}\n" for name, about in ABOUT.items())
        return 0
    command, *rest = argv
    logging.basicConfig(format="%(message)s")
    logging.getLogger("scmmgpt").setLevel(logging.INFO)  # commands report by their log
    if command not in COMMANDS:
        sys.stderr.write(f"No command {command!r}; choose one of {', '.join(COMMANDS)}.\n")
        return 2
    words, debug = take_debug(rest)
    # Error messages name the files of the command, which are known once the command line is parsed.
    inputs: list[str] = []
    outputs: list[str] = []

    def work() -> None:
        with log_if_slow("Loading libraries"):
            module = importlib.import_module(f"scmmgpt.train.{COMMANDS[command]}")
        parser = module.make_parser(prog=f"python -m scmmgpt.train {command}")
        is_trainer = hasattr(parser, "parse_args_and_config")
        parts = parser.parse_args_and_config(words) if is_trainer else (parser.parse_args(words),)
        check_folders(parts, inputs, outputs)
        for part in parts:
            for name in CHECKPOINTS:
                if isinstance(given := getattr(part, name, None), str):
                    check_checkpoint(given)
        module.main(*parts)
        for folder in outputs:
            obey_umask(folder)

    return run_command(f"scmmgpt.train {command}", work, debug=debug, inputs=inputs, outputs=outputs)


def check_folders(parts: Sequence[Any], inputs: list[str], outputs: list[str]) -> None:
    """Append the paths of the arguments to `inputs` and `outputs`; refuse an output that is an input or read-only."""
    named: dict[str, list[str]] = {}
    for part in parts:
        is_trainer = hasattr(part, "output_dir")
        for name, value in vars(part).items():
            if name == ("output_dir" if is_trainer else "output"):
                outputs += [] if value is None else [str(value)]
            elif not is_trainer:
                words = value if isinstance(value, list | tuple) else [value]
                named[name] = [str(word) for word in words if isinstance(word, str | Path) and exists(Path(word))]
    inputs += [path for paths in named.values() for path in paths]
    for output in outputs:
        check_paths(named, {"the output": output})
        check_folder(output)


if __name__ == "__main__":
    sys.exit(main())

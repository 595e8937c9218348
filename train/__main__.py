"""`python -m scmmgpt.train COMMAND`: prepare -> convert -> align (stage 1) -> tune (stage 2)."""

import importlib
import logging
import sys


ABOUT = {
    "prepare": "cells and annotations -> training corpus",
    "cache": "training corpus -> a copy of it that streams faster",
    "convert": "published scGPT, causal LM or BERT -> the parts that a model starts from",
    "pretrain": "train or continue the cell model alone",
    "align": "stage 1: align cells and texts",
    "tune": "stage 2: describe cells and generate them",
    "finetune": "train for your own labelled AnnData",
    "plan": "memory per GPU that a configuration takes",
    "options": "write docs/options.md to the standard output",
}
# Command -> module with `make_parser` and `main`, imported only when its command runs.
COMMANDS = {name: f"data.{name}" if name in ("prepare", "cache") else name for name in ABOUT}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
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
    module = importlib.import_module(f"scmmgpt.train.{COMMANDS[command]}")
    parser = module.make_parser(prog=f"python -m scmmgpt.train {command}")
    try:
        if hasattr(parser, "parse_args_and_config"):
            module.main(*parser.parse_args_and_config(rest))
        else:
            module.main(parser.parse_args(rest))
    except (ValueError, TypeError, OSError, ImportError) as error:
        if "--debug" in rest:
            raise
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

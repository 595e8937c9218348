"""`python -m scmmgpt.eval annotation|description|finetuning|generation|report|zeroshot`: judge outputs."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence


# Imported when asked for: a task must not need the libraries of another.
COMMANDS = {
    "annotation": "scmmgpt.eval.annotation",
    "description": "scmmgpt.eval.description",
    "finetuning": "scmmgpt.eval.finetuning",
    "generation": "scmmgpt.eval.generation",
    "report": "scmmgpt.eval.report",
    "zeroshot": "scmmgpt.eval.zeroshot",
}


def task_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every task has."""
    parser = argparse.ArgumentParser(prog=f"python -m scmmgpt.eval {command}", description=description)
    parser.add_argument("--corpus", required=True, help="corpus folder, whose train split feeds the baselines")
    parser.add_argument("--label-key", default="cell_type", help="column of true types in the corpus (%(default)s)")
    parser.add_argument("--output", required=True, help="JSON file to write; the report: a folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to the task; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in COMMANDS:
        parser = argparse.ArgumentParser(prog="python -m scmmgpt.eval", description=__doc__)
        parser.add_argument("command", choices=COMMANDS)
        parser.parse_args(argv[:1])
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("scmmgpt").setLevel(logging.INFO)
    try:
        return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())

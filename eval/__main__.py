"""`python -m scmmgpt.eval TASK`: evaluate a checkpoint, or a method beside its baselines."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence


COMMANDS = (
    "annotation",
    "crossdata",
    "description",
    "finetuning",
    "generation",
    "report",
    "zeroshot",
)  # modules of scmmgpt.eval


def main(argv: Sequence[str] | None = None) -> int:
    """Run the task and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in COMMANDS:
        parser = argparse.ArgumentParser(prog="python -m scmmgpt.eval", description=__doc__)
        parser.add_argument("command", choices=COMMANDS)
        parser.parse_args(argv[:1])
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("scmmgpt").setLevel(logging.INFO)
    try:
        # A task is imported when it runs, because other tasks do not need its libraries.
        return importlib.import_module(f"scmmgpt.eval.{argv[0]}").main(argv[1:])
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())

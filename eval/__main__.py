"""`python -m scmmgpt.eval TASK`: evaluate a checkpoint, or a method beside its baselines."""

import importlib
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from scmmgpt.commands.errors import OneLineParser, run_command, take_debug
from scmmgpt.commands.files import check_folder, check_paths, exists
from scmmgpt.commands.progress import log_if_slow


# Modules of scmmgpt.eval. Modules of `WITH_FOLDERS` write a folder, other modules a JSON file.
COMMANDS = tuple(
    "ablation abstention all annotation audit clustering condition crossdata description evidence finetuning "
    "generation learning_curve proof report zeroshot".split()
)
WITH_FOLDERS = ("all", "audit", "crossdata", "finetuning", "learning_curve", "report", "zeroshot")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the task and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in COMMANDS:
        parser = OneLineParser(prog="python -m scmmgpt.eval", description=__doc__)
        parser.add_argument("command", choices=COMMANDS)
        parser.parse_args(argv[:1])
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("scmmgpt").setLevel(logging.INFO)
    words, debug = take_debug(argv[1:])
    outputs = [output for word, output in itertools.pairwise(words) if word == "--output"]
    inputs = [word for word in words if word not in outputs and exists(Path(word))]

    def work() -> int:
        for output in outputs:
            check_paths({"file": inputs}, {"--output": output})
            check_folder(output if argv[0] in WITH_FOLDERS else Path(output).absolute().parent)
            if argv[0] not in WITH_FOLDERS and Path(output).is_dir():
                raise ValueError(f"The output {output!r} is a folder; name a file.")
        # A task is imported when it runs, because other tasks do not need its libraries.
        with log_if_slow("Loading libraries"):
            task = importlib.import_module(f"scmmgpt.eval.{argv[0]}")
        return task.main(words)

    name = f"scmmgpt.eval {argv[0]}"
    return run_command(name, work, debug=debug, inputs=inputs, outputs=outputs, extra="eval")


if __name__ == "__main__":
    sys.exit(main())

"""What the tasks of `python -m scmmgpt.eval` share: arguments, and the way from a corpus to a table and a file."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scmmgpt.eval.cells import LabelledCells, read_splits
from scmmgpt.eval.results import format_table
from scmmgpt.files import write_json


def task_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the arguments of every task that evaluates on a corpus."""
    parser = argparse.ArgumentParser(prog=f"python -m scmmgpt.eval {command}", description=description)
    parser.add_argument("--corpus", required=True, help="corpus folder; its train split feeds the baselines")
    parser.add_argument("--label-key", default="cell_type", help="column of true types in the corpus (%(default)s)")
    parser.add_argument("--output", required=True, help="JSON file to write; for the report: a folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random draws (%(default)s)")
    return parser


def run_task(
    parser: argparse.ArgumentParser,
    evaluate: Callable[[argparse.Namespace, LabelledCells, LabelledCells], dict],
    argv: Sequence[str] | None,
) -> int:
    """Run the command line of one task: print its table and write its JSON.

    Args:
        parser: From `task_parser`, with the arguments of the task itself.
        evaluate: Arguments, training cells and test cells of the corpus -> the result.
        argv: The command line; that of the process where `None`.
    """
    args = parser.parse_args(argv)
    result = evaluate(args, *read_splits(args.corpus, label_key=args.label_key))
    sys.stdout.write(format_table(result))
    write_json(args.output, result)
    return 0


def training_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the arguments of every task that trains systems on a file of labelled cells itself."""
    parser = argparse.ArgumentParser(prog=f"python -m scmmgpt.eval {command}", description=description)
    parser.add_argument("--adata", required=True, help="labelled cells with counts in X")
    parser.add_argument("--label-key", default="cell_type", help="column of obs with the labels (%(default)s)")
    parser.add_argument("--output", required=True, help="folder for results.json, table.md and what else is made")
    parser.add_argument("--test-share", type=float, default=0.25, help="share of the cells to test on (%(default)s)")
    return parser


def read_runs(path: Path, about: dict) -> list[dict]:
    """The runs that an earlier call left in `results.json`, none where there is no such file.

    Raises:
        ValueError: If they are of other cells or options than `about` says.
    """
    if not path.is_file():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    if any(document[name] != value for name, value in about.items()):
        raise ValueError(f"{path} is of other cells or options; give another --output.")
    return document["runs"]

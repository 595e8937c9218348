"""Shared code of the tasks of `python -m scmmgpt.eval`: arguments, splits and files."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

from scmmgpt.commands.errors import OneLineParser, number
from scmmgpt.commands.files import write_json
from scmmgpt.commands.progress import log_if_slow
from scmmgpt.eval.cells import LabelledCells, read_splits
from scmmgpt.eval.results import markdown_table


def task_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Make a parser with the arguments of all tasks that evaluate on a corpus."""
    parser = OneLineParser(prog=f"python -m scmmgpt.eval {command}", description=description)
    parser.add_argument("--corpus", required=True, help="corpus folder; baselines are fitted to its train split")
    parser.add_argument("--label-key", default="cell_type", help="column of true types in the corpus (%(default)s)")
    parser.add_argument("--output", required=True, help="JSON file to write; for the report: a folder")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="seed of all random draws (%(default)s)")
    return parser


def run_task(
    command: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    evaluate: Callable[[argparse.Namespace, LabelledCells, LabelledCells], dict],
    argv: Sequence[str] | None,
) -> int:
    """Run the command line of one task: print the table of the result, and write the result as JSON.

    Args:
        command: Name of the task.
        description: First line of the help.
        add_arguments: Adds the arguments of the task to a parser.
        evaluate: Function of the parsed arguments, the training cells and the held-out cells of the corpus.
        argv: Words of the command line; default: `sys.argv[1:]`.

    Returns:
        Exit status.
    """
    parser = task_parser(command, description)
    add_arguments(parser)
    parser.add_argument(
        "--split",
        choices=("validation", "test"),
        default="test",
        help="held-out cells: choose settings on validation, and look at test once (%(default)s)",
    )
    args = parser.parse_args(argv)
    with log_if_slow(f"Evaluating on {args.corpus}"):
        result = evaluate(args, *read_splits(args.corpus, label_key=args.label_key, held_out=args.split))
    sys.stdout.write(markdown_table(result))
    write_json(args.output, result)
    return 0


def training_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Make a parser with the arguments of all tasks that train systems on a file of labelled cells."""
    parser = OneLineParser(prog=f"python -m scmmgpt.eval {command}", description=description)
    parser.add_argument("--adata", required=True, help="labelled cells with counts in X, or a corpus")
    parser.add_argument("--label-key", default="cell_type", help="column of obs with the labels (%(default)s)")
    parser.add_argument("--output", required=True, help="folder for results.json, table.md and other results")
    parser.add_argument(
        "--test-share",
        type=number(float, 0, 1, above=True),
        default=0.25,
        help="share of the cells to test on (%(default)s)",
    )
    return parser


def split_rows(labels: np.ndarray, *, test_share: float, seed: int = 0) -> list[np.ndarray]:
    """Split rows into training and test rows, stratified by label; both ascending."""
    parts = train_test_split(np.arange(len(labels)), test_size=test_share, stratify=labels, random_state=seed)
    return [np.sort(rows) for rows in parts]


def read_runs(path: Path, about: dict) -> list[dict]:
    """Read the runs of an earlier call from its `results.json`; empty if the file does not exist.

    Raises:
        ValueError: If the earlier call had other cells or options than `about`.
    """
    if not path.is_file():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    if any(document.get(name) != value for name, value in about.items()):
        raise ValueError(f"{path} holds runs with other cells or options. Give another --output.")
    return document["runs"]

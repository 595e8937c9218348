"""Evaluate abstention: accuracy on cells of known types, and `Unknown` labels for cells of new types.

```
python -m scmmgpt.eval abstention --model CHECKPOINT --known held_out.h5ad --new other_tissue.h5ad --output out.json
python -m scmmgpt.eval abstention --data ../shared/data --output out.json
```

* Known cells: accuracy (`Unknown` is wrong), share of `Unknown`, accuracy of the other cells, and expected calibration
  error of the score.
* New cells: share of `Unknown`, and AUROC of `novelty`, and of the baseline `1 - score`, for new against known cells.
* If the checkpoint stores thresholds of label sets: coverage and mean size of the label sets, by error rate.

With `--data`, no checkpoint is loaded. `eval.left_out` leaves datasets or labels out of the training of `train
release`; `eval.candidates` leaves types out of the candidates.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from scmmgpt.commands.errors import OneLineParser
from scmmgpt.eval.candidates import leave_candidates_out
from scmmgpt.eval.cells import labelled_rows
from scmmgpt.eval.left_out import evaluate_left_out
from scmmgpt.eval.metrics.cell_type_annotation.cell_type_annotation import expected_calibration_error
from scmmgpt.eval.task import write_result
from scmmgpt.labels_scmmgpt import UNKNOWN
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.readers.cell_files import read_file


ERROR_RATES = (0.01, 0.05, 0.1, 0.2)
# Unit to leave out of `--data` -> options that do not apply.
UNUSED: dict[str, tuple[str, ...]] = {
    "datasets": (),
    "labels": ("genes", "together"),
    "candidates": ("genes", "together", "alone"),
}


def evaluate_abstention(pipeline: ScMMGPTPipeline, known: Any, new: Any, label_key: str) -> dict[str, Any]:
    """Annotate held-out cells of known types and cells of new types by a checkpoint of `finetune` or `calibrate`.

    Known cells without a type in `obs[label_key]` are left out. The result is JSON-able: `known` and `new`, each with
    `n_cells` and the measures of the module's docstring.
    """
    known, truth = labelled_rows(known, label_key)
    if not len(truth):
        raise ValueError(f"No known cell has a {label_key!r}. Name the column of the true types.")
    of_known, of_new = (pipeline.annotate(cells).obs for cells in (known, new))
    for name, obs in (("known", of_known), ("new", of_new)):
        if "scmmgpt_novelty" not in obs or obs["scmmgpt_novelty"].isna().any():
            raise ValueError(
                f"The {name} cells have no novelty score: the checkpoint stores no statistics for it (run `finetune` "
                "or `calibrate`), or the file measures too few genes of the checkpoint."
            )
    predicted = np.asarray(of_known["scmmgpt_cell_type"], dtype=str)
    answered, right = predicted != UNKNOWN, predicted == truth
    is_new = np.repeat([False, True], [len(of_known), len(of_new)])
    novelty, score = (np.concatenate([of_known[n], of_new[n]]) for n in ("scmmgpt_novelty", "scmmgpt_score"))
    return {
        "known": {
            "n_cells": len(right),
            "accuracy": float(right.mean()),
            "unknown": float((~answered).mean()),
            "accuracy_of_answers": float(right[answered].mean()) if answered.any() else None,
            "label_sets": coverage_of_sets(pipeline, known, truth),
            "calibration_error": expected_calibration_error(np.asarray(of_known["scmmgpt_score"], float), right),
        },
        "new": {
            "n_cells": len(of_new),
            "unknown": float((np.asarray(of_new["scmmgpt_cell_type"], dtype=str) == UNKNOWN).mean()),
            "auroc_novelty": float(roc_auc_score(is_new, novelty)),
            "auroc_score": float(roc_auc_score(is_new, 1 - score)),
        },
    }


def coverage_of_sets(pipeline: ScMMGPTPipeline, known: Any, truth: np.ndarray) -> dict[str, dict[str, float]]:
    """Error rate -> `coverage` and `mean_size` of the label sets; empty if the checkpoint has no thresholds."""
    if not (pipeline.model.config.annotation or {}).get("label_sets"):
        return {}
    by_rate = {}
    for error_rate in ERROR_RATES:
        sets = [text.split(" | ") for text in pipeline.annotate(known, error_rate=error_rate).obs["scmmgpt_label_set"]]
        covered = [label in labels for label, labels in zip(truth, sets, strict=True)]
        sizes = [len(labels) for labels in sets]
        by_rate[str(error_rate)] = {"coverage": float(np.mean(covered)), "mean_size": float(np.mean(sizes))}
    return by_rate


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = OneLineParser(prog="python -m scmmgpt.eval abstention", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint of `finetune` or `calibrate`")
    parser.add_argument("--known", help="file of held-out cells of known types")
    parser.add_argument("--new", help="file of cells of other types")
    parser.add_argument("--label-key", default="cell_type", help="obs column of the known types (%(default)s)")
    parser.add_argument("--data", help="folder of the files of `train release`, instead of --model")
    parser.add_argument("--leave-out", choices=UNUSED, default="datasets", help="unit, with --data (%(default)s)")
    parser.add_argument("--genes", type=int, help="annotate with this number of the most variable genes of a dataset")
    parser.add_argument("--alone", action="store_true", help="annotate each cell alone, without its dataset")
    parser.add_argument(
        "--together", nargs="+", default=(), help="datasets to leave out together, for example all of a tissue"
    )
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(argv)
    for option in UNUSED[args.leave_out]:
        if getattr(args, option):
            raise ValueError(f"--leave-out {args.leave_out} does not take --{option}; leave it out.")
    if args.data and args.leave_out == "candidates":
        result = leave_candidates_out(args.data)
    elif args.data:
        result = evaluate_left_out(args.data, args.leave_out, args.together, args.genes, args.alone)
    elif args.model and args.known and args.new:
        pipeline = ScMMGPTPipeline.from_pretrained(args.model)
        result = evaluate_abstention(pipeline, read_file(args.known), read_file(args.new), args.label_key)
    else:
        raise ValueError("Give --model, --known and --new, or --data.")
    return write_result(result, args.output)

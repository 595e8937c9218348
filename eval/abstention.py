"""Evaluate abstention: labels of cells of known types, and abstention for cells of new types.

```
python -m scmmgpt.eval abstention --model CHECKPOINT --known held_out.h5ad --new other_tissue.h5ad --output out.json
python -m scmmgpt.eval abstention --data ../shared/data --output out.json
```

Known cells: accuracy (a cell without a label is wrong), share without a label, accuracy of the others, and expected
calibration error of the score. New cells: share without a label, and the area under the ROC curve of `novelty` and of
`1 - score`, the baseline, for separating new cells from known ones. Of a checkpoint with held-out cells, the share of
known cells whose set of labels has the true one, and the mean size of a set, by error rate.

With `--data` nothing is loaded: `eval.left_out` leaves datasets and labels out of the annotation of `train release`,
and `eval.candidates` types out of the candidates.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from scmmgpt.commands.errors import OneLineParser
from scmmgpt.commands.files import write_json
from scmmgpt.eval.candidates import leave_candidates_out
from scmmgpt.eval.left_out import evaluate_left_out
from scmmgpt.eval.metrics.cell_type_annotation.cell_type_annotation import expected_calibration_error
from scmmgpt.labels_scmmgpt import UNKNOWN
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.readers.cell_files import read_file
from scmmgpt.train.labels import column_of


ERROR_RATES = (0.01, 0.05, 0.1, 0.2)
# What may be left out of `--data`, and the options that do not apply to it.
UNUSED: dict[str, tuple[str, ...]] = {
    "datasets": (),
    "labels": ("genes", "together"),
    "candidates": ("genes", "together", "alone"),
}


def evaluate_abstention(pipeline: ScMMGPTPipeline, known: Any, new: Any, label_key: str) -> dict[str, Any]:
    """Annotate both AnnData and compare.

    Args:
        pipeline: A checkpoint of `finetune` or `calibrate`, which stores what novelty needs.
        known: Held-out cells of known types, with their types in `obs[label_key]`; cells without one are left out.
        new: Cells of other types.

    Returns:
        JSON-able dict: `known` and `new`, see the module, with `n_cells`.

    Raises:
        ValueError: If `known` has no such column, or the checkpoint cannot judge novelty in these files.
    """
    truth = column_of(known.obs, label_key)  # cleaned, as `finetune` reads them
    labelled = truth != None  # noqa: E711 (elementwise)
    if not labelled.any():
        raise ValueError(f"No known cell has a {label_key!r}. Name the column of the true types.")
    known, truth = known[labelled].copy(), truth[labelled].astype(str)
    of_known, of_new = (pipeline.annotate(cells).obs for cells in (known, new))
    for name, obs in (("known", of_known), ("new", of_new)):
        if "scmmgpt_novelty" not in obs or obs["scmmgpt_novelty"].isna().any():
            raise ValueError(
                f"Novelty of the {name} cells cannot be judged: the checkpoint stores nothing for it (run `finetune` "
                "or `calibrate`), or the file measures too few of its genes."
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
    """Error rate -> `coverage` and `mean_size` of the sets of labels; empty if the checkpoint has none."""
    if not (pipeline.model.config.annotation or {}).get("label_sets"):
        return {}
    found = {}
    for error_rate in ERROR_RATES:
        sets = [text.split(" | ") for text in pipeline.annotate(known, error_rate=error_rate).obs["scmmgpt_label_set"]]
        covered = [label in labels for label, labels in zip(truth, sets, strict=True)]
        sizes = [len(labels) for labels in sets]
        found[str(error_rate)] = {"coverage": float(np.mean(covered)), "mean_size": float(np.mean(sizes))}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = OneLineParser(prog="python -m scmmgpt.eval abstention", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint of `finetune` or `calibrate`")
    parser.add_argument("--known", help="file of held-out cells of known types")
    parser.add_argument("--new", help="file of cells of other types")
    parser.add_argument("--label-key", default="cell_type", help="obs column of the known types (%(default)s)")
    parser.add_argument("--data", help="in place of a model: folder of the files of `train release`")
    parser.add_argument("--leave-out", choices=UNUSED, default="datasets", help="unit, with --data (%(default)s)")
    parser.add_argument("--genes", type=int, help="number of the most variable genes that a dataset keeps")
    parser.add_argument("--alone", action="store_true", help="judge each cell without the others of its dataset")
    parser.add_argument("--together", nargs="+", default=(), help="datasets to leave out together, such as a tissue's")
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
    if args.output:
        write_json(args.output, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0

"""Cell type annotation: accuracy, macro and weighted F1, balanced accuracy and calibration, from scikit-learn.

Averages run over the types that are present in the truth. A predicted type that never occurs is not a class:
it lowers the recall of the true types.

>>> import evaluate
>>> metric = evaluate.load("eval/metrics/cell_type_annotation")                                       # doctest: +SKIP
>>> metric.compute(predictions=["B", "T"], references=["B", "NK"], confidences=[0.9, 0.6])            # doctest: +SKIP
"""

from collections.abc import Sized
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import precision_recall_fscore_support


CITATION = """@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017}
}"""
N_BINS = 15  # bins of the calibration error, as in Guo et al. 2017


def annotation_scores(
    predictions: ArrayLike, references: ArrayLike, confidences: ArrayLike | None = None
) -> dict[str, float]:
    """Score predicted cell types.

    Args:
        predictions: Predicted labels, shape `(n_cells,)`.
        references: True labels, shape `(n_cells,)`.
        confidences: Confidence in [0, 1] of each prediction, or `None`.

    Returns:
        `accuracy`, `macro_f1`, `weighted_f1`, `balanced_accuracy` (mean recall of the true types), and `ece`.
    """
    predictions, references = np.asarray(predictions).astype(str), np.asarray(references).astype(str)
    _check_pairs(predictions, references)
    labels = np.unique(references)
    _, recall, f1, support = precision_recall_fscore_support(references, predictions, labels=labels, zero_division=0)
    scores = {
        "accuracy": float(np.mean(predictions == references)),
        "macro_f1": float(f1.mean()),
        "weighted_f1": float(np.average(f1, weights=support)),
        "balanced_accuracy": float(recall.mean()),
    }
    if confidences is not None:
        n_confidences = len(np.asarray(confidences))
        if n_confidences != len(references):
            raise ValueError(f"Got {n_confidences} confidences for {len(references)} cells; give one for each.")
        scores["ece"] = expected_calibration_error(confidences, predictions == references)
    return scores


def expected_calibration_error(confidences: ArrayLike, correct: ArrayLike) -> float:
    """Expected calibration error over `N_BINS` bins of equal width, weighted by the cells of a bin.

    Confidences in [0, 1] and `correct`, whether each prediction is right, are `(n_cells,)`.
    """
    confidences, correct = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if not np.all((confidences >= 0) & (confidences <= 1)):
        wrong = confidences[~((confidences >= 0) & (confidences <= 1))][0]
        raise ValueError(
            f"Expected confidences between 0 and 1, but found {wrong}. Pass probabilities, not scores or percentages."
        )
    bins = np.minimum((confidences * N_BINS).astype(int), N_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidences)
    return float(np.abs(gaps).sum() / len(confidences))


def _check_pairs(predictions: Sized, references: Sized) -> None:
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            f"Expected one prediction for each true label, but got {len(predictions)} predictions "
            f"for {len(references)} labels."
        )


class CellTypeAnnotation(evaluate.Metric):
    """`evaluate` module around `annotation_scores`; types are names or integer codes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=annotation_scores.__doc__,
            features=[
                datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value(kind)))
                for kind in ("string", "int64")
            ],
        )

    def add_batch(
        self, *, predictions: Any = None, references: Any = None, confidences: Any = None, **options: Any
    ) -> None:
        """Add a batch; give `confidences` with every batch or with none."""
        lists = {"predictions": np.asarray(predictions).tolist(), "references": np.asarray(references).tolist()}
        _check_pairs(**lists)  # `evaluate` takes the type of a column from its first entry
        # `evaluate` has no optional columns, so confidences are kept outside its table.
        self.confidences = getattr(self, "confidences", [])
        self.confidences.extend([] if confidences is None else np.asarray(confidences, dtype=np.float64).tolist())
        super().add_batch(**lists, **options)

    def add(self, *, prediction: Any = None, reference: Any = None, confidence: Any = None, **options: Any) -> None:
        """Add one cell."""
        confidences = None if confidence is None else [confidence]
        self.add_batch(predictions=[prediction], references=[reference], confidences=confidences, **options)

    def _compute(self, predictions: list, references: list, confidences: ArrayLike | None = None) -> dict[str, float]:
        added, self.confidences = getattr(self, "confidences", []), []
        if confidences is None and added:
            confidences = added
        return annotation_scores(predictions, references, confidences)

"""Retrieval of texts by cells, and of cells by texts. Every item of the query's type is relevant.

Ties count against a system, so that constant scores have recall 0.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score

from scmmgpt.eval import results


KS = (1, 5, 10)
DIRECTIONS = {"cell_to_text": "cell to text", "text_to_cell": "text to cell"}
MEASURES = {
    f"{direction}_{name}": results.Measure(f"{title}, {words}", True, about)
    for direction, title in DIRECTIONS.items()
    for name, words, about in (
        ("map", "mAP", "Mean average precision over queries; all items of the query's type are relevant."),
        *((f"recall_{k}", f"recall@{k}", f"Share of queries with a relevant item among the first {k}.") for k in KS),
    )
}


def evaluate_retrieval(
    similarities: Mapping[str, np.ndarray], cell_types: ArrayLike, text_types: ArrayLike, *, seed: int = 0
) -> dict:
    """Score the similarities `(n_cells, n_texts)` of each system, ours under `results.MODEL_NAME`.

    The seed is that of the bootstrap over queries, and of the system "random order".

    Returns:
        JSON-able dict: `measures`, `rows`, `comparisons` (see `results.tabulate`), `n_cells` and `n_texts`.
    """
    right = np.asarray(cell_types).astype(str)[:, None] == np.asarray(text_types).astype(str)
    rng = np.random.default_rng(seed)
    first = next(iter(similarities.values()))
    systems = {**similarities, "random order": rng.random(first.shape)}
    estimates: dict[str, dict[str, results.Estimate]] = {system: {} for system in systems}
    for direction, truth in zip(DIRECTIONS, (right, right.T), strict=True):
        draws = results.bootstrap_draws(len(truth), seed=seed)
        for system, scores in systems.items():
            for name, values in score_queries(scores if truth is right else scores.T, truth).items():
                estimates[system][f"{direction}_{name}"] = results.mean_estimate(values, draws)
    roles = dict.fromkeys(systems, results.BASELINE) | {results.MODEL_NAME: results.MODEL}
    roles["random order"] = results.CONTROL
    result = {"task": "retrieval"} | results.tabulate(MEASURES, roles, estimates)
    sizes = dict(zip(("n_cells", "n_texts"), right.shape, strict=True))
    return result | sizes | {"n_resamples": results.N_RESAMPLES, "seed": seed}


def score_queries(scores: np.ndarray, right: np.ndarray) -> dict[str, np.ndarray]:
    """Compute average precision and recall at k of each query, `(n_queries,)`, from scores `(n_queries, n_items)`.

    `right` tells which items are relevant, bool `(n_queries, n_items)`; every query needs a relevant item.

    >>> scores = np.array([[0.9, 0.5, 0.1], [0.2, 0.2, 0.2]])
    >>> measured = score_queries(scores, np.array([[False, True, True], [True, False, False]]))
    >>> [[round(float(value), 2) for value in measured[name]] for name in ("map", "recall_1", "recall_5")]
    [[0.58, 0.33], [0.0, 0.0], [1.0, 1.0]]
    """
    precision = [average_precision_score(truth, row) for truth, row in zip(right, scores, strict=True)]
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    rank = ((scores >= best) & ~right).sum(axis=1)
    return {"map": np.array(precision)} | {f"recall_{k}": (rank < k).astype(float) for k in KS}

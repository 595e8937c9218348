r"""Evaluate the search for cells in a condition by a text, with training cells of other types or with none.

```
python -m scmmgpt.eval condition --adata cells.h5ad --condition-key condition --condition "IFN-beta stimulated" \
    --text "stimulated with interferon" --gene-texts gene_summary_human.csv.gz --output result.json
```

Clusters stand for cell types: k-means clusters of principal components, after the mean of each condition was
subtracted. The measure is the AUROC of the text's score for cells in the condition, with bootstrap intervals over
cells:

* `auroc`: the mean over clusters; clusters of 80 and of 800 cells have the same weight;
* `auroc_by_pairs`: the mean over clusters, weighted by the number of pairs of cells;
* `auroc_pooled`: over all cells, pairs of different clusters included.

Systems:

* `label, learned in other clusters` and `search, learned in other clusters`: each cluster is left out in turn, and
  `finetune` learns the conditions as labels from the other clusters. The left-out cells are ranked by the log odds of
  the label (`annotate`), or by the text (`search`).
* `search by genes, condition not seen`: `finetune` learns the clusters of cells without the condition, with texts
  about genes. `search --by genes` ranks all cells.
* `mean difference, other clusters`: projection onto the difference of mean expression between the conditions in the
  other clusters; uses no text.
* `library size`: the number of counts.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from scmmgpt.commands.errors import OneLineParser
from scmmgpt.commands.files import write_json
from scmmgpt.eval.annotators import expression, quieten, run_finetune
from scmmgpt.eval.cells import read_labelled
from scmmgpt.eval.results import Estimate, bootstrap_draws
from scmmgpt.eval.task import SEVERAL
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline


COMPONENTS = 20
N_DRAWS = 500  # bootstrap draws of an interval


def find_clusters(adata: AnnData, conditions: np.ndarray, n_clusters: int) -> np.ndarray:
    """Cluster the cells after subtracting the mean of each condition; return clusters, int `(n_obs,)`."""
    values = expression(adata).toarray()
    for condition in np.unique(conditions):
        values[conditions == condition] -= values[conditions == condition].mean(axis=0)
    points = PCA(min(COMPONENTS, *(n - 1 for n in values.shape)), random_state=0).fit_transform(values)
    return KMeans(n_clusters, n_init=10, random_state=0).fit_predict(points)


def learn(adata: AnnData, labels: np.ndarray, **options: Any) -> ScMMGPTPipeline:
    """Fine-tune on `adata` with `labels`; `options` are fields of `--new_model`."""
    adata = adata.copy()
    adata.obs["label"] = labels
    words = ["--new_model", *(f"{name}={value}" for name, value in options.items())] if options else []
    with tempfile.TemporaryDirectory() as folder:
        return run_finetune(adata, folder, label_key="label", options=words)


def search(pipeline: ScMMGPTPipeline, cells: AnnData, text: str, by: str = "similarity") -> np.ndarray:
    """Scores of the cells for a text, `(n_obs,)`."""
    pipeline.search(cells, text, by=by, key_added="score")
    return cells.obs["score"].to_numpy()


def log_odds(pipeline: ScMMGPTPipeline, cells: AnnData, label: str) -> np.ndarray:
    """Log odds of a label against all other labels, `(n_obs,)`."""
    pipeline.annotate(cells, min_score=0)
    of_label = np.asarray(cells.uns["scmmgpt"]["annotate"]["labels"]) == label
    probabilities = cells.obsm["scmmgpt_probabilities"].astype(np.float64).clip(min=1e-30)
    return np.log(probabilities[:, of_label].sum(axis=1) / probabilities[:, ~of_label].sum(axis=1))


def area(yes: np.ndarray, no: np.ndarray, seed: int) -> Estimate:
    """AUROC of the scores of cells in the condition `(n_yes,)` against other cells `(n_no,)`, with replicates."""
    no = np.sort(no)
    places = [np.searchsorted(no, yes, side) for side in ("left", "right")]
    drawn_yes, drawn_no = (bootstrap_draws(len(of), n_resamples=N_DRAWS, seed=seed) for of in (yes, no[::-1]))
    below = np.pad(drawn_no.cumsum(axis=1), ((0, 0), (1, 0)))
    ordered = (drawn_yes * (below[:, places[0]] + below[:, places[1]]) / 2).sum(axis=1)
    n_pairs = len(yes) * len(no)
    return Estimate(float(sum(place.sum() for place in places) / 2 / n_pairs), n_pairs, ordered / n_pairs)


def areas(scores: np.ndarray, truth: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """Compute the measures of the module's docstring for scores `(n_obs,)`, with bootstrap intervals over cells."""
    within = {
        str(cluster): area(scores[(clusters == cluster) & truth], scores[(clusters == cluster) & ~truth], seed)
        for seed, cluster in enumerate(np.unique(clusters))
        if 0 < truth[clusters == cluster].mean() < 1
    }
    values = np.array([of.value for of in within.values()])
    replicates, n_pairs = np.array([of.replicates for of in within.values()]), [of.n for of in within.values()]
    overall = {"auroc_pooled": area(scores[truth], scores[~truth], 0)}
    for name, weights in {"auroc": None, "auroc_by_pairs": n_pairs}.items():
        mean, drawn = (np.average(of, axis=0, weights=weights) for of in (values, replicates))
        overall[name] = Estimate(float(mean), sum(n_pairs), drawn)
    sizes = {str(cluster): int((clusters == cluster).sum()) for cluster in np.unique(clusters)}
    return {
        **{name: of.value for name, of in overall.items()},
        "auroc_worst_cluster": float(values.min()),
        "intervals": {name: of.interval for name, of in overall.items()},
        "clusters": {
            name: {"cells": sizes[name], "auroc": of.value, "interval": of.interval} for name, of in within.items()
        },
    }


def evaluate(
    adata: AnnData, conditions: np.ndarray, condition: str, text: str, n_clusters: int, gene_texts: str | None
) -> dict[str, dict[str, Any]]:
    """Compute the measures of every system: system -> measures; see [`areas`]."""
    truth, clusters = conditions == condition, find_clusters(adata, conditions, n_clusters)
    values = expression(adata)
    learned, searched, differences = (np.zeros(adata.n_obs) for _ in range(3))
    for cluster in range(n_clusters):
        left_out = clusters == cluster
        pipeline, cells = learn(adata[~left_out], conditions[~left_out]), adata[left_out].copy()
        learned[left_out] = log_odds(pipeline, cells, condition)
        searched[left_out] = search(pipeline, cells, text)
        means = [np.asarray(values[~left_out & (truth == side)].mean(axis=0)).ravel() for side in (True, False)]
        differences[left_out] = values[left_out] @ (means[0] - means[1])
    scores = {"label, learned in other clusters": learned, "search, learned in other clusters": searched}
    if gene_texts is not None:
        names = np.array([f"group {cluster}" for cluster in clusters])
        pipeline = learn(adata[~truth], names[~truth], gene_texts=gene_texts)
        scores["search by genes, condition not seen"] = search(pipeline, adata.copy(), text, by="genes")
    scores |= {"mean difference, other clusters": differences, "library size": np.asarray(adata.X.sum(axis=1)).ravel()}
    return {name: areas(values, truth, clusters) for name, values in scores.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = OneLineParser(prog="python -m scmmgpt.eval condition", description=__doc__.split("\n\n")[0])
    parser.add_argument("--adata", required=True, help="cells with counts in X")
    parser.add_argument("--condition-key", required=True, help="column of obs with the conditions")
    parser.add_argument("--condition", required=True, help="the condition that the text describes")
    parser.add_argument("--text", required=True, help="text to search for")
    parser.add_argument("--gene-texts", help="table of gene functions, columns symbol and summary")
    parser.add_argument("--clusters", type=SEVERAL, default=6, help="number of clusters (%(default)s)")
    parser.add_argument("--output", required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    quieten()
    adata, conditions = read_labelled(args.adata, args.condition_key)
    if args.condition not in conditions:
        raise ValueError(f"obs[{args.condition_key!r}] has no {args.condition!r}; it has {sorted(set(conditions))}.")
    systems = evaluate(adata, conditions, args.condition, args.text, args.clusters, args.gene_texts)
    about = {"task": "condition", "adata": Path(args.adata).name, "condition": args.condition, "text": args.text}
    about |= {"clusters": args.clusters, "cells": adata.n_obs}
    write_json(args.output, {**about, "systems": systems})
    sys.stdout.write(json.dumps(systems, indent=2) + "\n")
    return 0

"""Test the evidence of labels by deletion: does the score of a label fall if its named genes are deleted?

```
python -m scmmgpt.eval evidence --model CHECKPOINT --cells held_out.h5ad --output out.json
```

In each cell with evidence, the counts of genes are set to zero (the genes stay measured), and the cell is annotated
again. The deleted genes are the named genes or, for comparison, the same number of random expressed genes, of genes
with the highest counts, or of expressed genes with the largest weights of the label. The score is the log odds of the
label against all other labels. No true labels are needed.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anndata
import numpy as np
import pandas as pd

from scmmgpt.cells_scmmgpt import Cells, hashes
from scmmgpt.commands.errors import OneLineParser
from scmmgpt.eval.task import COUNT, NATURAL, write_result
from scmmgpt.evidence_scmmgpt import NONE, Evidence
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.readers.cell_files import read_file


def delete_genes(cells: Cells, deleted: np.ndarray) -> Cells:
    """Drop the counts where the mask `deleted`, bool `(nnz,)`, is true."""
    rows = cells.rows()[~deleted]
    indptr = np.searchsorted(rows, np.arange(len(cells) + 1))
    genes, counts = cells.gene_ids[~deleted], cells.counts[~deleted]
    return replace(cells, indptr=indptr, gene_ids=genes, counts=counts, total_counts=None)


def first_entries(cells: Cells, keys: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Mark the `n[i]` entries with the largest keys in each cell `i`, bool `(nnz,)`."""
    rows = cells.rows()
    order = np.lexsort((-keys, rows))
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[order] = np.arange(len(keys)) - cells.indptr[rows] < n[rows]
    return chosen


def deletions(cells: Cells, evidence: Evidence, n_draws: int, seed: int) -> dict[str, list[np.ndarray]]:
    """Make the masks of deleted counts, bool `(nnz,)`, by kind of deletion; random genes have `n_draws` masks."""
    rows, panel = cells.rows(), evidence.explainer.panel
    places_of_evidence = evidence.of_cells.genes
    named = np.where(places_of_evidence == NONE, -1, panel.gene_ids[places_of_evidence])
    width = int(max(cells.gene_ids.max(initial=0), panel.gene_ids.max())) + 1
    keys = np.unique((np.arange(len(cells))[:, None] * width + named)[named >= 0])
    is_named = np.isin(rows * width + cells.gene_ids, keys)
    n = np.bincount(rows[is_named], minlength=len(cells))
    places = np.searchsorted(panel.gene_ids, cells.gene_ids).clip(max=len(panel.gene_ids) - 1)
    in_panel = panel.gene_ids[places] == cells.gene_ids
    weights = np.where(in_panel, evidence.explainer.weights[places, evidence.set_of_cell[rows]], -np.inf)
    draws = [hashes(len(rows), seed, draw).astype(np.float64) for draw in range(n_draws)]
    return {
        "named genes": [is_named],
        "random expressed genes": [first_entries(cells, draw, n) for draw in draws],
        "highest counts": [first_entries(cells, cells.counts.astype(np.float64), n)],
        "largest weights of the label": [first_entries(cells, weights, n)],
    }


def log_odds(pipeline: ScMMGPTPipeline, cells: Cells, genes: np.ndarray, meant: np.ndarray) -> np.ndarray:
    """Log odds, by `annotate`, of the label of each cell against all other labels, float64 `(n_cells,)`.

    `meant` has the labels of the checkpoint that the label of a cell means (a broader type: several), bool `(n_cells,
    n_labels)`.
    """
    counts = cells.to_csr(int(genes.max()) + 1)[:, genes]
    names = pd.Index([f"cell{i}" for i in range(len(cells))])
    var = pd.DataFrame(index=pd.Index(pipeline.processor.gene_symbols(genes.tolist())))
    adata = pipeline.annotate(anndata.AnnData(counts, obs=pd.DataFrame(index=names), var=var), min_score=0)
    p = np.asarray(adata.obsm["scmmgpt_probabilities"], dtype=np.float64)
    own = (p * meant).sum(axis=1)
    others = p.sum(axis=1) - own + np.maximum(1 - p.sum(axis=1), 0)
    return np.log(own.clip(min=1e-30)) - np.log(others.clip(min=1e-30))


def evaluate_evidence(pipeline: ScMMGPTPipeline, adata: Any, n_draws: int = 5, seed: int = 0) -> dict[str, Any]:
    """Delete genes from every cell of an AnnData by each kind of deletion, and measure the fall of the label's score.

    Returns:
        JSON-able dict: `n_cells` with evidence, `named` (mean number of named genes) and `ways`: kind of deletion ->
        `drop` (mean fall of the log odds), `named_drop_more` (share of cells in which the named genes lower the log
        odds more, averaged over draws) and `label_lost` (share of cells whose log odds fall from above to below 0).
    """
    evidence = pipeline.explain(pipeline.annotate(adata))
    labels = adata.uns["scmmgpt"]["annotate"]["labels"].tolist()
    known = evidence.names[len(evidence.sets) :].tolist()
    meant = evidence.explainer.members[evidence.set_of_cell][:, [known.index(label) for label in labels]]
    chosen = np.flatnonzero((evidence.of_cells.rivals != NONE) & meant.any(axis=1))
    if not len(chosen):
        raise ValueError("No cell got a label that the readout of the checkpoint knows: there is no evidence to test.")
    meant = meant[chosen]
    cells, _ = pipeline.processor.read_cells(adata)
    genes = np.sort(pipeline.processor.choose_input(adata).match.measured)
    ways = deletions(cells, evidence, n_draws, seed)
    cells_chosen = cells[chosen]
    kept = np.isin(cells.rows(), chosen)
    before = log_odds(pipeline, cells_chosen, genes, meant)
    drops, lost = {}, {}
    for way, masks in ways.items():
        after = [log_odds(pipeline, delete_genes(cells_chosen, mask[kept]), genes, meant) for mask in masks]
        drops[way] = np.stack([before - odds for odds in after])
        lost[way] = float(np.mean([((odds < 0) & (before > 0)).mean() for odds in after]))
    named = drops["named genes"]
    return {
        "n_cells": len(chosen),
        "named": float((evidence.of_cells.genes[chosen] != NONE).sum(axis=1).mean()),
        "ways": {
            way: {
                "drop": float(drop.mean()),
                "named_drop_more": None if way == "named genes" else float((named > drop).mean()),
                "label_lost": lost[way],
            }
            for way, drop in drops.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = OneLineParser(prog="python -m scmmgpt.eval evidence", description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint with a label readout")
    parser.add_argument("--cells", required=True, help="file of held-out cells")
    parser.add_argument("--draws", type=COUNT, default=5, help="draws of random genes (%(default)s)")
    parser.add_argument("--seed", type=NATURAL, default=0, help="seed of the draws (%(default)s)")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(argv)
    pipeline = ScMMGPTPipeline.from_pretrained(args.model)
    result = evaluate_evidence(pipeline, read_file(args.cells), args.draws, args.seed)
    return write_result(result, args.output)

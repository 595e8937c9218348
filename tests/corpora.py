"""Corpora that tests write, and the options of a short training run on them."""

import numpy as np

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.train.data.corpus_writer import CorpusWriter


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
SHORT = {**QUIET, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_strategy": "no", "logging_steps": 1}


def random_cells(n_cells, seed=0, dtype=np.uint16, first_id=0, *, n_genes, most_genes, most_counts):
    """Random cells of up to `most_genes` of the genes from 3 on; the counts of a float32 cell are not integers."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, most_genes + 1, n_cells)
    gene_ids = [np.sort(rng.choice(np.arange(3, n_genes), n, replace=False)) for n in lengths]
    counts = rng.integers(1, most_counts + 1, lengths.sum())
    counts = counts + rng.random(len(counts)) if dtype == np.float32 else counts
    return Cells(
        indptr=np.append(0, np.cumsum(lengths)),
        gene_ids=np.concatenate(gene_ids).astype(np.uint16),
        counts=counts.astype(dtype),
        cell_ids=np.arange(first_id, first_id + n_cells, dtype=np.uint64),
        total_counts=rng.integers(50, 5000, n_cells).astype(np.float32),
    )


def write_corpus(path, vocabulary, cells_by_split, *, cells_per_shard=100_000, row_group_size=512, **manifest_fields):
    """Write a corpus of {split: (cells, {obs column: values})}, cells in the given order; returns its manifest."""
    writer = CorpusWriter(path, vocabulary, row_group_size=row_group_size)
    for split, (cells, obs) in cells_by_split.items():
        starts = range(0, len(cells), cells_per_shard)
        for index, start in enumerate(starts):
            rows = slice(start, start + cells_per_shard)
            part = {name: values[rows] for name, values in obs.items()}
            writer.write_shard(split, index, len(starts), cells[rows], part)
    return writer.finish(**manifest_fields)

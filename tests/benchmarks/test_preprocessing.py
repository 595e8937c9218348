"""CPU time from counts to model inputs, against the collator of scGPT. Run alone: `make benchmark`.

The original runs its own code from the checkout that `SCMMGPT_BENCHMARK_SCGPT` names; without it, nothing is compared.
Both get the same synthetic cells (log-normal number of genes, mean about 1,500 of 30,000; 60 % of counts are 1; genes
of Zipf-like frequency), in batches of 64, at most 1,200 tokens, 51 bins, on one thread. They take turns, so that other
work on the machine touches both; a ratio is the median over the rounds. The inputs:

* cells: `Cells` for ours, gene and value tensors with `<cls>` for the original: the collators alone;
* dense: an array over the 1,200 or 3,000 most frequent genes, whose columns are in another order than the
  vocabulary, from the first step to the batch;
* sparse 30000, dense 30000: the same from all columns, in CSR or as an array.

The bar is 20 but for dense 30000. A dense cell there is 120 kB, which come from main memory as the 61 MB of all cells
outgrow the caches: finding what is not zero takes 4.5 of our 12.5 microseconds, 3 of which the memory alone.

The table goes to `results/benchmarks/preprocessing.json`.
"""

import importlib
import json
import logging
import os
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scmmgpt import cells_scmmgpt, feature_extraction_scmmgpt, kernels_scmmgpt
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor


logger = logging.getLogger(__name__)

N_CELLS, N_GENES, BATCH_SIZE = 512, 30_000, 64
MAX_TOKENS, N_BINS = 1200, 51
PAD_ID, CLS_ID = 60_694, 60_695
ROUNDS = 7
OUR_PASSES = 15  # so that both sides are measured for about as long
# Input -> least ratio.
INPUTS = {"cells": 20, "dense 1200": 20, "dense 3000": 20, "sparse 30000": 20, "dense 30000": 17}

pytestmark = pytest.mark.benchmark


def synthetic_matrix(seed=0):
    """Float32 counts in CSR, as AnnData has them."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(1347), 0.502, N_CELLS), 50, 8000).astype(int)
    log_frequency = -0.8 * np.log(rng.permutation(N_GENES) + 1)
    columns = []
    for length in lengths:  # the Gumbel trick: a draw without replacement by frequency
        score = log_frequency - np.log(rng.exponential(size=N_GENES))
        columns.append(np.sort(np.argpartition(score, -length)[-length:]))
    columns = np.concatenate(columns)
    counts = np.where(rng.random(len(columns)) < 0.6, 1, 1 + np.ceil(rng.lognormal(0.5, 1.0, len(columns))))
    return sp.csr_matrix((counts.astype(np.float32), columns, np.append(0, np.cumsum(lengths))), (N_CELLS, N_GENES))


@pytest.fixture(scope="module")
def scgpt():
    """The original's modules, past its package's own imports, of which the collator needs none."""
    if "SCMMGPT_BENCHMARK_SCGPT" not in os.environ:
        pytest.skip("SCMMGPT_BENCHMARK_SCGPT names no checkout of https://github.com/bowang-lab/scGPT")
    package = types.ModuleType("scgpt")
    package.__path__ = [str(Path(os.environ["SCMMGPT_BENCHMARK_SCGPT"]) / "scgpt")]
    package.logger = logging.getLogger("scgpt")
    sys.modules["scgpt"] = package
    return types.SimpleNamespace(
        collator=importlib.import_module("scgpt.data_collator"), preprocess=importlib.import_module("scgpt.preprocess")
    )


class Original:
    """What the original's embedding recipe does to a batch: a pair of tensors a cell, then its collator."""

    def __init__(self, scgpt, vocabulary_ids):
        self.vocabulary_ids = vocabulary_ids
        self.collate = scgpt.collator.DataCollator(
            do_padding=True,
            pad_token_id=PAD_ID,
            pad_value=-2,
            do_mlm=False,
            do_binning=True,
            max_length=MAX_TOKENS,
            sampling=True,
            keep_first_n_tokens=1,
        )

    def example(self, columns, counts):
        genes = np.append(CLS_ID, self.vocabulary_ids[columns])
        values = np.append(np.float32(-2), counts)
        return {"genes": torch.from_numpy(genes), "expressions": torch.from_numpy(values)}

    def from_cells(self, examples):
        # The collator writes its bins into the values that it is given.
        return self.collate([{name: tensor.clone() for name, tensor in example.items()} for example in examples])

    def from_sparse(self, matrix):
        bounds = zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)
        return self.collate([self.example(matrix.indices[a:b], matrix.data[a:b]) for a, b in bounds])

    def from_dense(self, matrix):
        filled = [np.flatnonzero(row) for row in matrix]
        return self.collate([self.example(columns, row[columns]) for columns, row in zip(filled, matrix, strict=True)])


def microseconds_per_cell(function, batches, passes=1):
    start = time.process_time()
    for _ in range(passes):
        for batch in batches:
            function(batch)
    return (time.process_time() - start) / (passes * N_CELLS) * 1e6


@pytest.fixture(scope="module")
def rounds(scgpt):
    """CPU microseconds per cell of every round, by input: ours and the original's."""
    if kernels_scmmgpt.njit is None:
        pytest.skip("numba is not installed, and the bar is for the compiled path")
    torch.set_num_threads(1)
    matrix = synthetic_matrix()
    extractor = ScMMGPTFeatureExtractor(MAX_TOKENS, N_BINS, pad_token_id=PAD_ID, cls_token_id=CLS_ID)
    by_frequency = np.argsort(-np.diff(matrix.tocsc().indptr), kind="stable")
    shuffled_ids = np.random.default_rng(1).permutation(60_000)
    runs = {}
    for name in INPUTS:
        kind, _, width = name.partition(" ")
        width = int(width or N_GENES)
        columns, ids = np.sort(by_frequency[:width]), shuffled_ids[:width]
        original = Original(scgpt, ids)
        chunks = [matrix[i : i + BATCH_SIZE, columns] for i in range(0, N_CELLS, BATCH_SIZE)]
        if kind == "cells":
            ours = extractor, [Cells.from_csr(chunk, ids) for chunk in chunks]
            examples = [[original.example(row.indices, row.data) for row in chunk] for chunk in chunks]
            theirs = original.from_cells, examples
        elif kind == "sparse":
            ours = (lambda chunk, ids=ids: extractor(Cells.from_csr(chunk, ids))), chunks
            theirs = original.from_sparse, chunks
        else:
            chunks = [chunk.toarray() for chunk in chunks]
            ours = (lambda chunk, ids=ids: extractor(Cells.from_dense(chunk, ids))), chunks
            theirs = original.from_dense, chunks
        runs[name] = ours, theirs
    for (ours, batches), (theirs, their_batches) in runs.values():
        for _ in range(1 + kernels_scmmgpt.WARM_UP_CELLS // N_CELLS):  # compile
            microseconds_per_cell(ours, batches)
        theirs(their_batches[0])
    found = {name: {"ours": [], "original": []} for name in INPUTS}
    for _ in range(ROUNDS):
        for name, (ours, theirs) in runs.items():
            found[name]["ours"].append(microseconds_per_cell(*ours, passes=OUR_PASSES))
            found[name]["original"].append(microseconds_per_cell(*theirs))
    table = {
        name: {side: float(np.median(times)) for side, times in sides.items()} | {"ratio": ratio(sides)}
        for name, sides in found.items()
    }
    logger.info("CPU microseconds per cell: %s", table)
    path = Path(__file__).parents[2] / "results" / "benchmarks" / "preprocessing.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    return found


def ratio(sides):
    """Median over the rounds of how many times less ours took in the same round."""
    return float(np.median(np.array(sides["original"]) / np.array(sides["ours"])))


@pytest.mark.parametrize("name", INPUTS)
def test_preprocessing_takes_a_fraction_of_the_original(rounds, name):
    assert ratio(rounds[name]) >= INPUTS[name]


def test_bins_are_those_of_the_original_under_our_draws(scgpt, monkeypatch):
    """The original's own binning, given our uniform draws in place of its random ones: not one bin may differ."""
    cells = Cells.from_csr(synthetic_matrix(seed=2), np.arange(N_GENES))
    ours = feature_extraction_scmmgpt.bin_counts(cells, N_BINS)
    keys = cells_scmmgpt.cell_keys(cells.cell_ids, seed=0, epoch=0, stream=cells_scmmgpt.RandomStream.TOKEN)
    differing = 0
    for i in range(len(cells)):
        entries = slice(cells.indptr[i], cells.indptr[i + 1])
        hashes = cells_scmmgpt.gene_hashes(keys[i], cells.gene_ids[entries])
        draws = (hashes & np.uint64(2**32 - 1)) / 2**32
        monkeypatch.setattr(np.random, "rand", lambda n, draws=draws: draws)
        theirs = scgpt.preprocess.binning(torch.from_numpy(cells.counts[entries]), N_BINS)
        differing += (theirs.numpy() != ours[entries]).sum()
    assert differing == 0

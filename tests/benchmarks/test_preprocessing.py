"""CPU time from an AnnData to model inputs, against scGPT's own way. Run alone: `make benchmark`.

The original runs its own collator from the checkout that `SCMMGPT_BENCHMARK_SCGPT` names; without it, nothing is
compared. Both get the same synthetic cells (log-normal number of genes, mean about 1,500 of 30,000; 60 % of counts are
1; genes of Zipf-like frequency), whose genes are in another order than the vocabulary, in batches of 64, at most 1,200
tokens, 51 bins, on one thread. They take turns, so that other work on the machine touches both; a ratio is the median
over the rounds. The inputs are an AnnData whose `X` is CSR or an array, of all columns or of the 1,200 or 3,000 most
frequent; and the cells that were made of it.

* Ours is what every verb of the pipeline does: `processor.read_cells(adata)`, the whole file at once, then
  `processor(cells=...)`, a batch at a time. What a file costs once, `choose_input` (which matrix, what its values are,
  which genes), is measured apart: "milliseconds per file".
* scGPT's is what its embedding recipe does: the whole matrix as an array, a pair of tensors a cell, its collator.
  Its lookup of genes is left out, as ours is.
* "cells" are `Cells` for ours, gene and value tensors with `<cls>` for the original: the collators alone.

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
from anndata import AnnData

from scmmgpt import cells_scmmgpt, kernels_scmmgpt, reading_scmmgpt
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.reading_scmmgpt import choose_input
from scmmgpt.synthetic import tiny_processor


logger = logging.getLogger(__name__)

N_CELLS, N_GENES, BATCH_SIZE = 4096, 30_000, 64
N_CELLS_OF_ORIGINAL = 512  # of the same, whose cost does not depend on how many there are
MAX_TOKENS, N_BINS = 1200, 51
PAD_ID, CLS_ID = 60_694, 60_695
ROUNDS = 7
INPUTS = [f"{kind} {width}" for width in (1200, 3000, N_GENES) for kind in ("sparse", "dense")] + ["cells"]
DENSE = f"dense {N_GENES}"
# At a load of 7 on two cores: 27, 26, 25, 21, 31, 16 and 27 times; 31 microseconds for a dense cell of all columns.
# The aim is 20 times and 30 microseconds. Since then, rows are compared as words of bits, which saves a dense cell 5
# to 8 of them: 8 remain for 120 kB from memory, 5 until the 1,500 entries are genes, 3 for fresh memory of the result
# and 9 until they are tokens; a twentieth of the original's time would be 20. Where neighbours of a virtual machine
# use its memory, the wider dense inputs have been seen to take half as long again, which their bars allow.
LEAST_RATIO = {"sparse 1200": 20, "dense 1200": 20, "sparse 3000": 20, "dense 3000": 16, "sparse 30000": 20}
LEAST_RATIO |= {DENSE: 12, "cells": 20}
MOST_MICROSECONDS = 40

pytestmark = pytest.mark.benchmark


def synthetic_matrix(n_cells=N_CELLS, seed=0):
    """Float32 counts in CSR, as AnnData has them."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(1347), 0.502, n_cells), 50, 8000).astype(int)
    log_frequency = -0.8 * np.log(rng.permutation(N_GENES) + 1)
    columns = []
    for length in lengths:  # the Gumbel trick: a draw without replacement by frequency
        score = log_frequency - np.log(rng.exponential(size=N_GENES))
        columns.append(np.sort(np.argpartition(score, -length)[-length:]))
    columns = np.concatenate(columns)
    counts = np.where(rng.random(len(columns)) < 0.6, 1, 1 + np.ceil(rng.lognormal(0.5, 1.0, len(columns))))
    return sp.csr_matrix((counts.astype(np.float32), columns, np.append(0, np.cumsum(lengths))), (n_cells, N_GENES))


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
    """What the original's embedding recipe does: a pair of tensors a cell, then its collator."""

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

    def example(self, row):
        filled = np.nonzero(row)[0]
        genes = np.insert(self.vocabulary_ids[filled], 0, CLS_ID)
        values = np.insert(row[filled], 0, -2)
        return {"genes": torch.from_numpy(genes).long(), "expressions": torch.from_numpy(values).float()}

    def from_adata(self, adata):
        matrix = adata.X if isinstance(adata.X, np.ndarray) else adata.X.toarray()
        for start in range(0, len(matrix), BATCH_SIZE):
            self.collate([self.example(row) for row in matrix[start : start + BATCH_SIZE]])

    def from_examples(self, examples):
        for start in range(0, len(examples), BATCH_SIZE):
            # The collator writes its bins into the values that it is given.
            batch = examples[start : start + BATCH_SIZE]
            self.collate([{name: tensor.clone() for name, tensor in example.items()} for example in batch])


class Ours:
    """The processor; `choose_input` is left out while it runs."""

    def __init__(self):
        self.processor = tiny_processor()
        self.processor.feature_extractor = ScMMGPTFeatureExtractor(
            MAX_TOKENS, N_BINS, pad_token_id=PAD_ID, cls_token_id=CLS_ID
        )
        self.gene_index = GeneIndex({f"GENE{i}": i for i in range(2 * N_GENES)})

    def from_adata(self, choice, adata):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading_scmmgpt, "choose_input", lambda *_, **__: choice)
            cells, _ = self.processor.read_cells(adata)
        self.from_cells(cells)

    def from_cells(self, cells):
        for start in range(0, len(cells), BATCH_SIZE):
            self.processor(cells=cells[start : start + BATCH_SIZE])


def microseconds(function, *arguments):
    start = time.process_time()
    function(*arguments)
    return (time.process_time() - start) * 1e6


@pytest.fixture(scope="module")
def rounds(scgpt):
    """CPU microseconds per cell of every round, by input: ours and the original's."""
    if kernels_scmmgpt.njit is None:
        pytest.skip("numba is not installed, and the bar is for the compiled path")
    torch.set_num_threads(1)
    matrix, ours, runs, files = synthetic_matrix(), Ours(), {}, {}
    by_frequency = np.argsort(-np.diff(matrix.tocsc().indptr), kind="stable")
    ids = np.random.default_rng(1).permutation(2 * N_GENES)
    for name in INPUTS:
        kind, _, width = name.partition(" ")
        width = int(width or N_GENES)
        counts = matrix[:, np.sort(by_frequency[:width])]
        adata = AnnData(counts if kind != "dense" else counts.toarray())
        adata.var_names = [f"GENE{i}" for i in ids[:width]]
        few, original = adata[:N_CELLS_OF_ORIGINAL].copy(), Original(scgpt, ids[:width])
        choice = choose_input(adata, ours.gene_index)
        if kind == "cells":
            examples = [original.example(row) for row in few.X.toarray()]
            runs[name] = (ours.from_cells, choice.convert(adata)), (original.from_examples, examples)
        else:
            runs[name] = (ours.from_adata, choice, adata), (original.from_adata, few)
            files[name] = adata
    for mine, theirs in runs.values():  # compile, and touch what is touched first
        for _ in range(1 + kernels_scmmgpt.WARM_UP_CELLS // N_CELLS):
            microseconds(*mine)
        microseconds(*theirs)
    found = {name: {"ours": [], "original": []} for name in INPUTS}
    for _ in range(ROUNDS):
        for name, (mine, theirs) in runs.items():
            found[name]["ours"].append(microseconds(*mine) / N_CELLS)
            found[name]["original"].append(microseconds(*theirs) / N_CELLS_OF_ORIGINAL)
    table = {
        name: {side: float(np.median(times)) for side, times in sides.items()}
        | {"ratio": ratio(sides), "fastest": min(sides["ours"])}
        for name, sides in found.items()
    }
    for name, adata in files.items():
        once = [microseconds(choose_input, adata, ours.gene_index) for _ in range(3)]
        table[name]["milliseconds per file"] = min(once) / 1000
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
    assert ratio(rounds[name]) >= LEAST_RATIO[name]


def test_a_dense_cell_of_all_genes_takes_microseconds(rounds):
    assert min(rounds[DENSE]["ours"]) <= MOST_MICROSECONDS


def test_bins_are_those_of_the_original_under_our_draws(scgpt, monkeypatch):
    """The original's own binning, given our uniform draws in place of its random ones: not one bin may differ."""
    cells = Cells.from_csr(synthetic_matrix(512, seed=2), np.arange(N_GENES))
    batch = ScMMGPTFeatureExtractor(N_GENES, N_BINS)(cells, return_tensors="np")
    ours = batch["expression"][:, 1:][batch["cell_attention_mask"][:, 1:] == 1]
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

"""Cells of trained labels that are no candidates: which candidate they get."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.sparse import csr_matrix

from scmmgpt import ScMMGPTPipeline
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.regression_scmmgpt import LEAST_TOTAL
from scmmgpt.tests.test_packaging import ROOT


pytest.importorskip("cellxgene_ontology_guide")

from scmmgpt.train.pooled import Dataset, fit_pooled_readout


N_GENES, N_LABELS = 40, 4
MARKERS = [range(0, 8), range(8, 16), range(16, 24), [*range(6), *range(24, 32)]]  # the last label is kin of the first
CANDIDATES = [0, 1, 2]


def dataset(seed, n_each=40):
    rng = np.random.default_rng(seed)
    targets, rates = np.repeat(np.arange(N_LABELS), n_each), np.full((N_LABELS, N_GENES), 2.0)
    for label, markers in enumerate(MARKERS):
        rates[label, list(markers)] = 12
    counts = rng.poisson(rates[targets] * 1.5 ** rng.uniform(-1, 1, N_GENES)).astype(np.float32)
    return Dataset(csr_matrix(counts), np.arange(N_GENES), targets)


@pytest.fixture(scope="module")
def readout():
    return fit_pooled_readout([dataset(0), dataset(1)], N_LABELS)


@pytest.fixture(scope="module")
def data():
    return dataset(2)


@pytest.fixture(scope="module")
def cells(data):
    return Cells.from_csr(data.counts, np.arange(N_GENES))


def test_a_cell_of_no_candidate_gets_its_kin_and_no_more_probability(readout, data, cells):
    panel = readout.for_genes()
    all_labels, found = (np.exp(of(cells)) for of in (panel, readout.among(panel, CANDIDATES)))
    total = all_labels[:, CANDIDATES].sum(axis=1)
    np.testing.assert_allclose(found[:, CANDIDATES].sum(axis=1), total, atol=1e-6)
    np.testing.assert_array_equal(found[:, 3], all_labels[:, 3])
    np.testing.assert_array_equal(found[total >= LEAST_TOTAL], all_labels[total >= LEAST_TOTAL])
    other = data.targets == 3
    kin = [(of[other][:, CANDIDATES].argmax(axis=1) == 0).mean() for of in (all_labels, found)]
    assert kin[1] > 0.9 > 2 * kin[0]


@pytest.mark.parametrize("genes", [np.arange(N_GENES), np.arange(0, N_GENES, 3)])
def test_the_weights_are_those_of_a_ridge_regression_of_the_candidates_groups(readout, genes):
    among = readout.among(readout.for_genes(genes), CANDIDATES).among
    a, here, expected = readout.arrays(), np.isin(np.arange(N_GENES), genes), []
    kept = a["group_labels"][:, 3] == 0
    for version in readout.versions(a, here):
        rows, labels = version["groups"][kept][:, here], a["group_labels"][kept][:, CANDIDATES]
        weights = np.full(len(rows), 1 / len(rows))  # two datasets of three labels
        x, y = rows - weights @ rows, labels - 1 / len(CANDIDATES)
        factors = a["factors"][:, here]
        matrix = x.T @ (weights[:, None] * x) + factors.T @ factors + np.diag(a["noise"][here])
        solved = np.linalg.solve(matrix, x.T @ (weights[:, None] * y))
        expected.append(np.vstack([solved, 1 / len(CANDIDATES) - (weights @ rows) @ solved]))
    found = np.vstack([among.weights, among.bias])
    np.testing.assert_allclose(found, np.mean(expected, axis=0), atol=1e-5)


def test_a_monocyte_is_called_kupffer_cell_where_no_other_candidate_is_myeloid():
    if not (ROOT / "model.safetensors").is_file():
        pytest.skip("the repository holds no checkpoint")
    pipe = ScMMGPTPipeline.from_pretrained(ROOT)
    readout, labels = pipe._bridge().label_readout, pipe.model.config.label_readout["labels"]
    mean = np.expm1(readout.mean_profiles()[labels.index("monocyte")]).clip(min=0)
    names = {token: gene for gene, token in pipe.processor.gene_index.vocabulary.items()}
    var = pd.DataFrame(index=[names[token] for token in readout.gene_ids.tolist()])
    counts = np.random.default_rng(0).poisson(0.2 * mean, (30, len(mean))).astype(np.float32)
    adata = AnnData(csr_matrix(counts), var=var)
    pipe.annotate(adata, labels=["hepatocyte", "Kupffer cell", "T cell", "NK cell", "B cell", "endothelial cell"])
    assert (adata.obs["scmmgpt_cell_type"] == "Kupffer cell").mean() > 0.9
    assert adata.obs["scmmgpt_score"].median() < 0.1

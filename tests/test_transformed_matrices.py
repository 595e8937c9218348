"""Counts of real cells, transformed as they are in published files and cut to panels: what the values are read as."""

import anndata as ad
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from scmmgpt.matrices_scmmgpt import inspect_matrix


SIZES = (50, 100, 200, 500)
N_CELLS = 120
# What each transformation may be read as. `unknown` asks the user; a normalised value is on a linear scale.
LOGS = {"log1p", "unknown"}


def transformed(counts: np.ndarray, rng: np.random.Generator) -> dict[str, tuple[np.ndarray, set[str]]]:
    """Name -> values `(n_cells, n_genes)`, and the kinds that are right for them."""
    totals = counts.sum(axis=1, keepdims=True)
    per_10k = counts / totals * 1e4
    factors = totals / totals.mean() * np.exp(rng.normal(0, 0.15, totals.shape))  # as scran's, from pools of cells
    logs = np.log1p(per_10k)
    order = np.argsort(-(logs @ logs.T), axis=1)[:, :15]
    tpm = counts / rng.uniform(0.3, 5, counts.shape[1])
    tpm = tpm / tpm.sum(axis=1, keepdims=True) * 1e6
    spread = logs.std(axis=0)
    expected = totals * counts.sum(axis=0) / counts.sum()
    return {
        "counts": (counts, {"raw_integer"}),
        "CP10k": (per_10k, {"normalized"}),
        "TPM": (tpm, {"normalized"}),
        "log1p of CP10k": (logs, LOGS),
        "log1p of the median total": (np.log1p(counts / totals * np.median(totals)), LOGS),
        "log2(CPM + 1)": (np.log2(per_10k * 100 + 1), LOGS),
        "log2(TPM / 10 + 1)": (np.log2(tpm / 10 + 1), LOGS),
        "logarithms by size factors": (np.log2(counts / factors + 1), LOGS),
        "logarithms that were normalised as counts": (np.log1p(logs / logs.sum(axis=1, keepdims=True) * 1e4), LOGS),
        "logarithms of neighbours": (np.stack([logs[rows].mean(axis=0) for rows in order]), LOGS),
        # In genes of many counts no unit is left, and square roots look like any normalised values.
        "square roots": (np.sqrt(per_10k), {"sqrt", "unknown", "normalized"}),
        "inverse hyperbolic sine": (np.arcsinh(per_10k), LOGS),
        "z-scores": ((logs - logs.mean(axis=0)) / np.where(spread > 0, spread, 1), {"scaled"}),
        "Pearson residuals": ((counts - expected) / np.sqrt(expected + expected**2 / 100 + 1e-9), {"scaled"}),
        "counts of which a part was corrected": (
            counts * (1 - rng.beta(1, 40, counts.shape)),
            {"raw_float", "normalized"},
        ),
    }


@pytest.mark.parametrize("name", ["liver_he", "pbmc_ecciteseq", "pancreas_baron_human"])
def test_no_panel_of_transformed_counts_is_read_as_something_else(shared_data, name):
    rng = np.random.default_rng(0)
    adata = ad.read_h5ad(shared_data / f"{name}.h5ad")
    rows = np.sort(rng.choice(adata.n_obs, N_CELLS, replace=False))
    counts = np.asarray(adata.X[rows].todense(), dtype=np.float64)
    expressed = np.flatnonzero((counts > 0).mean(axis=0) > 0.05)
    most = expressed[np.argsort(-counts[:, expressed].mean(axis=0))]
    wrong = []
    for form, (values, kinds) in transformed(counts, rng).items():
        for size in SIZES:
            for genes in (np.sort(rng.choice(expressed, size, replace=False)), np.sort(most[:size])):
                panel = values[:, genes].astype(np.float32)
                verdict = inspect_matrix(csr_matrix(panel))
                if verdict.kind not in kinds:
                    wrong.append(f"{form}, {size} genes: {verdict.kind}")
    assert not wrong

"""A small annotated AnnData with planted markers, so that tests, documentation and users have a known right answer."""

import anndata
import numpy as np
import pandas as pd
from scipy import sparse


# Cell type -> (Cell Ontology id, marker genes). Every other gene is background, equal in all types.
MARKERS = {
    "B cell": ("CL:0000236", ["CD19", "CD79A", "CD79B", "MS4A1"]),
    "T cell": ("CL:0000084", ["CD3D", "CD3E", "IL7R", "TRAC"]),
    "natural killer cell": ("CL:0000623", ["GNLY", "KLRD1", "NKG7", "PRF1"]),
    "monocyte": ("CL:0000576", ["CD14", "FCN1", "LYZ", "S100A9"]),
}
BACKGROUND = (
    "ACTB", "ACTG1", "B2M", "CFL1", "EEF1A1", "EEF2", "FAU", "FTH1", "FTL", "GAPDH", "HSP90AB1", "MALAT1",
    "PABPC1", "PFN1", "PTMA", "RPL10", "RPL13", "RPLP0", "RPS18", "RPS27", "TMSB10", "TMSB4X", "TPT1", "UBC",
)  # fmt: skip


def synthetic_adata(n_obs=60, *, seed=0, marker_fold=20.0, mean_total=200.0):
    """Draw cells of four blood types over forty genes, their markers raised, everything else alike.

    Args:
        n_obs (`int`, defaults to 60): Cells; types take turns, so that every type has its share.
        seed (`int`, defaults to 0): Seed of the Poisson noise and of the cells' sizes.
        marker_fold (`float`, defaults to 20.0): Expression of a marker in its type over that in the others.
        mean_total (`float`, defaults to 200.0): Mean number of counts of a cell.

    Returns:
        `AnnData` of shape `(n_obs, 40)`: raw counts (CSR, float32) in `X`, gene symbols as `var_names`, Ensembl-free,
        and the CELLxGENE-style `obs` columns that captions read. Two donors, so that a split by donor exists.

    >>> adata = synthetic_adata(8)
    >>> adata.shape, adata.obs["cell_type"].iloc[0]
    ((8, 40), 'B cell')
    """
    rng = np.random.default_rng(seed)
    types = list(MARKERS)
    genes = sorted({gene for _, markers in MARKERS.values() for gene in markers} | set(BACKGROUND))
    labels = np.resize(types, n_obs)

    profiles = np.ones((len(types), len(genes)))
    for row, (_, markers) in enumerate(MARKERS.values()):
        profiles[row, [genes.index(gene) for gene in markers]] = marker_fold
    profiles /= profiles.sum(axis=1, keepdims=True)
    totals = mean_total * rng.lognormal(sigma=0.2, size=(n_obs, 1))
    counts = rng.poisson(totals * profiles[np.arange(n_obs) % len(types)]).astype(np.float32)

    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(labels),
            "cell_type_ontology_term_id": pd.Categorical([MARKERS[label][0] for label in labels]),
            "tissue": "blood",
            "tissue_ontology_term_id": "UBERON:0000178",
            "disease": "normal",
            "disease_ontology_term_id": "PATO:0000461",
            "assay": "10x 3' v3",
            "assay_ontology_term_id": "EFO:0009922",
            "sex": "female",
            "sex_ontology_term_id": "PATO:0000383",
            "organism": "Homo sapiens",
            "organism_ontology_term_id": "NCBITaxon:9606",
            "donor_id": np.where(np.arange(n_obs) < n_obs // 2, "donor-1", "donor-2"),
        },
        index=[f"cell-{i}" for i in range(n_obs)],
    )
    return anndata.AnnData(X=sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))

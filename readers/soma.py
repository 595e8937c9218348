"""Cells of a SOMA experiment (TileDB), or of a query of one, for example of the CELLxGENE Census.

An experiment is a folder. A query is a file whose name ends in `.soma.json`:

    {"uri": "s3://cellxgene-census-public-us-west-2/cell-census/2025-01-30/soma/census_data/homo_sapiens",
     "value_filter": "tissue_general == 'lung' and is_primary_data == True"}

`uri` is an address that TileDB reads, or a folder, relative to the folder of the file. `value_filter` has the syntax
of TileDB-SOMA. `measurement` is `RNA` by default. Tables are loaded. Matrices stay in the experiment, and every slice
of rows is fetched by the ids of its cells.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scmmgpt.readers.text_tables import FileError


QUERY = ".soma.json"
FIELDS = ("uri", "value_filter", "measurement")
CELL_NAMES, GENE_NAMES = ("obs_id", "observation_joinid"), ("var_id", "feature_id")  # if missing, `soma_joinid`
BEST_LAYERS = ("raw", "counts", "data")  # the first that exists is X


def is_soma(path: Path) -> bool:
    """Whether a path is a SOMA experiment or a query."""
    return path.name.endswith(QUERY) or ((path / "__tiledb_group.tdb").exists() and (path / "ms").is_dir())


class SomaRows:
    """A sparse cells x genes matrix of an experiment; a slice of rows is a CSR matrix in memory."""

    layout = "sparse, TileDB"

    def __init__(self, array: Any, joinids: np.ndarray, n_vars: int) -> None:
        self.array, self.joinids, self.shape = array, joinids, (len(joinids), n_vars)
        self.dtype = np.dtype(array.schema.field("soma_data").type.to_pandas_dtype())

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        joinids = self.joinids[rows]
        table = self.array.read((joinids,)).tables().concat()
        cells, genes, values = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
        return sp.csr_matrix((values, (np.searchsorted(joinids, cells), genes)), shape=(len(joinids), self.shape[1]))


def open_soma(path: Path) -> tuple[list[Any], pd.DataFrame, pd.DataFrame, Any]:
    """Open an experiment or a query.

    Returns:
        The matrices (first the one that becomes X, then pairs of name and matrix), `obs`, `var`, and the open
        experiment.

    Raises:
        FileError: If TileDB-SOMA is not installed, the query has an unknown form, or no cell passes its filter.
    """
    try:
        import tiledbsoma
    except ImportError as error:
        raise FileError(f"{path} needs TileDB-SOMA. Install `scmmgpt[census]`.") from error
    query = _read_query(path)
    experiment = tiledbsoma.Experiment.open(query["uri"])
    try:
        measurement = experiment.ms[query.get("measurement", "RNA")]
        obs = experiment.obs.read(value_filter=query.get("value_filter")).concat().to_pandas()
        var = measurement.var.read().concat().to_pandas().sort_values("soma_joinid")
        names = sorted(measurement.X, key=lambda name: (BEST_LAYERS.index(name) if name in BEST_LAYERS else 9, name))
    except (KeyError, tiledbsoma.SOMAError) as error:
        raise FileError(f"{path}: {' '.join(str(error).split())[:200]}") from error
    if obs.empty:
        raise FileError(f"{path}: no cell of {query['uri']} passes {query.get('value_filter')!r}. Relax the filter.")
    obs = obs.sort_values("soma_joinid")
    joinids, n_vars = obs["soma_joinid"].to_numpy(), int(var["soma_joinid"].max()) + 1
    if n_vars != len(var):
        raise FileError(f"{path}: the ids of its genes have gaps. Copy the experiment with TileDB-SOMA.")
    first, *others = ((name, SomaRows(measurement.X[name], joinids, n_vars)) for name in names)
    return [first[1], *others], _named(obs, CELL_NAMES), _named(var, GENE_NAMES), experiment


def _read_query(path: Path) -> dict[str, str]:
    if path.is_dir():
        return {"uri": str(path)}
    try:
        query = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(f"{path} is not JSON ({error}).") from error
    if not isinstance(query, dict) or "uri" not in query or set(query) - set(FIELDS):
        raise FileError(f"{path} must have the field uri, and may have {', '.join(FIELDS[1:])}. It has {query}.")
    uri = str(query["uri"])
    return {**query, "uri": uri if "://" in uri else str(path.parent / uri)}


def _named(table: pd.DataFrame, columns: tuple[str, ...]) -> pd.DataFrame:
    """The table with the names of cells or genes as its index."""
    column = next((name for name in columns if name in table), "soma_joinid")
    index = pd.Index(table[column].astype(str).to_numpy())
    return table.drop(columns=["soma_joinid", column], errors="ignore").set_index(index)

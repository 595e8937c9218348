"""Files of cells: `read_file` opens all formats, in memory or on disk, or raises one clear error.

    adata = read_file("cells.h5ad")                     # in memory
    file = read_file("atlas.h5ad", backed=True)         # on disk: a slice loads its rows
    adata = file[:10_000].to_memory()                   # some of the cells

| format                                       | matrix on disk                    | larger than memory            |
| -------------------------------------------- | --------------------------------- | ----------------------------- |
| `.h5ad`, `.zarr`, `.h5mu` (its RNA part)     | sparse or dense, by row or column | by rows; if by column, slowly |
| 10x `.h5` (version 2, version 3, CellBender) | sparse, by cell                   | by rows                       |
| `.loom`                                      | dense, genes x cells              | by rows                       |
| mtx folder of 10x, STARsolo, kallisto        | text triplets                     | no: loaded as sparse          |
| `.csv`, `.tsv`, `.txt`, also compressed      | text, either way round            | no: loaded as sparse          |
"""

import bz2
import gzip
import logging
import lzma
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp


logger = logging.getLogger(__name__)

COLUMN_BLOCK_BYTES = 2**27  # of a matrix stored by column: size of the block of rows that is kept in memory
COLUMN_ENTRIES = 2**23  # of a matrix stored by column: entries loaded at a time
KNOWN = ".h5ad, .zarr, .h5mu, 10x .h5, a folder with matrix.mtx, .loom, .csv, .tsv"
# Common gene names, in any species' spelling: the side of a table with more of them is the genes' side.
GENE_NAME = re.compile(r"^(ENS[A-Z]*G\d{6,}|RP[LS]\d+|MT-|ACTB$|GAPDH$|B2M$|MALAT1$|CD\d+[A-Z]?$|HLA-|EEF1A1$)", re.I)


class DiskRows:
    """A sparse matrix on disk (HDF5 or Zarr), compressed by row (CSR); a slice of rows is a matrix in memory.

    `anndata.io.sparse_dataset` is as fast for slices of 1,024 rows, but five times slower for the slices of 64 rows
    that samples consist of. It requires attributes that 10x files lack. `shape` is cells x variables.
    """

    layout = "sparse, by row"
    compressed_axis = 0

    def __init__(self, data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> None:
        self.data, self.indices, self.shape, self.dtype = data, indices, shape, data.dtype
        self.indptr = np.asarray(indptr[:], dtype=np.int64)
        self.n_bytes = data.shape[0] * (data.dtype.itemsize + indices.dtype.itemsize)
        size = shape[self.compressed_axis]
        if len(self.indptr) != size + 1 or self.indptr[-1] != data.shape[0]:
            raise ValueError(
                f"A sparse matrix of {size} {('rows', 'columns')[self.compressed_axis]} has {len(self.indptr)} "
                f"pointers up to {self.indptr[-1]} and {data.shape[0]} values: the file is damaged. Write or copy it "
                "again."
            )

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        start, stop = _bounds(rows, self.shape[0])
        return sp.csr_matrix(self._entries(start, stop), shape=(stop - start, self.shape[1]))

    def _entries(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Data, indices and indptr of some compressed rows (of `DiskColumns`, of some columns)."""
        first, last = int(self.indptr[start]), int(self.indptr[stop])
        return self.data[first:last], self.indices[first:last], self.indptr[start : stop + 1] - first


class DiskColumns(DiskRows):
    """A sparse matrix on disk, compressed by column (CSC); a slice of rows is a matrix in memory.

    A block of rows takes a pass over the whole matrix, and only the last block is kept: load rows in order.
    `anndata.io.sparse_dataset` loads the whole matrix for every slice of rows.
    """

    layout = "sparse, by column"
    compressed_axis = 1

    def __init__(self, data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> None:
        super().__init__(data, indices, indptr, shape)
        self._block_rows = max(1, min(shape[0], shape[0] * COLUMN_BLOCK_BYTES // max(1, self.n_bytes)))
        self._block, self._rows = -1, sp.csr_matrix((0, shape[1]))

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        start, stop = _bounds(rows, self.shape[0])
        parts = []
        for block in range(start // self._block_rows, max(stop - 1, start) // self._block_rows + 1):
            first = block * self._block_rows
            if block != self._block:
                self._block, self._rows = -1, self._rows[:0]  # free the last block before the next is gathered
                self._rows = self._gather(first, min(first + self._block_rows, self.shape[0]))
                self._block = block
            parts.append(self._rows[max(start - first, 0) : stop - first])
        return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")

    def _gather(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows of the matrix, gathered from one run of columns after another."""
        parts, first = [], 0
        while first < self.shape[1]:
            last = int(np.searchsorted(self.indptr, self.indptr[first] + COLUMN_ENTRIES, side="right")) - 1
            last = min(max(last, first + 1), self.shape[1])
            columns = sp.csc_matrix(self._entries(first, last), shape=(self.shape[0], last - first))
            parts.append(columns[start:stop])
            first = last
        return sp.hstack(parts, format="csr")


class DiskTransposed:
    """A dense genes x cells array on disk, as cells x genes."""

    def __init__(self, array: Any) -> None:
        self.array, self.dtype = array, array.dtype
        self.shape = (array.shape[1], array.shape[0])

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.array[:, rows].T


class RowSlice:
    """Some consecutive rows of a matrix on disk, still on disk."""

    def __init__(self, matrix: Any, start: int, stop: int) -> None:
        self.matrix, self.start, self.dtype = matrix, start, matrix.dtype
        self.shape = (stop - start, matrix.shape[1])

    def __getitem__(self, rows: slice) -> Any:
        start, stop = _bounds(rows, self.shape[0])
        return self.matrix[self.start + start : self.start + stop]


def _bounds(rows: slice, n_rows: int) -> tuple[int, int]:
    start, stop, _ = rows.indices(n_rows)
    return start, max(start, stop)


class RawPart(NamedTuple):
    """The `raw` part of a file: a matrix with variables of its own."""

    X: Any
    var: pd.DataFrame


@dataclass
class CellFile:
    """A file of cells with the parts of an AnnData, tables in memory, matrices on disk.

    `scmmgpt.reading_scmmgpt` takes it in place of an AnnData. A slice of cells is a `CellFile` again, still on disk.
    """

    X: Any
    obs: pd.DataFrame
    var: pd.DataFrame
    layers: dict[str, Any] = field(default_factory=dict)
    raw: RawPart | None = None
    uns: dict[str, Any] = field(default_factory=dict)
    handle: Any = None

    def __post_init__(self) -> None:
        self.shape = self.n_obs, self.n_vars = len(self.obs), len(self.var)
        self.obs_names, self.var_names = self.obs.index, self.var.index
        for name, matrix in {"X": self.X, **self.layers}.items():
            if matrix is not None and tuple(matrix.shape) != self.shape:
                raise ValueError(
                    f"{name} has shape {tuple(matrix.shape)}, but the file names {self.n_obs} cells and "
                    f"{self.n_vars} variables: the file is damaged. Write it again."
                )

    def __getitem__(self, rows: slice) -> "CellFile":
        start, stop = _bounds(rows, self.n_obs)
        return replace(
            self,
            X=None if self.X is None else RowSlice(self.X, start, stop),
            obs=self.obs.iloc[start:stop],
            layers={name: RowSlice(matrix, start, stop) for name, matrix in self.layers.items()},
            raw=None if self.raw is None else RawPart(RowSlice(self.raw.X, start, stop), self.raw.var),
        )

    def to_memory(self) -> anndata.AnnData:
        """An AnnData of these cells."""
        adata = anndata.AnnData(
            None if self.X is None else self.X[: self.n_obs],
            obs=self.obs.copy(),
            var=self.var.copy(),
            layers={name: matrix[: self.n_obs] for name, matrix in self.layers.items()},
            uns=dict(self.uns),
        )
        if self.raw is not None:
            adata.raw = anndata.AnnData(self.raw.X[: self.n_obs], obs=adata.obs[[]], var=self.raw.var.copy())
        return adata

    def close(self) -> None:
        """Close the file, and with it the matrices on disk."""
        if hasattr(self.handle, "close"):
            self.handle.close()

    def __enter__(self) -> "CellFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- opening ----------------------------------------------------------------------------------------------------------


def read_file(path: str | Path, *, backed: bool = False) -> anndata.AnnData | CellFile:
    """Open a file or folder of cells of any known format.

    Args:
        path: File or folder.
        backed: Leave the matrices on disk, for files larger than memory.

    Returns:
        An AnnData, or with `backed` a `CellFile`, which has the same parts.

    Raises:
        FileNotFoundError: If `path` does not exist.
        ValueError: If the file is empty, truncated, damaged or of an unknown format.
    """
    path = Path(path)
    kind, opener = _format(path)
    try:
        if kind == "h5ad" and not backed:
            _open_hdf5(path).close()  # whose errors for damaged files are clearer
            return anndata.read_h5ad(path)
        if kind == "zarr" and not backed:
            return anndata.read_zarr(path)
        if kind == "h5mu" and not backed:
            with _open_hdf5(path) as file:
                return anndata.io.read_elem(_rna(path, file))
        file = opener(path)
        return file if backed else file.to_memory()
    except (ValueError, TypeError, FileNotFoundError):
        raise
    except Exception as error:  # h5py, zarr, pandas and anndata raise many kinds for a damaged file
        raise ValueError(
            f"{path} cannot be read as {kind} ({type(error).__name__}: {error}): it is damaged or of another format. "
            "Write or copy it again."
        ) from error


def _format(path: Path) -> tuple[str, Callable[[Path], CellFile]]:
    """Name and opener of a file's format, by its name, else by its contents."""
    if not path.exists():
        similar = sorted(p.name for p in path.parent.glob("*") if p.name.startswith(path.name.split(".")[0]))[:3]
        hint = f" That folder has {', '.join(similar)}." if similar else ""
        raise FileNotFoundError(f"There is no file {path}.{hint}")
    if path.is_dir():
        if any((path / marker).exists() for marker in (".zattrs", ".zgroup", "zarr.json")):
            return "zarr", _open_zarr
        if _find(path, "matrix.mtx", "mtx"):
            return "mtx", _open_mtx
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(f"The folder {path} is neither a .zarr nor has it a matrix.mtx (it holds {inside}).")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty (0 bytes): the copy or download failed. Copy it again.")
    name = path.name.lower()
    if name.endswith((".rds", ".rda", ".rdata", ".h5seurat", ".qs")):
        raise ValueError(
            f"{path.name} is an R object. Save it from R with `anndataR::write_h5ad(seurat_object, 'cells.h5ad')` (or "
            "`anndataR::as_AnnData` for a SingleCellExperiment) and pass the .h5ad file."
        )
    if name.endswith((".mtx", ".mtx.gz")):
        return "mtx", _open_mtx
    if re.search(r"\.(csv|tsv|txt|tab)(\.gz|\.bz2|\.xz)?$", name):
        return "table", _open_table
    if name.endswith(".loom"):
        return "loom", _open_loom
    if h5py.is_hdf5(path) or name.endswith((".h5ad", ".h5", ".hdf5", ".h5mu")):
        return _format_of_hdf5(path)
    raise ValueError(f"{path} is of an unknown format. Known are {KNOWN}.")


def _format_of_hdf5(path: Path) -> tuple[str, Callable[[Path], CellFile]]:
    with _open_hdf5(path) as file:
        if "row_attrs" in file and "matrix" in file:
            return "loom", _open_loom
        if "matrix" in file or (any("barcodes" in g for g in file.values() if isinstance(g, h5py.Group))):
            return "10x", _open_10x
        if "mod" in file:
            return "h5mu", _open_h5mu
        if "obs" in file and "var" in file:
            return "h5ad", _open_h5ad
        inside = ", ".join(list(file)[:8])
        raise ValueError(f"{path} is HDF5, but neither AnnData, MuData, 10x nor loom (it holds {inside}).")


def _open_hdf5(path: Path) -> h5py.File:
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} is compressed by gzip as a whole: run `gunzip` on it first.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        found = re.search(r"eof = (\d+).*stored_eof = (\d+)", str(error))
        if found:
            raise ValueError(
                f"{path} is truncated: {int(found[1]):,} of {int(found[2]):,} bytes are there. The copy or download "
                "stopped early; copy it again."
            ) from error
        raise ValueError(
            f"{path} is not an HDF5 file, in spite of its name (it starts with {start!r}). Known are {KNOWN}."
        ) from error


def _attribute(group: Any, name: str) -> Any:
    value = group.attrs.get(name)
    return value.decode() if isinstance(value, bytes) else value


def _disk_matrix(element: Any) -> Any:
    """A matrix of an AnnData on disk, HDF5 or Zarr, sparse or dense; it stays on disk."""
    if not hasattr(element, "keys"):
        return element
    encoding = str(_attribute(element, "encoding-type") or _attribute(element, "h5sparse_format") or "csr")
    shape = _attribute(element, "shape")
    shape = _attribute(element, "h5sparse_shape") if shape is None else shape
    n_cells, n_vars = (int(n) for n in shape)
    matrix = DiskColumns if "csc" in encoding else DiskRows
    return matrix(element["data"], element["indices"], element["indptr"], (n_cells, n_vars))


def _annotated(group: Any, handle: Any) -> CellFile:
    """The AnnData in an HDF5 or Zarr group; its matrices stay on disk."""
    read = anndata.io.read_elem
    raw = group["raw"] if "raw" in group and hasattr(group["raw"], "keys") and "X" in group["raw"] else None
    return CellFile(
        _disk_matrix(group["X"]) if "X" in group else None,
        read(group["obs"]),
        read(group["var"]),
        layers={name: _disk_matrix(group["layers"][name]) for name in group.get("layers", {})},
        raw=None if raw is None else RawPart(_disk_matrix(raw["X"]), read(raw["var"])),
        uns=dict(read(group["uns"])) if "uns" in group else {},
        handle=handle,
    )


def _open_h5ad(path: Path) -> CellFile:
    file = _open_hdf5(path)
    if not isinstance(file["obs"], h5py.Dataset):
        return _annotated(file, file)
    # AnnData before version 0.7 stored tables as structured arrays; anndata converts them, in memory.
    file.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adata = anndata.read_h5ad(path)
    raw = None if adata.raw is None else RawPart(adata.raw.X, adata.raw.var)
    return CellFile(adata.X, adata.obs, adata.var, layers=dict(adata.layers), raw=raw, uns=dict(adata.uns))


def _open_h5mu(path: Path) -> CellFile:
    file = _open_hdf5(path)
    return _annotated(_rna(path, file), file)


def _rna(path: Path, file: h5py.File) -> h5py.Group:
    for name in ("rna", "gex", "RNA", "GEX"):
        if name in file["mod"]:
            return file["mod"][name]
    raise ValueError(f"{path} has no `rna` modality, only {', '.join(file['mod'])}; pass a file of gene expression.")


def _open_zarr(path: Path) -> CellFile:
    import zarr

    group = zarr.open_group(str(path), mode="r")
    if "obs" not in group or "var" not in group:
        inside = ", ".join(list(group.keys())[:8])
        raise ValueError(f"{path} is a Zarr store, but no AnnData (it holds {inside}); write one with `write_zarr`.")
    return _annotated(group, group)


def _text(array: Any) -> list[str]:
    return [v.decode() if isinstance(v, bytes) else str(v) for v in np.asarray(array[:]).ravel()]


def _open_10x(path: Path) -> CellFile:
    """10x Genomics' HDF5: version 3 has a group `matrix`, version 2 a group per genome; CellBender writes either."""
    file = _open_hdf5(path)
    groups = ["matrix"] if "matrix" in file else [name for name in file if "barcodes" in file[name]]
    if len(groups) > 1:
        raise ValueError(
            f"{path} holds several genomes ({', '.join(groups)}), each a matrix of its own. Read one with "
            "`scanpy.read_10x_h5(path, genome=...)` and save it as .h5ad."
        )
    group = file[groups[0]]
    n_vars, n_cells = (int(n) for n in group["shape"][:])
    matrix = DiskRows(group["data"], group["indices"], group["indptr"], (n_cells, n_vars))
    if "features" in group:
        features, names = group["features"], group["features"]["name"]
        columns = {"gene_ids": "id", "feature_types": "feature_type", "genome": "genome"}
        table = {name: _text(features[stored]) for name, stored in columns.items() if stored in features}
    else:
        table, names = {"gene_ids": _text(group["genes"])}, group["gene_names"]
    var = pd.DataFrame(table, index=pd.Index(_text(names)))
    return CellFile(matrix, pd.DataFrame(index=pd.Index(_text(group["barcodes"]))), var, handle=file)


def _open_loom(path: Path) -> CellFile:
    """Loom: a dense genes x cells matrix with attributes of rows and columns."""
    file = _open_hdf5(path)
    n_vars, n_cells = file["matrix"].shape

    def table(group: h5py.Group, n: int, names: tuple[str, ...]) -> pd.DataFrame:
        columns = {k: group[k] for k in group if isinstance(group[k], h5py.Dataset) and group[k].shape == (n,)}
        frame = pd.DataFrame({k: _text(v) if v.dtype.kind in "OS" else v[:] for k, v in columns.items()})
        index = next((name for name in names if name in frame), None)
        frame.index = pd.Index([str(i) for i in range(n)] if index is None else frame[index].astype(str).tolist())
        return frame

    return CellFile(
        DiskTransposed(file["matrix"]),
        table(file["col_attrs"], n_cells, ("CellID", "obs_names", "barcode", "Barcode")),
        table(file["row_attrs"], n_vars, ("Gene", "var_names", "gene_symbols", "Accession")),
        layers={name: DiskTransposed(file["layers"][name]) for name in file.get("layers", {})},
        handle=file,
    )


# -- text -------------------------------------------------------------------------------------------------------------


def _find(folder: Path, *endings: str) -> Path | None:
    """The file of a folder whose name, without `.gz`, ends in one of `endings`; GEO adds prefixes."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    found = (f for ending in endings for f in files if f.name.lower().removesuffix(".gz").endswith(ending))
    return next(found, None)


def _open_mtx(path: Path) -> CellFile:
    """Matrix Market with a table of features and one of barcodes (10x, STARsolo, kallisto|bustools, alevin)."""
    from scipy.io import mmread

    folder = path if path.is_dir() else path.parent
    matrix_path = (_find(folder, "matrix.mtx", "mtx") if path.is_dir() else path) or path
    features_path = _find(folder, "features.tsv", "genes.tsv", "genes.txt", "features.txt", "cols.txt")
    barcodes_path = _find(folder, "barcodes.tsv", "barcodes.txt", "rows.txt")
    for wanted, found in (("features.tsv or genes.tsv", features_path), ("barcodes.tsv", barcodes_path)):
        if found is None:
            raise FileNotFoundError(f"Beside {matrix_path.name} there is no {wanted} in {folder}; copy it there.")
    try:
        matrix = sp.csr_matrix(mmread(matrix_path))
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{matrix_path} is truncated or no Matrix Market file ({error}). Copy it again.") from error
    features = pd.read_csv(features_path, sep="\t", header=None, dtype=str, keep_default_na=False)
    barcodes = pd.read_csv(barcodes_path, sep="\t", header=None, dtype=str, keep_default_na=False)[0]
    if matrix.shape == (len(features), len(barcodes)):  # 10x: genes x cells
        matrix = matrix.T.tocsr()
    if matrix.shape != (len(barcodes), len(features)):
        raise ValueError(
            f"{matrix_path.name} is {matrix.shape[0]} x {matrix.shape[1]}, but there are {len(features)} features and "
            f"{len(barcodes)} barcodes: the files do not belong together. Copy all three from one source."
        )
    names = features[min(features.shape[1] - 1, 1)]  # the second column, or the only one
    stored = {"gene_ids": 0, "feature_types": 2} if features.shape[1] > 1 else {}
    table = {name: features[column].tolist() for name, column in stored.items() if column in features}
    var = pd.DataFrame(table, index=pd.Index(names.tolist()))
    return CellFile(matrix, pd.DataFrame(index=pd.Index(barcodes.tolist())), var)


def _open_table(path: Path) -> CellFile:
    """A text table with names in the first row and column, cells x genes or genes x cells, parsed in blocks."""
    separator, n_comments = _layout(path)
    columns: list[str] = []
    blocks: list[sp.csr_matrix] = []
    notes: list[pd.DataFrame] = []
    layout: dict[str, Any] = {"sep": separator, "index_col": 0, "skiprows": n_comments, "low_memory": False}
    try:
        for block in pd.read_csv(path, chunksize=2000, **layout):
            numeric = block.select_dtypes(include=["number", "bool"])
            found = [str(name) for name in numeric.columns]
            if blocks and found != columns:
                wrong = sorted(set(found) ^ set(columns))[0]
                value = next((v for v in block[wrong] if _not_a_number(v)), "numbers")
                raise ValueError(f"Column {wrong!r} of {path} mixes {value!r} and numbers; keep one of both.")
            columns = found
            block.index = block.index.map(str)
            notes.append(block.drop(columns=numeric.columns))
            blocks.append(sp.csr_matrix(numeric.to_numpy(dtype=np.float32)))
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path} is empty; copy the file again.") from error
    except (pd.errors.ParserError, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or no table of numbers ({error}); write or copy it again.") from error
    if not columns:
        raise ValueError(
            f"{path} has no column of numbers (separator {separator!r}). Write cells in rows, genes in columns and "
            "names in the first row and column, or the transposed table."
        )
    rows = pd.concat(notes)
    if not any(_not_a_number(name) for name in (*columns, *rows.index)):
        raise ValueError(
            f"{path} has numbers only (its first row starts with {', '.join(columns[:3])}). Add a first row or column "
            "with the names of the genes."
        )
    matrix = sp.vstack(blocks, format="csr")
    column_names = pd.DataFrame(index=pd.Index(columns))
    in_rows, in_columns = (np.mean([bool(GENE_NAME.match(n)) for n in names]) for names in (rows.index, columns))
    if in_rows > in_columns:
        logger.info("%s has genes in its rows: it is transposed.", path.name)
        return CellFile(matrix.T.tocsr(), column_names, rows)
    return CellFile(matrix, rows, column_names)


def _layout(path: Path) -> tuple[str, int]:
    """Separator of a table, and the number of comment lines before its header."""
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8", errors="replace") as file:
            n_comments, line = 0, file.readline()
            while line.startswith("#"):
                n_comments, line = n_comments + 1, file.readline()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}). Copy it again.") from error
    separator = max(("\t", ",", ";"), key=line.count)
    return (separator if separator in line else r"\s+"), n_comments


def _not_a_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return True
    return False

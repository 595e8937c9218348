"""Files of cells: `read_file` opens every supported format, in memory or on disk, or raises an error of one line.

    adata = read_file("cells.h5ad")                     # in memory
    file = read_file("atlas.h5ad", backed=True)         # on disk: a slice loads its rows
    adata = file[:10_000].to_memory()                   # some of the cells

| format                                       | matrix on disk                    | larger than memory            |
| -------------------------------------------- | --------------------------------- | ----------------------------- |
| `.h5ad`, `.zarr`, `.h5mu` (its RNA part)     | sparse or dense, by row or column | by rows; if by column, slowly |
| 10x `.h5` (version 2, version 3, CellBender) | sparse, by cell                   | by rows                       |
| `.loom`                                      | dense, genes x cells              | by rows                       |
| SOMA experiments and queries of one (`soma`) | sparse, by cell and gene          | by rows                       |
| `.mtx` (`mtx_folders`), of many pipelines    | text triplets                     | no: loaded as sparse          |
| `.csv`, `.tsv`, `.txt` (`text_tables`)       | text, wide or long                | no: loaded as sparse          |

`disk_checks` refuses files with missing chunks, which HDF5 and Zarr would read as zeros. Every reader notes its
decisions in `CellFile.notes`.
"""

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.readers.disk_checks import attribute, check_indices, check_links, check_parts, check_stored
from scmmgpt.readers.disk_parts import DiskColumns, DiskDense, DiskRows, DiskTable, DiskTransposed, RowSlice, bounds
from scmmgpt.readers.mtx_folders import find_inside, find_matrices, is_zarr, list_paths, read_mtx
from scmmgpt.readers.soma import is_soma, open_soma
from scmmgpt.readers.text_tables import Contents, FileError, read_table
from scmmgpt.rows_scmmgpt import layers_of


logger = logging.getLogger(__name__)

KNOWN = ".h5ad, .zarr, SOMA, .h5mu, 10x .h5, a folder with matrix.mtx, .loom, .csv, .tsv, .txt"
FIRST_BYTES = 40  # of a file that is no HDF5, for its error
# First bytes of other formats -> the format.
MAGIC = {
    b"PK": "a ZIP archive or a spreadsheet",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"(\xb5/\xfd": "compressed by zstd",
    b"%PDF": "a PDF file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"RDX": "an R object",
    b"PAR1": "a Parquet file",
}
# File names of unsupported formats -> the remedy.
UNREAD = {
    r"\.(rds|rda|rdata|h5seurat|qs)(\.gz)?$": "is an R object. Save it from R with "
    "`anndataR::write_h5ad(seurat_object, 'cells.h5ad')` (or `anndataR::as_AnnData` for a SingleCellExperiment) and "
    "pass the .h5ad file.",
    r"\.(h5|h5ad|h5mu|hdf5|loom)\.(gz|bz2|xz|zst)$": "is compressed as a whole: run `gunzip` (or bunzip2, unxz, "
    "unzstd) on it first, and pass the file that comes out.",
    r"\.(tar|tgz|zip|7z|rar|zst)$|\.tar\.(gz|bz2|xz)$": "is an archive: unpack it first, and pass the file or folder "
    "of cells in it.",
    r"\.(xls|xlsx|xlsm|ods)$": "is a spreadsheet. Save it as .csv, and check that no gene became a date (SEPT2).",
    r"\.(parquet|feather|arrow)$": "is a table in an unsupported format. Save it as .csv "
    "(`pandas.read_parquet(file).to_csv('cells.csv')`, for instance).",
}


class RawPart(NamedTuple):
    """The `raw` part of a file: a cells x variables matrix and its own variables."""

    X: Any
    var: pd.DataFrame


@dataclass
class CellFile:
    """A file of cells with the attributes of an AnnData.

    Matrices of HDF5, Zarr and SOMA stay on disk; those of text files are in memory. All keep the values of the file.
    `obs` and `var` are in memory, except that `obs` may be a `DiskTable`. `scmmgpt.reading_scmmgpt` accepts a
    `CellFile` in place of an AnnData. A slice of cells is a `CellFile` of the same kind.
    """

    X: Any
    obs: Any
    var: pd.DataFrame
    layers: dict[str, Any] = field(default_factory=dict)
    raw: RawPart | None = None
    uns: dict[str, Any] = field(default_factory=dict)
    handle: Any = None
    obsm: dict[str, Any] = field(default_factory=dict)  # entries that a command adds; those of the file stay on disk
    notes: list[str] = field(default_factory=list)  # decisions of the reader, in sentences

    def __post_init__(self) -> None:
        self.shape = self.n_obs, self.n_vars = len(self.obs), len(self.var)
        self.var_names = self.var.index
        matrices = {name: (matrix, self.n_vars) for name, matrix in {"X": self.X, **self.layers}.items()}
        matrices |= {} if self.raw is None else {"raw": (self.raw.X, len(self.raw.var))}
        for name, (matrix, n_vars) in matrices.items():
            if matrix is not None and tuple(matrix.shape) != (self.n_obs, n_vars):
                raise FileError(
                    f"{name} has shape {tuple(matrix.shape)}, but the file names {self.n_obs} cells and {n_vars} "
                    "variables: the file is damaged. Write it again."
                )

    @property
    def obs_names(self) -> pd.Index:
        """Names of the cells."""
        return self.obs.index

    def __getitem__(self, rows: slice) -> "CellFile":
        start, stop = bounds(rows, self.n_obs)
        return replace(
            self,
            X=None if self.X is None else RowSlice(self.X, start, stop),
            obs=self.obs.iloc[start:stop],
            layers={name: RowSlice(matrix, start, stop) for name, matrix in self.layers.items()},
            raw=None if self.raw is None else RawPart(RowSlice(self.raw.X, start, stop), self.raw.var),
        )

    def to_memory(self) -> anndata.AnnData:
        """Load these cells as an AnnData."""
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
        """Close the file. Matrices in HDF5 can no longer be read."""
        if hasattr(self.handle, "close"):
            self.handle.close()

    def __enter__(self) -> "CellFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- opening ----------------------------------------------------------------------------------------------------------


def read_file(
    path: str | Path, *, backed: bool = False, gene_index: GeneIndex | None = None, obs_on_disk: bool = False
) -> anndata.AnnData | CellFile:
    """Open a file or folder of cells of any supported format.

    The reader logs its decisions as warnings: the matrix that it chose from a folder, the axis of a table that has the
    genes, and the columns that are not genes. Values are those of the file; nothing is normalised.

    Args:
        path: File or folder.
        backed: Leave the matrices on disk, for files larger than memory.
        gene_index: The genes of a model. With those of GENCODE, they decide which axis of a text table has the genes.
        obs_on_disk: With `backed`, also leave `obs` of an `.h5ad` or a Zarr store on disk, as a `DiskTable`.

    Returns:
        An AnnData, or with `backed` a `CellFile`, which has the same attributes.

    Raises:
        FileNotFoundError: If `path`, or a table beside a matrix, does not exist.
        ValueError: If the file is empty, truncated, damaged or of an unknown format, or holds several data sets.
    """
    path = Path(path)
    kind, opener, path, notes = _format(path, gene_index)
    with _one_line(path, kind):
        file = opener(path, obs_on_disk=True) if obs_on_disk and kind in ("h5ad", "zarr") else opener(path)
        file.notes[:0] = notes
        for note in file.notes:
            logger.warning("%s: %s", path.name, note)
        if backed:
            return file
        if kind not in ("h5ad", "zarr"):
            with file:
                adata = _modality(path, file) if kind == "h5mu" else file.to_memory()
        else:
            file.close()  # opened only to check the file
            adata = _read_h5ad(path) if kind == "h5ad" else anndata.read_zarr(path)
        raw = {} if adata.raw is None else {"raw": adata.raw.X}
        for name, matrix in {"X": adata.X, **layers_of(adata), **raw}.items():
            if sp.issparse(matrix):
                check_indices(matrix.indices, matrix.shape[1 if matrix.format == "csr" else 0], name)
        return adata


@contextmanager
def _one_line(path: Path, kind: str) -> Iterator[None]:
    """Convert errors of h5py, zarr, pandas and anndata into a `FileError` of one line that names the file."""
    try:
        yield
    except (FileError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        matches = [re.search(r"key '(.+?)' of .* from (\S+)", note) for note in getattr(error, "__notes__", ())]
        part = next((f" at {m[2].rstrip('/')}/{m[1]}" for m in matches if m), "")
        message = " ".join(str(error).split())[:300]
        if isinstance(error, ImportError):
            raise FileError(f"{path} needs a package that is not installed{part}: {message}") from error
        if isinstance(error, MemoryError):
            raise FileError(f"{path} does not fit in memory ({message}), or its sizes are damaged.") from error
        raise FileError(
            f"{path} cannot be read as {kind}{part} ({type(error).__name__}: {message}): it is damaged or of another "
            "format. Write or copy it again."
        ) from error


Opener = Callable[..., CellFile]


def _format(path: Path, gene_index: GeneIndex | None) -> tuple[str, Opener, Path, list[str]]:
    """The name of a file's format, its opener, the path to open and notes.

    The name of the file decides; if it is not known, the contents do.
    """
    if not path.exists():
        if path.is_symlink():
            raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist.")
        if re.match(r"(https?|ftp|s3|gs):/", str(path)):
            raise FileError(f"{path} is an address, not a file: download it, and pass the file.")
        similar = sorted(p.name for p in path.parent.glob("*") if p.name.startswith(path.name.split(".")[0]))[:3]
        hint = f" That folder has {', '.join(similar)}." if similar else ""
        raise FileNotFoundError(f"There is no file {path}.{hint}")
    if is_soma(path):
        return "soma", _open_soma, path, []
    if path.is_dir():
        return _format_of_folder(path, gene_index)
    if not path.stat().st_size:
        raise FileError(f"{path} is empty (0 bytes): the copy or download failed. Copy it again.")
    name = path.name.lower()
    for endings, remedy in UNREAD.items():
        if re.search(endings, name):
            raise FileError(f"{path.name} {remedy}")
    if name.endswith((".mtx", ".mtx.gz", ".mtx.bz2")):
        return "mtx", lambda path: _in_memory(read_mtx(path)), path, []
    if is_table(path):
        if re.search(r"(features|genes|barcodes)\.[ct]sv", name) and any(path.parent.glob("*.mtx*")):
            raise FileError(f"{path} has names, not counts: pass the matrix beside it, or the folder.")
        return "table", lambda path: _in_memory(_without_gaps(path, read_table(path, gene_index))), path, []
    if name.endswith(".loom"):
        return "loom", _open_loom, path, []
    if h5py.is_hdf5(path) or name.endswith((".h5ad", ".h5", ".hdf5", ".h5mu")):
        with _one_line(path, "HDF5"):
            return *_format_of_hdf5(path), path, []
    raise FileError(f"{path} is of an unknown format. Supported formats: {KNOWN}.")


def is_table(path: Path) -> bool:
    """Whether the name of a file is that of a text table, for which `read_file` uses `gene_index`."""
    return re.search(r"\.(csv|tsv|txt|tab|gct|st)(\.gz|\.bz2|\.xz)?$", path.name, re.IGNORECASE) is not None


def _format_of_folder(path: Path, gene_index: GeneIndex | None) -> tuple[str, Opener, Path, list[str]]:
    if is_zarr(path):
        inside = _find_anndata(path)
        notes = [] if inside == path else [f"{inside.relative_to(path)} of the store was read."]
        return "zarr", _open_zarr, inside, notes
    if find_matrices(path):
        return "mtx", lambda path: _in_memory(read_mtx(path)), path, []
    inside_folder = find_inside(path)
    if len(inside_folder) == 1:
        kind, opener, inside, notes = _format(inside_folder[0], gene_index)
        return kind, opener, inside, [f"{inside_folder[0].relative_to(path)} of the folder was read.", *notes]
    if inside_folder:
        raise FileError(
            f"The folder {path} holds {len(inside_folder)} data sets; pass one of them: {list_paths(inside_folder)}."
        )
    files = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FileError(f"The folder {path} is not a .zarr and has no matrix.mtx (it holds {files}).")


def _open_soma(path: Path) -> CellFile:
    (first, *others), obs, var, handle = open_soma(path)
    return CellFile(first, obs, var, layers=dict(others), handle=handle)


def _in_memory(contents: Contents) -> CellFile:
    return CellFile(contents.X, contents.obs, contents.var, layers=dict(contents.layers), notes=contents.notes)


# -- HDF5 and Zarr ----------------------------------------------------------------------------------------------------


def _format_of_hdf5(path: Path) -> tuple[str, Opener]:
    with _open_hdf5(path) as file:
        if "row_attrs" in file and "matrix" in file:
            return "loom", _open_loom
        if _genomes(file):
            return "10x", _open_10x
        if "mod" in file:
            return "h5mu", _open_h5mu
        if "obs" in file and "var" in file:
            return "h5ad", _open_h5ad
        inside = ", ".join(list(file)[:8]) or "nothing"
        raise FileError(f"{path} is HDF5, but neither AnnData, MuData, 10x nor loom (it holds {inside}).")


def _open_hdf5(path: Path) -> h5py.File:
    with open(path, "rb") as file:
        start = file.read(FIRST_BYTES)
    if start.startswith(b"\x1f\x8b"):
        raise FileError(f"{path} is compressed by gzip as a whole: run `gunzip` on it first.")
    try:
        opened = h5py.File(path, "r")
        check_links(opened)
        return opened
    except OSError as error:
        sizes = re.search(r"eof = (\d+).*stored_eof = (\d+)", str(error))
        if sizes:
            raise FileError(
                f"{path} is truncated: {int(sizes[1]):,} of {int(sizes[2]):,} bytes are there. The copy or download "
                "stopped early; copy it again."
            ) from error
        if "lock" in str(error):
            raise FileError(
                f"{path} is locked: another program has it open for writing. Close it there, or pass a copy."
            ) from error
        if h5py.is_hdf5(path):
            raise
        raise FileError(
            f"{path} is not an HDF5 file, despite its name ({first_words(start)}). Supported formats: {KNOWN}."
        ) from error


def first_words(start: bytes) -> str:
    r"""Say what a file is that begins with these bytes: empty, a known format, text or none of these.

    >>> first_words(b"gene,cell1\n3"), first_words(b"PK\x03\x04\x14"), first_words(b"")
    ("it is text: 'gene,cell1'", 'it is a ZIP archive or a spreadsheet', 'it is empty')
    >>> first_words(b"\x93\x00\xff"), first_words("\nzellen für".encode()[:-1])
    ('it is no text either', "it is text: 'zellen fü'")
    """
    if not start:
        return "it is empty"
    known = next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)
    if known is not None:
        return f"it is {known}"
    text = start.decode("utf-8-sig", errors="ignore")  # without a mark at the start, or half a letter at the end
    if len(text.encode()) < len(start) - 6 or not all(c.isprintable() or c.isspace() for c in text):
        return "it is no text either"
    lines = text.splitlines()
    return f"it is text: {next((line.strip() for line in lines if line.strip()), '')!r}"


def _disk_matrix(element: Any) -> Any:
    """Wrap a sparse or dense matrix of an AnnData in HDF5 or Zarr, without loading it."""
    if not hasattr(element, "keys"):
        return DiskDense(element)
    encoding = str(attribute(element, "encoding-type") or attribute(element, "h5sparse_format") or "csr")
    shape = attribute(element, "shape")
    shape = attribute(element, "h5sparse_shape") if shape is None else shape
    n_cells, n_vars = (int(n) for n in shape)
    matrix = DiskColumns if "csc" in encoding else DiskRows
    return matrix(element["data"], element["indices"], element["indptr"], (n_cells, n_vars))


def _annotated(group: Any, handle: Any, obs_on_disk: bool = False) -> CellFile:
    """Open the AnnData in an HDF5 or Zarr group. Matrices stay on disk."""
    read = anndata.io.read_elem
    check_parts(group)
    raw = group["raw"] if "raw" in group and hasattr(group["raw"], "keys") and "X" in group["raw"] else None
    return CellFile(
        _disk_matrix(group["X"]) if "X" in group else None,
        DiskTable(group["obs"]) if obs_on_disk and DiskTable.can_read(group["obs"]) else read(group["obs"]),
        read(group["var"]),
        layers={name: _disk_matrix(group["layers"][name]) for name in group.get("layers", {})},
        raw=None if raw is None else RawPart(_disk_matrix(raw["X"]), read(raw["var"])),
        uns=dict(read(group["uns"])) if "uns" in group else {},
        handle=handle,
    )


def _read_h5ad(path: Path) -> anndata.AnnData:
    """Read a file of any version of anndata, without the warnings about older layouts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return anndata.read_h5ad(path)


def _open_h5ad(path: Path, obs_on_disk: bool = False) -> CellFile:
    file = _open_hdf5(path)
    if not isinstance(file["obs"], h5py.Dataset):
        return _annotated(file, file, obs_on_disk)
    # AnnData before version 0.7 stored tables as structured arrays; anndata converts them, in memory.
    file.close()
    adata = _read_h5ad(path)
    raw = None if adata.raw is None else RawPart(adata.raw.X, adata.raw.var)
    return CellFile(adata.X, adata.obs, adata.var, layers=layers_of(adata), raw=raw, uns=dict(adata.uns))


def _open_h5mu(path: Path) -> CellFile:
    """Open the RNA of a MuData. `obs` also gets the columns that the modalities share."""
    file = _open_hdf5(path)
    name = _rna(path, file)
    cells = _annotated(file["mod"][name], file)
    shared = anndata.io.read_elem(file["obs"]) if "obs" in file else pd.DataFrame()
    added = [column for column in shared.columns if column not in cells.obs]
    if added and shared.index.is_unique:
        cells.obs = cells.obs.join(shared[added])
    left = [f"mod/{other}" for other in file["mod"] if other != name]
    left += [f"{part}/{key}" for part in ("obsm", "obsp", "uns") for key in file.get(part, {})]
    if left:
        cells.notes.append(f"mod/{name} was read; {list_paths(left)} is neither read nor written to the output.")
    return cells


def _rna(path: Path, file: h5py.File) -> str:
    for name in ("rna", "gex", "RNA", "GEX"):
        if name in file["mod"]:
            return name
    raise FileError(f"{path} has no `rna` modality, only {', '.join(file['mod'])}; pass a file of gene expression.")


def _modality(path: Path, file: CellFile) -> anndata.AnnData:
    """Load the RNA of a MuData with all its parts."""
    adata = anndata.io.read_elem(file.handle["mod"][_rna(path, file.handle)])
    adata.obs = file.obs
    return adata


def _find_anndata(store: Path) -> Path:
    """The AnnData of a Zarr store: the store itself, or the only one below it (SpatialData has it in `tables`)."""
    tables = sorted(p.parent for p in [store / "obs", *store.glob("*/obs"), *store.glob("*/*/obs")] if p.is_dir())
    tables = [p for p in tables if (p / "var").is_dir()]
    if store in tables or not tables:
        return store
    rna = [p for p in tables if p.parent.name == "mod" and p.name.lower() in ("rna", "gex")]
    if len(rna) == 1 or len(tables) == 1:
        return (rna or tables)[0]
    raise FileError(f"{store} holds {len(tables)} tables of cells; pass one of them: {list_paths(tables)}.")


def _open_zarr(path: Path, obs_on_disk: bool = False) -> CellFile:
    import zarr

    group = zarr.open_group(str(path), mode="r")
    if "obs" not in group or "var" not in group:
        inside = ", ".join(list(group.keys())[:8])
        raise FileError(f"{path} is a Zarr store without an AnnData (it holds {inside}). Write one with `write_zarr`.")
    return _annotated(group, group, obs_on_disk)


def _text(array: Any) -> list[str]:
    return [v.decode() if isinstance(v, bytes) else str(v) for v in np.asarray(check_stored(array)[:]).ravel()]


def _genomes(file: h5py.File) -> list[str]:
    """Groups of 10x HDF5 with a matrix: `matrix` in version 3, one group for each genome in version 2."""
    groups = {name: file.get(name) for name in file}  # `None` for a broken link
    return [k for k, g in groups.items() if isinstance(g, h5py.Group) and {"barcodes", "data", "indptr"} <= set(g)]


def _open_10x(path: Path) -> CellFile:
    """Open HDF5 of 10x Genomics, version 2 or 3. CellBender writes both versions."""
    file = _open_hdf5(path)
    groups = _genomes(file)
    if len(groups) > 1:
        raise FileError(
            f"{path} holds several genomes ({', '.join(groups)}), each a matrix of its own. Read one with "
            "`scanpy.read_10x_h5(path, genome=...)` and save it as .h5ad."
        )
    group = file[groups[0]]
    n_vars, n_cells = (int(n) for n in group["shape"][:])
    features = group.get("features", group)
    stored: dict[str, tuple[str, ...]] = {"name": ("name", "gene_names"), "gene_ids": ("id", "genes")}
    stored |= {"feature_types": ("feature_type",), "genome": ("genome",)}
    present = {k: next((n for n in names if n in features), None) for k, names in stored.items()}
    columns = {k: _text(features[name]) for k, name in present.items() if name is not None}
    names = columns.pop("name", columns.get("gene_ids"))
    barcodes = _text(group["barcodes"])
    wrong = {n: len(c) for n, c in {"name": names or [], **columns}.items() if len(c) != n_vars}
    if wrong or len(barcodes) != n_cells:
        raise FileError(
            f"{path} states {n_vars} features and {n_cells} cells, but has {len(barcodes)} barcodes and features of "
            f"other lengths ({wrong}): it is damaged. Write or copy it again."
        )
    matrix = DiskRows(group["data"], group["indices"], group["indptr"], (n_cells, n_vars))
    var = pd.DataFrame(columns, index=pd.Index(names))
    return CellFile(matrix, pd.DataFrame(index=pd.Index(barcodes)), var, handle=file)


def _without_gaps(path: Path, table: Contents) -> Contents:
    """Return the table, or refuse it if counts are missing: they may be zeros or the end of a truncated line."""
    matrix = table.X.tocoo()
    gaps = np.flatnonzero(np.isnan(matrix.data))
    if len(gaps):
        cell, gene = table.obs.index[matrix.row[gaps[0]]], table.var.index[matrix.col[gaps[0]]]
        raise FileError(
            f"{path} has {len(gaps):,} fields without a number (empty or NA), the first at cell {str(cell)!r}, gene "
            f"{str(gene)!r}. Write 0 if they are zeros; if lines were cut, copy the file again."
        )
    return table


def _open_loom(path: Path) -> CellFile:
    """Open loom: a dense genes x cells matrix with attributes of rows and columns."""
    file = _open_hdf5(path)
    lacking = [part for part in ("matrix", "row_attrs", "col_attrs") if part not in file]
    if lacking:
        raise FileError(f"{path} is not a complete loom file: it lacks {', '.join(lacking)}. Write or copy it again.")
    n_vars, n_cells = file["matrix"].shape

    def table(group: h5py.Group, n: int, names: tuple[str, ...]) -> pd.DataFrame:
        columns = {k: group[k] for k in group if isinstance(group[k], h5py.Dataset) and group[k].shape == (n,)}
        frame = pd.DataFrame({k: _text(v) if v.dtype.kind in "OS" else v[:] for k, v in columns.items()})
        index = next((name for name in names if name in frame), None)
        frame.index = pd.Index([str(i) for i in range(n)] if index is None else frame[index].astype(str).tolist())
        return frame

    return CellFile(
        DiskTransposed(file["matrix"]),
        table(file["col_attrs"], n_cells, ("CellID", "obs_names", "cell_names", "barcode", "Barcode")),
        table(file["row_attrs"], n_vars, ("Gene", "var_names", "gene_names", "gene_symbols", "Accession")),
        layers={name: DiskTransposed(file["layers"][name]) for name in file.get("layers", {})},
        handle=file,
    )

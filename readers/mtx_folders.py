"""Matrix Market files with their tables of features and barcodes, alone or in folders of any pipeline.

A matrix is read with the tables of its own sample: `GSM2_T2_matrix.mtx` with `GSM2_T2_barcodes.tsv`, never with
`GSM1_T1_barcodes.tsv`. A folder of several samples or matrices is refused with a list. Two kinds of folders are
accepted: the spliced, unspliced and ambiguous counts of one data set, and a `matrix.mtx` beside variants of it.
"""

import lzma
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scmmgpt.readers.text_tables import Contents, FileError, compression, first_lines


MAX_DEPTH = 6  # levels of folders below the given one that are searched for files of cells
MAX_LISTED = 12  # candidates in an error message
MTX = re.compile(r"\.mtx(\.gz|\.bz2)?$", re.IGNORECASE)
TABLE = re.compile(r"\.(tsv|txt|csv)(\.gz|\.bz2)?$", re.IGNORECASE)
CELL_FILE = re.compile(r"(\.(h5ad|h5mu|loom)|(?<!molecule_info)\.h5)$", re.IGNORECASE)
MIN_ENTRY_BYTES = 4  # the shortest line of an entry: "1 1\n"
MAX_PACKED = 1100  # upper bound of the compression ratio of gzip and bzip2 for text of numbers

_START, _END = r"(?:^|(?<=[._\- ]))", r"(?=[._\- ]|$)"
# Words for the kind of a file; the last one in its name decides. Parse Biosciences writes `all_genes.csv` and
# `cell_metadata.csv`, alevin-fry `quants_mat_cols.txt` and `quants_mat_rows.txt`.
KINDS = {
    "matrix": re.compile(rf"{_START}(count_matrix|matrix){_END}", re.IGNORECASE),
    "features": re.compile(
        rf"{_START}(all_genes|(features?|genes?)([._-]?names?|[._-]?ids?)?|cols?|var_names){_END}", re.IGNORECASE
    ),
    "barcodes": re.compile(
        rf"{_START}(cell[._-]?(names?|ids?|barcodes?|metadata)|barcodes?|cells?|rows?|obs_names){_END}", re.IGNORECASE
    ),
}
SPLICED, UNSPLICED, AMBIGUOUS = ("spliced", "mature"), ("unspliced", "nascent"), ("ambiguous",)
PARTS = SPLICED + UNSPLICED + AMBIGUOUS
# Words of file names that do not name a sample: variants of a matrix by STARsolo, kallisto and authors of data sets.
GENERIC = frozenset(PARTS) | frozenset(
    "cell nucleus total processed uniqueandmult em uniform rescue propunique raw filtered unfiltered counts count umi "
    "umis dge data expression mat sparse norm normalized normalised logcounts".split()
)
HEADER_WORDS = frozenset(
    "barcode barcodes cell cells cellid cell_id cell_barcode cb bc bc_wells x v1 index gene genes gene_id gene_ids "
    "geneid gene_name gene_names gene_symbol symbol feature features feature_id feature_name id name names".split()
)
ID_WORDS = ("gene_id", "gene_ids", "geneid", "feature_id", "ensembl_id", "id")
NAME_WORDS = ("gene_name", "gene_names", "gene_symbol", "symbol", "feature_name", "name", "gene", "genes")
CELLS_FIRST = re.compile(r"cells_x|quants_mat|count_matrix|^dge", re.IGNORECASE)  # files of cells x genes


class _Table(NamedTuple):
    """A table of features or barcodes."""

    path: Path
    frame: pd.DataFrame  # str; columns are called by position, or by the header
    has_header: bool


# -- folders ----------------------------------------------------------------------------------------------------------


def find_matrices(folder: Path) -> list[Path]:
    """Matrix Market files of a folder, without its subfolders."""
    return sorted(p for p in folder.iterdir() if p.is_file() and MTX.search(p.name) and not p.name.startswith("."))


def find_inside(folder: Path) -> list[Path]:
    """Data sets below a folder: folders with one matrix, single matrices, Zarr stores and files of cells."""
    found: list[Path] = []
    pending = [(folder, 0)]
    while pending:
        here, depth = pending.pop()
        matrices = find_matrices(here)
        found += [here] if matrices and _one_count(matrices) else matrices
        for entry in here.iterdir():
            if entry.is_dir() and is_zarr(entry):
                found.append(entry)
            elif entry.is_dir() and depth < MAX_DEPTH:
                pending.append((entry, depth + 1))
            elif entry.is_file() and CELL_FILE.search(entry.name):
                found.append(entry)
    return sorted(found)


def is_zarr(folder: Path) -> bool:
    """Whether a folder is a Zarr store."""
    return any((folder / marker).exists() for marker in (".zattrs", ".zgroup", "zarr.json"))


def list_paths(paths: Iterable[Path | str]) -> str:
    """Paths for an error message, at most `MAX_LISTED`."""
    names = [str(path) for path in paths]
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _one_count(matrices: list[Path]) -> list[Path]:
    """The matrix of a folder, or the parts that add up to it; empty if the folder holds several matrices."""
    if len(matrices) == 1:
        return matrices
    plain = [p for p in matrices if re.fullmatch(r"matrix\.mtx(\.gz|\.bz2)?", p.name, re.IGNORECASE)]
    if len({_sample(p) for p in matrices}) > 1:
        return []
    if len(plain) == 1:  # STARsolo writes `UniqueAndMult-EM.mtx` beside `matrix.mtx`
        return plain
    words = [_part(p) for p in matrices]
    if all(words) and len(set(words)) == len(words) and set(words) & set(SPLICED) and "ambiguous" in words:
        return matrices
    return []


def read_mtx(path: Path) -> Contents:
    """Read a Matrix Market file, or the matrix of a folder.

    Raises:
        FileNotFoundError: If a table is missing.
        FileError: If matrices or tables are ambiguous, do not belong together, or are damaged.
    """
    if path.is_file():
        return _read_one(path)
    matrices = find_matrices(path)
    chosen = _one_count(matrices)
    if not chosen:
        raise FileError(
            f"The folder {path} holds {len(matrices)} matrices: {list_paths(p.name for p in matrices)}. Pass the "
            "path of one matrix. It is read with the tables of the same name."
        )
    if len(chosen) > 1:
        return _read_parts(chosen)
    contents = _read_one(chosen[0])
    others = [p.name for p in matrices if p not in chosen]
    if others:
        contents.notes.append(f"{chosen[0].name} was read; the folder also holds {list_paths(others)}.")
    return contents


def _read_parts(paths: list[Path]) -> Contents:
    """Read the counts of a velocity pipeline: X is spliced + ambiguous, as in other tools; the parts are layers."""
    read = {_part(path): _read_one(path) for path in paths}
    first = next(iter(read.values()))
    if not all(c.obs.index.equals(first.obs.index) and c.var.index.equals(first.var.index) for c in read.values()):
        raise FileError(
            f"{list_paths(p.name for p in paths)} have different cells or genes: their counts cannot be added. Pass "
            "one of them."
        )
    return _count_parts(first, {word: contents.X for word, contents in read.items()})


def _count_parts(contents: Contents, layers: dict[str, sp.csr_matrix]) -> Contents:
    counted = [word for word in SPLICED + AMBIGUOUS if word in layers]
    total = sum((layers[word] for word in counted[1:]), layers[counted[0]]).tocsr()
    note = f"The matrix is {' + '.join(counted)}; the parts ({', '.join(layers)}) are layers."
    return contents._replace(X=total, layers=layers, notes=[*contents.notes, note])


# -- names of files ---------------------------------------------------------------------------------------------------


def _kind(path: Path) -> str:
    """The kind of a file by its name: `matrix`, `features` or `barcodes`; empty if unknown."""
    if MTX.search(path.name):
        return "matrix"
    if not TABLE.search(path.name):
        return ""
    stem = TABLE.sub("", path.name)
    ends = {kind: max((m.end() for m in KINDS[kind].finditer(stem)), default=0) for kind in ("features", "barcodes")}
    kind = max(ends, key=lambda kind: ends[kind])
    return kind if ends[kind] else ""


def _words(path: Path) -> list[str]:
    """Words of a file's name, without suffixes and without the word for its kind (`matrix`, `features`, ...)."""
    stem = TABLE.sub("", MTX.sub("", path.name))
    matches = list(KINDS[_kind(path)].finditer(stem))
    if matches:
        stem = f"{stem[: matches[-1].start()]} {stem[matches[-1].end() :]}"
    return [word for word in re.split(r"[._\- ]+", stem.lower()) if word]


def _sample(path: Path) -> tuple[str, ...]:
    """The words of a file's name that name the sample."""
    return tuple(word for word in _words(path) if word not in GENERIC)


def _part(path: Path) -> str:
    """Kind of the reads in a matrix (`spliced`, ...) by the file's name; empty if the name states none."""
    return next((word for word in _words(path) if word in PARTS), "")


def _candidates(matrix: Path, kind: str) -> list[Path]:
    """The tables of a kind that match a matrix by name.

    The first rule with a match applies: tables of the same sample; tables whose words are the first words of the
    sample, such as a table for all samples of a series; tables whose first words are those of the sample; the only
    table of features that belongs to no other matrix.
    """
    tables = [p for p in sorted(matrix.parent.iterdir()) if p.is_file() and _kind(p) == kind and p.name[0] != "."]
    mine = _sample(matrix)
    equal = [p for p in tables if _sample(p) == mine]
    if equal:
        return [p for p in equal if _words(p) == _words(matrix)] or equal
    others = {_sample(p) for p in find_matrices(matrix.parent)} - {mine}
    free = [p for p in tables if _sample(p) not in others]
    begin = [p for p in free if mine[: len(_sample(p))] == _sample(p)]
    if begin:
        longest = max(len(_sample(p)) for p in begin)
        shared = any(other[: len(_sample(begin[0]))] == _sample(begin[0]) for other in others)
        return [p for p in begin if len(_sample(p)) == longest] if kind == "features" or not shared else []
    longer = [p for p in free if _sample(p)[: len(mine)] == mine]
    if len({_sample(p) for p in longer}) == 1 and not (kind == "barcodes" and others):
        return longer
    return free if kind == "features" and len(free) == 1 else []


# -- one matrix -------------------------------------------------------------------------------------------------------


def _read_one(path: Path) -> Contents:
    from scipy.io import mminfo, mmread

    found = {kind: _candidates(path, kind) for kind in ("features", "barcodes")}
    # Barcodes with another sample name belong to the matrix only if the features have the same other name.
    names = {_sample(path), *(_sample(p) for p in found["features"] if _sample(path) != _sample(found["features"][0]))}
    found["barcodes"] = [p for p in found["barcodes"] if _sample(p) in names]
    for kind, wanted in (("features", "features.tsv or genes.tsv"), ("barcodes", "barcodes.tsv")):
        if not found[kind]:
            there = [p.name for p in sorted(path.parent.iterdir()) if _kind(p) == kind]
            hint = f" (tables with other names: {list_paths(there)})" if there else ""
            raise FileNotFoundError(
                f"Beside {path.name} there is no {wanted} in {path.parent}{hint}. Copy it there, under a name that "
                "begins with the same words as the matrix."
            )
    try:
        n_rows, n_columns, n_entries, layout, values, symmetry = mminfo(path)
    except (ValueError, EOFError, OSError) as error:
        raise FileError(f"{path} is truncated or not a Matrix Market file ({error}). Copy it again.") from error
    shape = n_rows, n_columns
    features, others = _choose_table(path, [_read_names(p, shape) for p in found["features"]], shape)
    barcodes, _ = _choose_table(path, [_read_names(p, shape) for p in found["barcodes"]], shape)
    n_features, n_barcodes = len(features.frame), len(barcodes.frame)
    if sorted(shape) != sorted((n_features, n_barcodes)):
        raise FileError(
            f"{path.name} is {n_rows} x {n_columns}, but there are {n_features} features and {n_barcodes} barcodes "
            f"({features.path.name}, {barcodes.path.name}): the files do not belong together. Copy all three from one "
            "source."
        )
    packed = MAX_PACKED if compression(path)[1] else 1
    if n_entries * MIN_ENTRY_BYTES > path.stat().st_size * packed:
        raise FileError(
            f"{path} states {n_entries:,} entries, but is too short for them: it is damaged. Copy it again."
        )
    try:
        listed = (layout, symmetry) == ("coordinate", "general") and values in ("integer", "real", "pattern")
        matrix = sp.csr_matrix(_read_entries(path, shape, n_entries, values) if listed else mmread(path))
    except (ValueError, EOFError, OSError, OverflowError, zlib.error, lzma.LZMAError) as error:
        raise FileError(f"{path} is truncated or not a Matrix Market file ({error}). Copy it again.") from error
    square = n_features == n_barcodes
    if (n_rows == n_features and not square) or (square and not CELLS_FIRST.search(path.name)):  # 10x: genes x cells
        matrix = matrix.T.tocsr()
    contents = Contents(matrix, _obs(barcodes), _var(features, others), _note_other_names(path, features, barcodes))
    return _unite_usa(contents)


def _read_entries(path: Path, shape: tuple[int, int], n_entries: int, values: str) -> sp.coo_matrix:
    """Read the entries of a Matrix Market file.

    `scipy.io.mmread` writes beyond its arrays on some damaged files, which kills the process; pandas raises an error.

    Args:
        path: The file.
        shape: Rows and columns.
        n_entries: Number of entries in the header.
        values: `integer`, `real` or `pattern` (every entry is 1).

    Raises:
        ValueError: If entries are missing, have more numbers, or lie outside of `shape`.
    """
    opener, packed = compression(path)
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        n_head = 1 + next(i for i, line in enumerate(file) if line.strip() and not line.startswith("%"))
    dtypes: dict[str, Any] = {"row": np.int64, "column": np.int64}
    if values != "pattern":
        dtypes["value"] = np.int64 if values == "integer" else np.float64
    table = pd.read_csv(
        path,
        sep=r"\s+",
        header=None,
        names=[*dtypes, "rest"],
        index_col=False,
        skiprows=n_head,
        compression=packed,
        dtype=dtypes,
    )
    if len(table) != n_entries:
        raise ValueError(f"{len(table):,} of {n_entries:,} entries are there")
    if table["rest"].notna().any():
        raise ValueError(f"a line has more than {len(dtypes)} numbers")
    rows, columns = (table[name].to_numpy() - 1 for name in ("row", "column"))
    for name, numbers, size in (("row", rows, shape[0]), ("column", columns, shape[1])):
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < size:
            raise ValueError(f"a {name} is not between 1 and {size:,}")
    data = table["value"].to_numpy() if "value" in table else np.ones(len(table), dtype=np.int64)
    return sp.coo_matrix((data, (rows, columns)), shape=shape)


def _read_names(path: Path, shape: tuple[int, int]) -> _Table:
    """Read a table of names, without its header and its column of row numbers, if there are any."""
    lines = [line for line in first_lines(path, "utf-8-sig") if line.strip()]
    usual = lines[-1] if lines else ""
    separator = "\t" if "\t" in usual else "," if "," in usual else " " if re.match(r'"[^"]*" ', usual) else "\t"
    width = max((line.count(separator) + 1 for line in lines), default=1)
    layout = {"sep": separator, "header": None, "names": range(width), "dtype": str, "keep_default_na": False}
    try:
        packed = compression(path)[1]
        frame = pd.read_csv(
            path, encoding="utf-8-sig", encoding_errors="replace", index_col=False, compression=packed, **layout
        )
    except (pd.errors.ParserError, EOFError, OSError) as error:
        raise FileError(f"{path} is damaged or not a table of names ({error}). Copy it again.") from error
    frame = frame.fillna("").apply(lambda column: column.str.strip())
    words = [word.lower() for word in frame.iloc[0]] if len(frame) else []
    has_header = len(frame) not in shape and len(frame) - 1 in shape and not HEADER_WORDS.isdisjoint(words)
    if has_header:
        frame = frame.iloc[1:].reset_index(drop=True)
        if words[-1] == "" and len(words) > 1:  # R writes no name above row numbers
            words = ["", *words[:-1]]
        frame.columns = pd.Index([word or str(i) for i, word in enumerate(words)], dtype=object)
    numbers = [str(i + 1) for i in range(len(frame))]
    if frame.shape[1] > 1 and len(frame) and frame.iloc[:, 0].tolist() == numbers:
        frame = frame.iloc[:, 1:]
        frame.columns = frame.columns if has_header else pd.RangeIndex(frame.shape[1])
    return _Table(path, frame, has_header)


def _choose_table(matrix: Path, tables: list[_Table], shape: tuple[int, int]) -> tuple[_Table, list[_Table]]:
    """The table whose length fits, and further tables of the same features (kallisto writes ids and names apart)."""
    fitting = [table for table in tables if len(table.frame) in shape] or tables[:1]
    fitting.sort(key=lambda table: (bool(re.search(r"names", table.path.name, re.IGNORECASE)), table.path.name))
    first, *others = fitting
    apart = [t for t in others if re.search(r"genes?[._-]?names", t.path.name, re.IGNORECASE)]
    for other in others:
        if other not in apart and other.frame.iloc[:, 0].tolist() != first.frame.iloc[:, 0].tolist():
            raise FileError(
                f"{first.path.name} and {other.path.name} may both belong to {matrix.name}, but differ. Leave only "
                "the right one in the folder."
            )
    return first, apart


def _obs(barcodes: _Table) -> pd.DataFrame:
    names = pd.Index(barcodes.frame.iloc[:, 0].tolist(), dtype=object)
    if not barcodes.has_header:
        return pd.DataFrame(index=names)
    obs = barcodes.frame.iloc[:, 1:].set_axis(names, axis=0)
    return obs.apply(_numbers)


def _numbers(column: pd.Series) -> pd.Series:
    """The column as numbers if all its values are numbers, else as it is."""
    numbers = pd.to_numeric(column, errors="coerce")
    return numbers if numbers.notna().all() else column


def _var(features: _Table, others: Sequence[_Table]) -> pd.DataFrame:
    """`var` with the names of features as its index; a feature without a name has its id there."""
    frame = features.frame
    if features.has_header:
        ids = next((frame[word] for word in ID_WORDS if word in frame), frame.iloc[:, 0])
        names = next((frame[word] for word in NAME_WORDS if word in frame), ids)
        var = frame.copy()
    else:
        ids, names = frame[0], frame[min(frame.shape[1] - 1, 1)]
        var = pd.DataFrame({"gene_ids": ids, "feature_types": frame[2]} if frame.shape[1] > 2 else {"gene_ids": ids})
        var = var if frame.shape[1] > 1 else var[[]]
    for other in others[:1]:
        var["gene_name"] = other.frame.iloc[:, 0]
    index = np.where(names == "", ids, names)
    return var.set_axis(pd.Index(index.tolist(), dtype=object), axis=0)


def _note_other_names(path: Path, features: _Table, barcodes: _Table) -> list[str]:
    """A note if the tables have other sample names than the matrix."""
    if _sample(path) == _sample(features.path) == _sample(barcodes.path):
        return []
    return [f"{path.name} was read with {features.path.name} and {barcodes.path.name}."]


def _unite_usa(contents: Contents) -> Contents:
    """Split the columns of alevin-fry, which calls spliced, unspliced and ambiguous counts `X`, `X-U` and `X-A`."""
    names, n = contents.var.index.tolist(), contents.var.shape[0] // 3
    if not n or [*names[n:]] != [f"{name}{end}" for end in ("-U", "-A") for name in names[:n]]:
        return contents
    words = (SPLICED[0], UNSPLICED[0], AMBIGUOUS[0])
    layers = {word: contents.X[:, i * n : (i + 1) * n].tocsr() for i, word in enumerate(words)}
    return _count_parts(contents._replace(var=contents.var.iloc[:n]), layers)

"""`Cells`, a ragged batch of cells, the random numbers that belong to a cell, and its normalised profiles.

In shapes, `nnz` is the number of entries of all cells: expressed genes with their counts.
"""

import enum
import functools
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from .kernels_scmmgpt import GOLDEN_GAMMA, ONE, hash_rows, kernels_pay, mix64, name_genes


class RandomStream(enum.IntEnum):
    """Every stream of random numbers: draws for different purposes come from different streams.

    A new purpose gets a new number. A number is never given twice: what it drew is part of finished corpora and
    checkpoints.
    """

    TOKEN = 0  # which genes of a cell stay, and the bins of tied counts
    MASK = 1  # which genes are hidden
    RATIO = 2  # how many
    NAME = 3  # identities of cells from their barcodes
    SPLIT = 32  # which split a cell, donor or dataset belongs to
    ORDER = 33  # the order of the cells in a corpus
    DUPLICATE = 34  # new identities of different cells that share one
    CAPTION = 35  # which template, and which synonyms
    STATE = 36  # state, library size and counts of a generated cell


COUNTS_PER_10K = 1e4  # "CP10k": the library size that normalised expression is given for, everywhere in the project

# Seeds that set a draw apart where the stream is that of another draw.
TARGET_SEED = 0x7A46  # target genes of generation: `RandomStream.MASK`
DIRECTION_SEED = 0x5EED  # whether a cell is described or generated: `hash_names`
INSTRUCTION_SEED = 0x1257  # order of conversations


def hashes(n: int, *key: int) -> np.ndarray:
    """`n` random numbers, `uint64 (n,)`, that depend on the key alone: a seed, an epoch, a place in an order."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = mix64((state ^ np.uint64(part % 2**64)) + GOLDEN_GAMMA)
    return mix64((mix64(np.arange(n, dtype=np.uint64) + GOLDEN_GAMMA) ^ state) + GOLDEN_GAMMA)


def permutation(n: int, *key: int) -> np.ndarray:
    """A random order of `range(n)`, `int64 (n,)`, that depends on the key alone."""
    return np.argsort(hashes(n, *key), kind="stable")


def hash_seed(seed: int, cell_id: int) -> int:
    """A 63-bit seed from two integers; neighbouring ids give unrelated seeds."""
    state = np.array([(int(seed) * int(GOLDEN_GAMMA) + int(cell_id)) % 2**64], dtype=np.uint64)
    return int(mix64(state)[0]) >> 1


@functools.lru_cache(maxsize=64)
def _stream_key(seed: int, epoch: int, stream: int) -> np.ndarray:
    key = np.zeros(1, dtype=np.uint64)
    for part in (seed, epoch, stream):
        key = mix64(key + GOLDEN_GAMMA + np.uint64(part % 2**64))
    return key


def cell_keys(cell_ids: np.ndarray, *, seed: int, epoch: int, stream: int) -> np.ndarray:
    """One 64-bit key a cell, `uint64 (n_cells,)`: the start of the cell's random sequence."""
    return mix64(cell_ids.astype(np.uint64, copy=False) ^ _stream_key(seed, epoch, stream))


def gene_hashes(cell_keys: np.ndarray, gene_ids: np.ndarray) -> np.ndarray:
    """The gene's element of its cell's random sequence, `uint64`; the arguments broadcast. No two of a cell tie."""
    return mix64(cell_keys + (gene_ids.astype(np.uint64) + ONE) * GOLDEN_GAMMA)


def hash_names(names: Any) -> np.ndarray:
    """Stable identities of cells, `uint64 (n_cells,)`, from their barcodes, such as `adata.obs_names`.

    The hash of a name depends on its characters alone: not on the process, the other names, or their order.
    """
    names = np.asarray(names).astype(np.str_)
    if names.ndim != 1:
        raise ValueError(f"Expected one name a cell, but `names` has shape {names.shape}. Pass `adata.obs_names`.")
    state = cell_keys(np.zeros(len(names), dtype=np.uint64), seed=0, epoch=0, stream=RandomStream.NAME)
    characters = np.ascontiguousarray(names).view(np.uint32).reshape(len(names), names.dtype.itemsize // 4)
    for column in characters.T:  # over the width of the longest name, all cells at once; NumPy pads with zeros
        state = np.where(column > 0, mix64(state + column * GOLDEN_GAMMA), state)
    return state


def segment(ufunc: np.ufunc, values: np.ndarray, indptr: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """Reduce `values` within each row; `empty` for rows without values."""
    filled = np.flatnonzero(np.diff(indptr))
    result = np.full(len(indptr) - 1, empty, dtype=values.dtype)
    if len(filled):
        result[filled] = ufunc.reduceat(values, indptr[filled])
    return result


# -- cells ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Cells:
    """A ragged batch of cells in CSR layout, genes already as ids of the gene vocabulary.

    Args:
        indptr: `int64 (n_cells + 1,)`; cell `i` owns `gene_ids[indptr[i]:indptr[i + 1]]`, and so its `counts`.
        gene_ids: Integer `(nnz,)`; within a cell unique, in any order.
        counts: Integer or float32 `(nnz,)`, above 0: raw counts (or the values at hand), never their log.
        cell_ids: `uint64 (n_cells,)`: the stable identity of each cell, from which all its randomness derives.
            [`hash_names`] makes it of barcodes.
        total_counts: `float32 (n_cells,)`: library size over all genes of the source, whether or not they are in the
            vocabulary. `None` stands for the sum of `counts`.
    """

    indptr: np.ndarray
    gene_ids: np.ndarray
    counts: np.ndarray
    cell_ids: np.ndarray
    total_counts: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.indptr = np.asarray(self.indptr, dtype=np.int64)
        self.gene_ids = np.asarray(self.gene_ids)
        self.counts = np.asarray(self.counts)
        if self.counts.dtype.kind == "f":
            self.counts = self.counts.astype(np.float32, copy=False)
        self.cell_ids = np.asarray(self.cell_ids)
        if self.cell_ids.dtype.kind == "i":
            self.cell_ids = self.cell_ids.astype(np.uint64)
        if self.total_counts is not None:
            self.total_counts = np.asarray(self.total_counts, dtype=np.float32)
        kinds = {"gene_ids": ("iu", "integers"), "counts": ("iuf", "numbers"), "cell_ids": ("u", "64-bit integers")}
        for name, (kind, wanted) in kinds.items():
            if getattr(self, name).dtype.kind not in kind:
                raise TypeError(f"`{name}` has dtype {getattr(self, name).dtype}, but Cells holds {wanted} there.")
        n_cells = len(self.indptr) - 1
        if n_cells < 0 or self.indptr[0] != 0 or (self.indptr[1:] < self.indptr[:-1]).any():
            raise ValueError("`indptr` must start at 0 and never fall: entry i is where cell i starts.")
        nnz = self.indptr[-1]
        for name, length in {"gene_ids": nnz, "counts": nnz, "cell_ids": n_cells, "total_counts": n_cells}.items():
            array = getattr(self, name)
            if array is not None and array.shape != (length,):
                raise ValueError(f"`{name}` has shape {array.shape}, but `indptr` needs ({length},).")

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, index: Any) -> "Cells":
        """The cells at a slice, an array of positions or a boolean mask; a single position gives a batch of one."""
        if isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                raise IndexError(f"Cell {index} was asked for, but there are {len(self)}.")
            index = np.array([index])
        rows: slice | np.ndarray
        entries: slice | np.ndarray
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            stop = max(start, stop)
            rows, entries = slice(start, stop), slice(self.indptr[start], self.indptr[stop])
            indptr = self.indptr[start : stop + 1] - self.indptr[start]
        else:
            rows = np.arange(len(self))[index]
            lengths = np.diff(self.indptr)[rows]
            indptr = np.concatenate([[0], np.cumsum(lengths)])
            entries = np.repeat(self.indptr[rows] - indptr[:-1], lengths) + np.arange(indptr[-1])
        total_counts = None if self.total_counts is None else self.total_counts[rows]
        return Cells(indptr, self.gene_ids[entries], self.counts[entries], self.cell_ids[rows], total_counts)

    def rows(self) -> np.ndarray:
        """`int64 (nnz,)`: the number of the cell that each entry belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.indptr))

    def library_sizes(self) -> np.ndarray:
        """`float32 (n_cells,)`: `total_counts`, or the sum of `counts` if there are none."""
        if self.total_counts is not None:
            return self.total_counts
        return _row_sums(self.counts, self.indptr).astype(np.float32)

    def sorted_by_gene(self) -> "Cells":
        """The same cells with ascending gene ids within each cell."""
        rows = self.rows()
        is_sorted = (self.gene_ids[1:] > self.gene_ids[:-1]) | (rows[1:] > rows[:-1])
        if is_sorted.all():
            return self
        order = sorting_order(self.gene_ids.astype(np.uint32, copy=False), rows)
        return replace(self, gene_ids=self.gene_ids[order], counts=self.counts[order])

    @classmethod
    def concatenate(cls, batches: Iterable["Cells"]) -> "Cells":
        """Joins batches of cells, in order; the result has `total_counts` if a batch has some."""
        batches = list(batches)
        if not batches:
            raise ValueError("There is no batch to concatenate.")
        offsets = np.cumsum([0] + [batch.indptr[-1] for batch in batches])
        indptr = [batch.indptr[:-1] + offset for batch, offset in zip(batches, offsets[:-1], strict=True)]
        known = any(batch.total_counts is not None for batch in batches)
        return cls(
            np.concatenate([*indptr, offsets[-1:]]),
            np.concatenate([batch.gene_ids for batch in batches]),
            np.concatenate([batch.counts for batch in batches]),
            np.concatenate([batch.cell_ids for batch in batches]),
            np.concatenate([batch.library_sizes() for batch in batches]) if known else None,
        )

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> "Cells":
        """Rows of a dataset, one cell each, as `datasets` gives them in any format (Python, NumPy, torch).

        Args:
            rows: Each with `gene_ids` and `counts` (sequences of one length), and `cell_id`, an integer. A negative
                `cell_id` is the same identity as an unsigned one: the 64 bits count. `total_counts` may be left out of
                all rows.

        Raises:
            ValueError: If a row lacks one of these, or has another number of counts than of genes.
        """
        for number, row in enumerate(rows):
            if missing := [name for name in ("cell_id", "gene_ids", "counts") if row.get(name) is None]:
                raise ValueError(
                    f"Row {number} has no {missing[0]!r}; it has {sorted(row)}. A row of a cell has `cell_id`, "
                    "`gene_ids` and `counts`. A trainer drops columns, unless remove_unused_columns=False is set."
                )
            n_genes, n_counts = len(row["gene_ids"]), len(row["counts"])
            if n_genes != n_counts:
                raise ValueError(f"Row {number} has {n_genes} gene_ids and {n_counts} counts; give one for each.")
        empty = np.zeros(0, dtype=np.uint8)  # of the smallest type: it decides nothing
        genes, counts = ([np.asarray(row[name]) for row in rows] for name in ("gene_ids", "counts"))
        totals = [row.get("total_counts") for row in rows]
        return cls(
            np.cumsum([0, *map(len, genes)]),
            np.concatenate([empty, *(ids for ids in genes if len(ids))]),  # an empty list is of floats
            np.concatenate([empty, *(values for values in counts if len(values))]),
            np.array([int(row["cell_id"]) % 2**64 for row in rows], dtype=np.uint64),
            None if any(total is None for total in totals) else np.array(totals, dtype=np.float32),
        )

    def to_rows(self) -> list[dict[str, Any]]:
        """One mapping a cell, which [`Cells.from_rows`] reads, of types that `datasets.Dataset.from_list` takes.

        `cell_id` is signed, since torch and most other libraries have no unsigned 64-bit integers.
        """
        ids, totals = self.cell_ids.astype(np.uint64).view(np.int64), self.library_sizes()
        return [
            {
                "cell_id": int(ids[i]),
                "gene_ids": self.gene_ids[start:stop],
                "counts": self.counts[start:stop],
                "total_counts": float(totals[i]),
            }
            for i, (start, stop) in enumerate(itertools.pairwise(self.indptr.tolist()))
        ]

    @classmethod
    def from_csr(
        cls,
        matrix: Any,
        vocabulary_ids: np.ndarray,
        cell_ids: np.ndarray | None = None,
        total_counts: np.ndarray | None = None,
        sums_columns: bool | None = None,
    ) -> "Cells":
        """Reads a CSR matrix of counts.

        Args:
            matrix: `(n_cells, n_vars)` with `indptr`, `indices` and `data`, as `scipy.sparse.csr_matrix`.
            vocabulary_ids: Integer `(n_vars,)`: the gene id of each column, -1 for a column to leave out. Columns with
                the same id are summed.
            cell_ids: `uint64 (n_cells,)`, best `hash_names(adata.obs_names)`. By default the row numbers, under which
                a cell's random draws depend on the chunk that it is read in.
            total_counts: Library sizes `(n_cells,)`; by default the sums over all columns, those left out included.
            sums_columns: Result of [`has_repeats`], which a reader of many chunks computes once.

        Returns:
            `Cells`, the genes of each in the order of the entries of `matrix`.
        """
        indptr, columns, data = (np.asarray(array) for array in (matrix.indptr, matrix.indices, matrix.data))
        smallest = data.min(initial=1)
        if not (smallest >= 0 and np.isfinite(data.max(initial=0))):
            _refuse_entries(indptr, columns, data)
        if smallest == 0:  # stored zeros
            indptr = np.concatenate([[0], np.cumsum(data != 0)])[indptr]
            columns, data = columns[data != 0], data[data != 0]
        indptr, columns = indptr.astype(np.int64, copy=False), columns.astype(np.int32, copy=False)
        ids = _column_ids(vocabulary_ids, matrix.shape[1])
        data = _known_numbers(data)
        sums_columns = has_repeats(ids) if sums_columns is None else sums_columns
        if sums_columns:  # sums of a gene's columns need room
            data = data.astype(np.float64 if data.dtype.kind == "f" else np.int64)
        elif data.dtype.kind != "f" and data.dtype.itemsize < 4:  # a row may hold a column twice
            data = data.astype(np.int32)
        if kernels_pay(len(indptr) - 1):
            n_ids, room = int(ids.max(initial=-1)) + 1, (np.empty(len(data), np.int32), np.empty_like(data))
            named = name_genes(indptr, columns, data, ids, n_ids, sums_columns, *room)[:4]
        else:
            named = _name_genes_numpy(indptr, columns, data, ids)
        indptr, gene_ids, counts, sums = named
        if cell_ids is None:
            cell_ids = np.arange(len(indptr) - 1, dtype=np.uint64)
        return cls(indptr, gene_ids, counts, cell_ids, sums if total_counts is None else total_counts)

    def to_csr(self, n_genes: int) -> Any:
        """The counts as a `scipy.sparse.csr_matrix`, float32 `(n_cells, n_genes)`; columns are gene ids."""
        try:
            from scipy.sparse import csr_matrix
        except ImportError as error:
            raise ImportError("A matrix of cells needs scipy; install it with `pip install scipy`.") from error
        arrays = self.counts.astype(np.float32), self.gene_ids.astype(np.int64), self.indptr
        return csr_matrix(arrays, shape=(len(self), n_genes))


def _known_numbers(values: np.ndarray) -> np.ndarray:
    """The values in the byte order of this machine, fractions in 32 or 64 bits: numba takes no others."""
    if values.dtype.kind == "f":
        return values.astype(np.float32 if values.dtype.itemsize <= 4 else np.float64, copy=False)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def has_repeats(vocabulary_ids: np.ndarray) -> bool:
    """Whether several columns have the same gene; -1 is none."""
    return bool(np.bincount(vocabulary_ids[vocabulary_ids >= 0], minlength=1).max() > 1)


def _column_ids(vocabulary_ids: Any, n_vars: int) -> np.ndarray:
    vocabulary_ids = np.asarray(vocabulary_ids)
    if vocabulary_ids.shape != (n_vars,) or vocabulary_ids.dtype.kind not in "iu":
        raise ValueError(
            f"`vocabulary_ids` is {vocabulary_ids.dtype} of shape {vocabulary_ids.shape}, but the matrix has {n_vars} "
            "columns. Pass one integer a column, -1 for a column to leave out."
        )
    return vocabulary_ids.astype(np.int32, copy=False)


def _refuse_entries(indptr: np.ndarray, columns: np.ndarray, data: np.ndarray) -> NoReturn:
    wrong = np.flatnonzero(~(np.isfinite(data) & (data >= 0)))[0]
    row = np.searchsorted(indptr, wrong, side="right") - 1
    raise ValueError(
        f"Expected counts, but found {data[wrong]} in row {row}, column {columns[wrong]}. "
        "Pass raw counts: negative, infinite and missing values are none."
    )


def _row_sums(data: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Sums of the entries of each cell, `float64 (n_cells,)`, added one after the other as the kernel does."""
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    return np.bincount(rows, weights=data, minlength=len(indptr) - 1)


def _name_genes_numpy(
    indptr: np.ndarray, columns: np.ndarray, data: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """[`name_genes`] in NumPy."""
    totals, gene_ids = _row_sums(data, indptr), ids[columns]
    has_gene = gene_ids >= 0
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))[has_gene]
    gene_ids, data = gene_ids[has_gene], data[has_gene]
    order = sorting_order(gene_ids.view(np.uint32), rows)  # entries of one gene become neighbours
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (gene_ids[order][1:] != gene_ids[order][:-1]) | (rows[order][1:] != rows[order][:-1])
    sums = np.bincount(np.cumsum(is_first) - 1, weights=data[order])
    by_place = np.argsort(order[is_first])
    first = order[is_first][by_place]
    rows, gene_ids, data = rows[first], gene_ids[first], sums[by_place].astype(data.dtype)
    return np.searchsorted(rows, np.arange(len(indptr))), gene_ids, data, totals


def sorting_order(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The order that sorts by row, then by unsigned key; ties stay in place. NumPy sorts 16-bit digits by radix."""
    digits = [
        digit
        for key in (keys, rows)
        for digit in key.view(np.uint16).reshape(len(key), key.dtype.itemsize // 2).T
        if digit.any()
    ]
    return np.lexsort(digits) if digits else np.arange(len(rows))


# -- values -----------------------------------------------------------------------------------------------------------


def _library_scale(library_sizes: np.ndarray, target_sum: float) -> np.ndarray:
    """The factor, `float64 (n_cells,)`, that scales each library to `target_sum`; 0 for a cell without counts."""
    sizes = np.asarray(library_sizes, dtype=np.float64)
    return np.divide(target_sum, sizes, out=np.zeros_like(sizes), where=sizes > 0)


def log1p_cp10k(counts: Any, library_sizes: np.ndarray) -> Any:
    """log1p of the counts per 10,000 of a matrix; [`normalize_log1p`] is for [`Cells`].

    Args:
        counts: Raw counts, `(n_cells, n_genes)`: an array or a SciPy sparse matrix.
        library_sizes: `(n_cells,)`, over all measured genes, not only those of the matrix.

    Returns:
        float32 `(n_cells, n_genes)`: an array, or a CSR matrix for a sparse one.
    """
    scale = _library_scale(library_sizes, COUNTS_PER_10K)[:, None]
    if hasattr(counts, "tocsr"):
        return counts.multiply(scale).tocsr().astype(np.float32).log1p()
    return np.log1p(counts * scale).astype(np.float32)


def _scaled_counts(cells: Cells, target_sum: float) -> np.ndarray:
    """`float64 (nnz,)`: counts after scaling each cell to a library of `target_sum`."""
    return cells.counts * np.repeat(_library_scale(cells.library_sizes(), target_sum), np.diff(cells.indptr))


def normalize_log1p(cells: Cells, target_sum: float = COUNTS_PER_10K) -> np.ndarray:
    """ln(1 + count / library size * target_sum), as `scanpy.pp.normalize_total` and `log1p` compute it.

    The library size is `cells.total_counts`: genes outside the vocabulary count too. Returns `float32 (nnz,)`, aligned
    with `cells.counts`.
    """
    return np.log1p(_scaled_counts(cells, target_sum)).astype(np.float32)


def hellinger_profile(cells: Cells) -> np.ndarray:
    """sqrt(count / library size): the coordinates in which Euclidean distance is Hellinger distance.

    The variance of a count grows with its mean, and the square root evens it out: neither the few strongly expressed
    genes nor the many rare ones dominate a distance. Every cell has length 1, whatever its depth. Library size and
    result are as for [`normalize_log1p`].
    """
    return np.sqrt(_scaled_counts(cells, 1.0)).astype(np.float32)


def is_cells(value: Any) -> bool:
    """Whether a value is [`Cells`], of whichever copy of the class: a checkpoint has one beside the package's."""
    return hasattr(value, "indptr") and hasattr(value, "cell_ids")


def cells_of(value: Any, processor: Any = None) -> Cells:
    """Cells in any form: [`Cells`], an AnnData, which the processor reads, a row, a list of these, or None.

    A row is a mapping with the columns of a cell, as in a corpus; see `Cells.from_rows`.
    """
    if is_cells(value):
        return value
    if isinstance(value, Mapping):
        return Cells.from_rows([value])
    if value is None or isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
        several = () if value is None else value
        return Cells.concatenate([Cells.from_rows([]), *(cells_of(one, processor) for one in several)])
    if processor is None:
        raise TypeError(
            f"{type(value).__name__} is not Cells, a row of a cell or a list of these; an AnnData needs the whole "
            "processor, as processor(cells=adata) or processor.read_cells(adata)."
        )
    return processor.read_cells(value)[0]


def cells_in(messages: Any) -> list[Any]:
    """What the parts `{"type": "cell", "cell": ...}` of the messages of a conversation hold, in order."""
    contents = [] if messages is None or isinstance(messages, str) else [message["content"] for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return [part["cell"] for part in parts if part.get("cell") is not None]


def show_module(name: str) -> None:
    """Make a module an attribute of its package, where `dill` looks for classes.

    transformers loads the files of a checkpoint without it. `datasets` then takes 20 seconds to find that it
    cannot hash what they define, and `Dataset.map` repeats its work in every run.
    """
    package, _, module = name.rpartition(".")
    if package:
        setattr(sys.modules[package], module, sys.modules[name])


def fingerprints(cells: Cells) -> np.ndarray:
    """A number for the genes and counts of each cell, uint64 `(n_cells,)`, whatever the order of the genes.

    >>> a = Cells([0, 2], [7, 9], [1, 5], np.zeros(1, np.uint64))
    >>> b = Cells([0, 2], [9, 7], np.array([5.0, 1.0]), np.zeros(1, np.uint64))
    >>> bool(fingerprints(a) == fingerprints(b))
    True
    """
    counts = cells.counts.astype(np.float32).view(np.uint32)
    if kernels_pay(0):
        return hash_rows(cells.indptr, cells.gene_ids, counts)
    genes = mix64((cells.gene_ids.astype(np.uint64) + ONE) * GOLDEN_GAMMA)
    entries = mix64(genes ^ counts.astype(np.uint64))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(entries, dtype=np.uint64)])
    return sums[cells.indptr[1:]] - sums[cells.indptr[:-1]]  # modulo 2**64, as the sums are


class CellsHash:
    """Hash of cells that arrive in chunks: a sum, whatever the order of the cells and the size of the chunks."""

    def __init__(self) -> None:
        self.total = 0

    def update(self, cells: Cells) -> None:
        """Add the next cells."""
        of_cells = mix64(fingerprints(cells) ^ mix64(cells.cell_ids + GOLDEN_GAMMA))
        self.total = (self.total + int(of_cells.sum(dtype=np.uint64))) % 2**64

    def hexdigest(self) -> str:
        """The hash of all cells so far."""
        return f"{self.total:016x}"

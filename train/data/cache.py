"""The training layout of a corpus: what `CellStream` reads when it has to be fast.

```
python -m scmmgpt.train cache CORPUS
python -m scmmgpt.train cache CORPUS --output /local/disk/cache --compression zstd
```

It holds the same cells in the same order and the same row groups ("blocks") as the published layout, built from it
once per machine by [`build_cache`], on a local disk:

```
cache/index.json               which shards it was built from, compression, labels, checksums of the columns
cache/train/blocks.npy         where each block lies, its size and its checksum
cache/train/genes-00000.bin    the blocks of the first shard, and so on
cache/train/cell_id.npy, n_genes.npy, total_counts.npy, cell_type.npy, ...   one value or label code per cell
```

A block is the genes and counts of some 500 cells. Gene ids become differences along the cell, which are small, and
both are split into planes of low and high bytes, of which the high ones are nearly all zero; each plane is compressed
alone. That takes about half the space of plain uint16 under the same compression, and reading it costs less, since
there is less to decompress, and the prefix sum and the interleaving of bytes are part of the copy that puts a cell at
its shuffled place. `tests/benchmarks/test_stream.py` measures both.

The barcode is not cached: a stream that wants it reads the published layout.
"""

import argparse
import collections
import dataclasses
import functools
import json
import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.files import write_json
from scmmgpt.train.data.corpus import CELL_COLUMNS, OBS_COLUMNS, Corpus, open_corpus, table_to_cells


logger = logging.getLogger(__name__)

CACHE_VERSION = 1
CACHED_COLUMNS = tuple(name for name in OBS_COLUMNS if name != "barcode")
CELL_VALUES = {"cell_id": np.uint64, "n_genes": np.uint16, "total_counts": np.float32}
COMPRESSIONS = ("lz4", "zstd")
OPEN_FILES = 32  # shards kept open by each thread that decodes them
N_PLANES = 6  # two of gene ids, two of uint16 counts or four of float32 counts
BLOCK = np.dtype(
    [
        ("shard", np.int32),
        ("offset", np.int64),
        ("n_values", np.int64),
        ("plane_bytes", np.int64, (N_PLANES,)),
        ("checksum", np.uint64),
    ]
)


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


def build_cache(
    corpus: Corpus, cache_dir: str | os.PathLike | None = None, *, compression: str = "lz4", num_threads: int = 2
) -> Path:
    """Build the training layout of a corpus, unless it is there already.

    It appears under its name in one step when it is complete, so it may be built while others read the corpus.

    Args:
        corpus: The corpus.
        cache_dir: Where to put it, best on a local disk; `cache` in the corpus by default.
        compression: `"lz4"` reads fastest, `"zstd"` takes a third less space and some 2 microseconds more per cell.
        num_threads: Threads that decode and encode.

    Returns:
        The folder of the cache.
    """
    if compression not in COMPRESSIONS:
        raise ValueError(f"compression is {compression!r}; choose one of {COMPRESSIONS}.")
    path = default_cache_dir(corpus) if cache_dir is None else Path(cache_dir)
    if path.exists():
        if cache_matches(corpus, path):
            return path
        raise ValueError(f"{path} was built from another state of the corpus {corpus.path}. Delete it first.")
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        index = {"version": CACHE_VERSION, "compression": compression, "source": _source(corpus), "splits": {}}
        with ThreadPoolExecutor(num_threads) as executor:
            for split in corpus.split_names:
                folder = temporary / split
                folder.mkdir(parents=True)
                index["splits"][split] = _build_split(corpus, split, folder, compression, executor)
        write_json(temporary / "index.json", index)
        try:
            os.rename(temporary, path)
        except OSError:
            if not (path.exists() and cache_matches(corpus, path)):
                raise
            logger.info("%s was built by another process in the meantime; using that.", path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _remove_leftovers(path: Path) -> None:
    """Remove what builders of this machine left behind that were killed."""
    for folder in path.parent.glob(f".{path.name}.{socket.gethostname()}.*.tmp"):
        pid = int(folder.name.split(".")[-2])
        if os.name == "posix" and pid != os.getpid():
            try:
                os.kill(pid, 0)  # sends nothing: asks whether there is such a process
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)
            except PermissionError:  # it lives, and is someone else's
                continue


def make_parser(prog: str = "python -m scmmgpt.train cache") -> argparse.ArgumentParser:
    """Arguments of `python -m scmmgpt.train cache`."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", help="folder of the corpus")
    parser.add_argument("--output", help="folder of the cache, best on a local disk; default: `cache` in the corpus")
    parser.add_argument("--compression", choices=COMPRESSIONS, default="lz4")
    parser.add_argument("--num-threads", type=int, default=os.cpu_count() or 1)
    return parser


def main(args: argparse.Namespace) -> None:
    """Build the cache of a corpus."""
    corpus = open_corpus(args.corpus)
    path = build_cache(corpus, args.output, compression=args.compression, num_threads=args.num_threads)
    n_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    logger.info("%s: %s cells in %.1f MB.", path, f"{corpus.manifest.n_cells:,}", n_bytes / 1e6)


def default_cache_dir(corpus: Corpus) -> Path:
    """Return the folder of the cache inside a corpus."""
    return corpus.path / "cache"


def cache_matches(corpus: Corpus, path: str | os.PathLike) -> bool:
    """Whether there is a cache at `path` that was built from exactly these shards."""
    try:
        index = json.loads((Path(path) / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    return index.get("version") == CACHE_VERSION and index.get("source") == _source(corpus)


def _source(corpus: Corpus) -> str:
    """Digest of the content of all shards."""
    content = "".join(f"{shard.path}:{shard.sha256}\n" for shard in corpus.manifest.shards)
    return xxhash.xxh3_128_hexdigest(content.encode())


def _build_split(corpus: Corpus, split: str, folder: Path, compression: str, executor: Executor) -> dict:
    n_cells = corpus.n_cells(split)
    values = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (n_cells,))
        for name, dtype in CELL_VALUES.items()
    }
    # Codes are written as int32 and narrowed at the end, when the number of labels is known.
    codes = {
        name: np.lib.format.open_memmap(folder / f".{name}.npy", "w+", np.int32, (n_cells,)) for name in CACHED_COLUMNS
    }
    labels: dict[str, dict[str, int]] = {name: {} for name in CACHED_COLUMNS}
    blocks, row = [], 0
    for index, shard in enumerate(corpus.shards(split)):
        reader = ParquetReader(corpus, split, list(CACHED_COLUMNS))
        own = [block for block in range(len(reader.sizes)) if reader.places[block][0] == index]
        encode = functools.partial(_encode_block, reader, index, compression)
        with open(folder / f"genes-{index:05d}.bin", "wb") as file:
            for record, planes, cells, obs in _map_ahead(executor, encode, own, ahead=8):
                record["offset"] = file.tell()
                blocks.append(record)
                for plane in planes:
                    file.write(plane)
                rows = slice(row, row + len(cells))
                values["cell_id"][rows] = cells.cell_ids
                values["n_genes"][rows] = np.diff(cells.indptr)
                values["total_counts"][rows] = cells.total_counts
                for name, column in obs.items():
                    codes[name][rows] = _encode_labels(column, labels[name])
                row += len(cells)
            file.flush()
            os.fsync(file.fileno())
        assert row == sum(s.n_cells for s in corpus.shards(split)[: index + 1]), shard.path
    np.save(folder / "blocks.npy", np.array(blocks, dtype=BLOCK))
    for name in CACHED_COLUMNS:
        narrow = np.min_scalar_type(len(labels[name]))  # one more code than labels: the last means null
        own_codes = np.asarray(codes.pop(name))
        np.save(folder / f"{name}.npy", np.where(own_codes < 0, len(labels[name]), own_codes).astype(narrow))
        (folder / f".{name}.npy").unlink()
    for array in values.values():
        array.flush()
    return {
        "labels": {name: list(known) for name, known in labels.items()},
        "checksums": {file.name: hash_bytes(np.memmap(file, np.uint8)) for file in sorted(folder.glob("*.npy"))},
        "n_bytes": {file.name: file.stat().st_size for file in sorted(folder.glob("*.bin"))},
    }


def hash_bytes(content) -> int:
    """Return the 64-bit XXH3 of a buffer; it is fast enough to check every block that is read."""
    return xxhash.xxh3_64_intdigest(content)


def _map_ahead(executor: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Map in order with at most `ahead` results waiting, so that memory stays bounded."""
    pending = collections.deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _encode_block(reader: "ParquetReader", index: int, compression: str, block: int):
    cells, obs = reader.read(block)
    planes = np.zeros((2 + cells.counts.dtype.itemsize, len(cells.gene_ids)), dtype=np.uint8)
    _split_ids(cells.indptr, cells.gene_ids, planes)
    planes[2:] = cells.counts.view(np.uint8).reshape(-1, cells.counts.dtype.itemsize).T
    codec = pa.Codec("lz4_raw" if compression == "lz4" else "zstd")
    compressed = [codec.compress(plane, asbytes=True) for plane in planes]
    record = np.zeros((), dtype=BLOCK)
    record["shard"] = index
    record["n_values"] = len(cells.gene_ids)
    record["plane_bytes"][: len(compressed)] = [len(plane) for plane in compressed]
    record["checksum"] = hash_bytes(b"".join(compressed))
    return record, compressed, cells, obs


def _encode_labels(column: np.ndarray, known: dict[str, int]) -> np.ndarray:
    """Return the codes of labels, growing `known` where there are new ones; -1 for None."""
    dictionary = pa.array(column, pa.string()).dictionary_encode()
    codes = [known.setdefault(label, len(known)) for label in dictionary.dictionary.to_pylist()]
    return np.append(codes, -1).astype(np.int32)[dictionary.indices.fill_null(len(codes)).to_numpy()]


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@numba.njit(nogil=True, cache=True)
def _split_ids(indptr, gene_ids, planes):
    """Write differences of gene ids along each cell into planes 0 (low bytes) and 1 (high bytes)."""
    for cell in range(len(indptr) - 1):
        previous = np.uint16(0)
        for i in range(indptr[cell], indptr[cell + 1]):
            difference = np.uint16(gene_ids[i] - previous)
            previous = gene_ids[i]
            planes[0, i] = difference & 0xFF
            planes[1, i] = difference >> 8


@numba.njit(nogil=True, cache=True)
def _join_ids(source, rows, low, high, target, places, gene_ids):
    """Copy the gene ids of `rows` of a block to their `places` in a pool, undoing `_split_ids`."""
    for i in range(len(rows)):
        start, stop = source[rows[i]], source[rows[i] + 1]
        n = stop - start
        out = gene_ids[target[places[i]] : target[places[i]] + n]
        lows, highs = low[start:stop], high[start:stop]
        for j in range(n):
            out[j] = np.uint16(lows[j]) | np.uint16(np.uint16(highs[j]) << np.uint16(8))
        total = np.uint16(0)
        for j in range(n):  # apart from the loop above, which is vectorised
            total = np.uint16(total + out[j])
            out[j] = total


@numba.njit(nogil=True, cache=True)
def _join_counts(source, rows, low, high, target, places, counts):
    """Copy uint16 counts of `rows` of a block to their `places` in a pool."""
    for i in range(len(rows)):
        start, stop = source[rows[i]], source[rows[i] + 1]
        n = stop - start
        out = counts[target[places[i]] : target[places[i]] + n]
        lows, highs = low[start:stop], high[start:stop]
        for j in range(n):
            out[j] = np.uint16(lows[j]) | np.uint16(np.uint16(highs[j]) << np.uint16(8))


@numba.njit(nogil=True, cache=True)
def _copy_rows(source, rows, values, target, places, out):
    """Copy the values of `rows` of a ragged array to their `places` in another."""
    for i in range(len(rows)):
        start, stop = source[rows[i]], source[rows[i] + 1]
        out[target[places[i]] : target[places[i]] + stop - start] = values[start:stop]


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pool:
    """Cells in the order in which they are handed out, and their annotations as object arrays (None for null)."""

    cells: Cells
    obs: dict[str, np.ndarray]

    @classmethod
    def allocate(cls, lengths: np.ndarray, counts_dtype: np.dtype, columns: list[str]) -> "Pool":
        """Make room for cells of these numbers of genes."""
        indptr = np.append(0, np.cumsum(lengths, dtype=np.int64))
        cells = Cells(
            indptr=indptr,
            gene_ids=np.empty(indptr[-1], dtype=np.uint16),
            counts=np.empty(indptr[-1], dtype=counts_dtype),
            cell_ids=np.empty(len(lengths), dtype=np.uint64),
            total_counts=np.empty(len(lengths), dtype=np.float32),
        )
        return cls(cells, {name: np.empty(len(lengths), dtype=object) for name in columns})

    def __getitem__(self, cells: slice) -> tuple[Cells, dict[str, np.ndarray]]:
        return self.cells[cells], {name: values[cells] for name, values in self.obs.items()}

    def fill(self, rows: np.ndarray, places: np.ndarray, cells: Cells, obs: dict[str, np.ndarray]) -> None:
        """Copy `rows` of other cells to `places` of this pool."""
        mine = self.cells
        _copy_rows(cells.indptr, rows, cells.gene_ids, mine.indptr, places, mine.gene_ids)
        _copy_rows(cells.indptr, rows, cells.counts, mine.indptr, places, mine.counts)
        mine.cell_ids[places] = cells.cell_ids[rows]
        mine.total_counts[places] = cells.total_counts[rows]
        for name, values in self.obs.items():
            values[places] = obs[name][rows]


class ParquetReader:
    """Reads the row groups of a split in the published layout.

    Attributes:
        columns: Annotations that are read.
        sizes: Cells of every row group of the split, `int64 (n_blocks,)`, over all shards in order.
        starts: Number of cells before each of them, `int64 (n_blocks,)`.
        places: Number of the shard, and of the row group in it.
    """

    def __init__(self, corpus: Corpus, split: str, columns: list[str]):
        self.corpus = corpus
        self.columns = columns
        self.shards = corpus.shards(split)
        sizes, self.places = [], []
        for index, shard in enumerate(self.shards):
            for group, first in enumerate(range(0, shard.n_cells, shard.row_group_size)):
                sizes.append(min(shard.row_group_size, shard.n_cells - first))
                self.places.append((index, group))
        self.sizes = np.array(sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self._local = threading.local()

    @functools.cached_property
    def n_genes(self) -> np.ndarray:
        """Number of genes of every cell of the split, `uint16 (n_cells,)`."""
        tables = [pq.read_table(self.corpus.path / shard.path, columns=["n_genes"]) for shard in self.shards]
        return np.concatenate([table["n_genes"].to_numpy() for table in tables])

    def label_codes(self, column: str) -> tuple[list, np.ndarray]:
        """Labels of an annotation, the last of them None, and the code of every cell of the split."""
        tables = [
            pq.read_table(self.corpus.path / shard.path, columns=[column], read_dictionary=[column])
            for shard in self.shards
        ]
        tables = [table.replace_schema_metadata(None) for table in tables]
        values = pa.concat_tables(tables).unify_dictionaries()[column].combine_chunks()
        labels = [*values.dictionary.to_pylist(), None]
        return labels, values.indices.fill_null(len(labels) - 1).to_numpy()

    def counts_dtype(self, block: int) -> str:
        """`"uint16"` or `"float32"`."""
        return self.shards[self.places[block][0]].counts_dtype

    def read(self, block: int) -> tuple[Cells, dict[str, np.ndarray]]:
        """Decode one row group."""
        index, group = self.places[block]
        if not hasattr(self._local, "open"):  # a ParquetFile serves one thread at a time
            self._local.open = functools.lru_cache(OPEN_FILES)(self._open)
        try:
            table = self._local.open(index).read_row_group(
                group, columns=[*CELL_COLUMNS, *self.columns], use_threads=False
            )
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"Row group {group} of {self.corpus.path / self.shards[index].path} can't be read: {error}. "
                "The shard is damaged: copy it anew, or delete it and run `prepare` again."
            ) from error
        return table_to_cells(table), {name: _strings(table[name]) for name in self.columns}

    def fill(self, pool: Pool, block: int, rows: np.ndarray, places: np.ndarray) -> None:
        """Copy `rows` of a block to their `places` in a pool."""
        cells, obs = self.read(block)
        pool.fill(rows, places, cells, obs)

    def _open(self, index: int) -> pq.ParquetFile:
        return self.corpus.open_shard(self.shards[index])


class CacheReader(ParquetReader):
    """Reads the blocks of a split in the training layout."""

    def __init__(self, corpus: Corpus, split: str, columns: list[str], path: Path):
        super().__init__(corpus, split, columns)
        index = json.loads((path / "index.json").read_text(encoding="utf-8"))
        self.path = path / split
        self._codec = pa.Codec("lz4_raw" if index["compression"] == "lz4" else "zstd")
        self._index = index["splits"][split]
        for name, n_bytes in self._index["n_bytes"].items():
            found = (self.path / name).stat().st_size if (self.path / name).exists() else None
            if found != n_bytes:
                raise ValueError(f"{self.path / name} has {found} bytes instead of {n_bytes}. {_REBUILD}")
        self._blocks = np.array(self._load("blocks.npy"))
        self._cell_ids, self._total_counts = self._load("cell_id.npy"), self._load("total_counts.npy")
        self._codes = {name: self._load(f"{name}.npy") for name in columns}
        self._labels = {name: np.array([*self._index["labels"][name], None], dtype=object) for name in columns}

    @functools.cached_property
    def n_genes(self) -> np.ndarray:
        """Number of genes of every cell of the split, `uint16 (n_cells,)`."""
        return self._load("n_genes.npy")

    def label_codes(self, column: str) -> tuple[list, np.ndarray]:
        """Labels of an annotation, the last of them None, and the code of every cell of the split."""
        if column not in CACHED_COLUMNS:
            return super().label_codes(column)
        return [*self._index["labels"][column], None], self._load(f"{column}.npy")

    def read(self, block: int) -> tuple[Cells, dict[str, np.ndarray]]:
        """Decode one block."""
        start, size = self.starts[block], self.sizes[block]
        pool = Pool.allocate(self.n_genes[start : start + size], self.counts_dtype(block), self.columns)
        self.fill(pool, block, np.arange(size), np.arange(size))
        return pool.cells, pool.obs

    def fill(self, pool: Pool, block: int, rows: np.ndarray, places: np.ndarray) -> None:
        """Copy `rows` of a block to their `places` in a pool."""
        cells, start, size = pool.cells, self.starts[block], self.sizes[block]
        planes = self._planes(block)
        source = np.append(0, np.cumsum(self.n_genes[start : start + size], dtype=np.int64))
        _join_ids(source, rows, planes[0], planes[1], cells.indptr, places, cells.gene_ids)
        if len(planes) == 4:
            _join_counts(source, rows, planes[2], planes[3], cells.indptr, places, cells.counts)
        else:
            counts = np.ascontiguousarray(np.stack(planes[2:], axis=1)).view(np.float32)[:, 0]
            _copy_rows(source, rows, counts, cells.indptr, places, cells.counts)
        absolute = start + rows
        cells.cell_ids[places] = self._cell_ids[absolute]
        cells.total_counts[places] = self._total_counts[absolute]
        for name, values in pool.obs.items():
            values[places] = self._labels[name][self._codes[name][absolute]]

    def _planes(self, block: int) -> list[np.ndarray]:
        record = self._blocks[block]
        path = self.path / f"genes-{record['shard']:05d}.bin"
        sizes = record["plane_bytes"][record["plane_bytes"] > 0]
        if not hasattr(self._local, "files"):
            self._local.files = functools.lru_cache(OPEN_FILES)(functools.partial(open, mode="rb", buffering=0))
        file = self._local.files(path)
        file.seek(int(record["offset"]))
        content = file.read(int(sizes.sum()))
        if hash_bytes(content) != record["checksum"]:
            raise ValueError(f"Block {block} of {path} does not have its checksum. {_REBUILD}")
        buffer, planes, at = pa.py_buffer(content), [], 0
        for n_bytes in sizes.tolist():
            plane = self._codec.decompress(buffer.slice(at, n_bytes), int(record["n_values"]))
            planes.append(np.frombuffer(plane, dtype=np.uint8))
            at += n_bytes
        return planes

    def _load(self, name: str) -> np.ndarray:
        try:
            if hash_bytes(np.memmap(self.path / name, np.uint8)) != self._index["checksums"][name]:
                raise ValueError(f"{self.path / name} does not have its checksum. {_REBUILD}")
            return np.load(self.path / name, mmap_mode="r")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.path / name} is missing. {_REBUILD}") from error


_REBUILD = "The cache is damaged; delete its folder and build it again."


class MemoryReader:
    """Decodes a whole split once and keeps it."""

    def __init__(self, reader: ParquetReader):
        self.sizes, self.starts, self.n_genes = reader.sizes, reader.starts, reader.n_genes
        self.counts_dtype, self.label_codes = reader.counts_dtype, reader.label_codes
        blocks = [reader.read(block) for block in range(len(reader.sizes))]
        self._cells = Cells.concatenate([cells for cells, _ in blocks])
        self._obs = {name: np.concatenate([obs[name] for _, obs in blocks]) for name in reader.columns}

    def fill(self, pool: Pool, block: int, rows: np.ndarray, places: np.ndarray) -> None:
        """Copy `rows` of a block to their `places` in a pool."""
        pool.fill(self.starts[block] + rows, places, self._cells, self._obs)


def _strings(column: pa.ChunkedArray) -> np.ndarray:
    """Return a string column as an object array, None for null."""
    if not pa.types.is_dictionary(column.type):
        return column.to_numpy(zero_copy_only=False)
    parts = []
    for chunk in column.chunks:
        labels = np.append(chunk.dictionary.to_numpy(zero_copy_only=False), None)
        parts.append(labels[chunk.indices.fill_null(len(labels) - 1).to_numpy()])
    return np.concatenate(parts) if parts else np.empty(0, dtype=object)


__all__ = [
    "CACHED_COLUMNS",
    "CacheReader",
    "MemoryReader",
    "ParquetReader",
    "Pool",
    "build_cache",
    "cache_matches",
    "default_cache_dir",
    "hash_bytes",
]

"""Write a corpus: shards in any order and by any number of processes, then the manifest; `corpus` has the format."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.commands.files import whole_file, write_json
from scmmgpt.train.data import corpus


MAX_EXACT_FLOAT32_INTEGER = 2**24
SHARD_NAME = re.compile(r"(?P<split>[a-z]+)-(?P<index>\d{5})-of-(?P<n_shards>\d{5})\.parquet")


class CorpusWriter:
    """Writes the shards of a corpus, and its manifest at the end; the folder `path` is created if missing.

    Several processes may write shards, each with its own writer. `finish` is called once, after the last shard. An
    existing shard is kept, so that a killed build can go on. The caller mixes the sources: a shard should have cells
    of many sources in random order.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        vocabulary: Mapping[str, int],
        *,
        gene_aliases: Mapping[str, Any] | None = None,
        row_group_size: int = corpus.ROW_GROUP_SIZE,
    ) -> None:
        largest = max(vocabulary.values(), default=-1)
        if not 0 <= min(vocabulary.values(), default=-1) <= largest < corpus.MAX_VOCABULARY_SIZE:
            raise ValueError(
                f"The gene vocabulary has {len(vocabulary)} entries with ids up to {largest}; a corpus has ids 0 to "
                f"{corpus.MAX_VOCABULARY_SIZE - 1}. Choose fewer genes, or renumber them."
            )
        self.path = Path(path)
        self.vocabulary = dict(vocabulary)
        self.vocabulary_hash = corpus.hash_vocabulary(vocabulary)
        self.gene_aliases = gene_aliases
        self.row_group_size = row_group_size
        (self.path / "data").mkdir(parents=True, exist_ok=True)

    def shard_path(self, split: str, index: int, n_shards: int) -> Path:
        """Return the path of a shard, whether or not the shard is written yet."""
        if split not in corpus.SPLITS:
            raise ValueError(f"Unknown split {split!r}; choose one of {corpus.SPLITS}.")
        if not 0 <= index < n_shards:
            raise ValueError(f"Shard {index} of {n_shards} does not exist; shards are numbered from 0.")
        return self.path / "data" / f"{split}-{index:05d}-of-{n_shards:05d}.parquet"

    def write_shard(
        self, split: str, index: int, n_shards: int, cells: Cells, obs: Mapping[str, Any] | pa.Table
    ) -> Path:
        """Write shard `index`, from 0, of the `n_shards` of a split, unless the shard exists; return its path.

        The cells are in the order of the shard, with ascending gene ids. `obs` has some of `OBS_COLUMNS`, each with
        one string (or None) per cell. The other columns become null.
        """
        path = self.shard_path(split, index, n_shards)
        if path.exists():
            return path
        _check_cells(cells, max(self.vocabulary.values()))
        table = self._shard_table(cells, _exact_counts(cells.counts), _obs_columns(obs, len(cells)))
        with whole_file(path, keep_existing=True) as temporary, open(temporary, "wb") as file:
            with pq.ParquetWriter(file, table.schema, **_parquet_options(table.schema)) as writer:
                if len(cells):
                    writer.write_table(table, row_group_size=self.row_group_size)
        return path

    def _shard_table(self, cells: Cells, counts: np.ndarray, columns: dict[str, pa.Array]) -> pa.Table:
        schema = corpus.shard_schema(counts.dtype.name, self.vocabulary_hash)
        offsets = pa.array(cells.indptr.astype(np.int32))
        gene_ids = pa.array(cells.gene_ids.astype(np.uint16, copy=False))
        arrays = {
            "cell_id": pa.array(cells.cell_ids.astype(np.uint64).view(np.int64)),
            "n_genes": pa.array(np.diff(cells.indptr).astype(np.uint16)),
            "gene_ids": pa.ListArray.from_arrays(offsets, gene_ids, type=schema.field("gene_ids").type),
            "counts": pa.ListArray.from_arrays(offsets, pa.array(counts), type=schema.field("counts").type),
            "total_counts": pa.array(cells.library_sizes()),
        }
        return pa.table(arrays | columns, schema=schema)

    def finish(self, *, splits: Mapping[str, Any] | None = None, **fields: Any) -> corpus.Manifest:
        """Check that no shard is missing; write vocabulary, `splits` and, last, the manifest with further `fields`."""
        for leftover in (self.path / "data").glob(".*.tmp*"):
            leftover.unlink(missing_ok=True)
        shards = [_describe_shard(path) for path in self._complete_shards()]
        write_json(self.path / "vocab.json", dict(sorted(self.vocabulary.items(), key=lambda item: item[1])))
        if self.gene_aliases is not None:
            write_json(self.path / "gene_aliases.json", dict(self.gene_aliases))
        write_json(self.path / "splits.json", dict(splits or {}))
        digest = corpus.hash_file(self.path / "splits.json")
        manifest = corpus.Manifest(self.vocabulary_hash, len(self.vocabulary), shards, splits_hash=digest, **fields)
        manifest.write(self.path / "manifest.json")
        return manifest

    def _complete_shards(self) -> list[Path]:
        """Return the paths of all shards; refuse a missing shard and shards of several builds."""
        folder = self.path / "data"
        paths = sorted(folder.glob("[!.]*.parquet"))
        indices: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))  # split -> n_shards -> there
        for path in paths:
            name = SHARD_NAME.fullmatch(path.name)
            if name is None:
                raise ValueError(f"{path} is not named like a shard (train-00000-of-00001.parquet); move it away.")
            indices[name["split"]][int(name["n_shards"])].add(int(name["index"]))
        for split, by_number in indices.items():
            if len(by_number) > 1:
                raise ValueError(
                    f"{folder} mixes shards of several builds: split {split!r} is in {sorted(by_number)} shards. "
                    "Remove the shards of the other builds."
                )
            ((n_shards, present),) = by_number.items()
            if missing := sorted(set(range(n_shards)) - present):
                raise ValueError(
                    f"Split {split!r} has {len(present)} of {n_shards} shards; missing are numbers {missing[:10]}. "
                    "Run the build again: it writes the missing shards only."
                )
        if not paths:
            raise ValueError(f"No shard was written to {folder}: there are no cells to make a corpus of.")
        return paths


def _describe_shard(path: Path) -> corpus.Shard:
    metadata = pq.read_metadata(path)
    schema = metadata.schema.to_arrow_schema()
    return corpus.Shard(
        path=f"data/{path.name}",
        split=path.name.split("-")[0],
        n_cells=metadata.num_rows,
        n_values=int(pc.sum(pq.read_table(path, columns=["n_genes"])["n_genes"]).as_py() or 0),
        n_bytes=path.stat().st_size,
        sha256=corpus.hash_file(path),
        counts_dtype=np.dtype(schema.field("counts").type.value_type.to_pandas_dtype()).name,
        row_group_size=metadata.row_group(0).num_rows if metadata.num_row_groups else corpus.ROW_GROUP_SIZE,
    )


def _parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Options of the smallest Parquet files: deltas for sorted ids, dictionaries for small counts and labels."""
    small = schema.field("counts").type.value_type == pa.uint16()
    encodings = {"gene_ids.list.element": "DELTA_BINARY_PACKED", "barcode": "DELTA_BYTE_ARRAY"}
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": ["n_genes", *corpus.OBS_COLUMNS[1:], *(["counts.list.element"] if small else [])],
        "column_encoding": encodings | ({} if small else {"counts.list.element": "BYTE_STREAM_SPLIT"}),
        "write_page_checksum": True,
        "write_statistics": list(corpus.OBS_COLUMNS[1:]),
    }


def _exact_counts(counts: np.ndarray) -> np.ndarray:
    """Return counts as uint16 if all fit without loss, else as float32; refuse integers that float32 would round."""
    small = counts.astype(np.uint16, copy=False)
    if np.array_equal(small, counts):
        return small
    if np.issubdtype(counts.dtype, np.integer) and counts.max() > MAX_EXACT_FLOAT32_INTEGER:
        raise ValueError(
            f"The largest count is {counts.max()}; a corpus has exact integers up to {MAX_EXACT_FLOAT32_INTEGER}. "
            "Check that the values are counts of molecules or reads."
        )
    return counts.astype(np.float32, copy=False)


def _check_cells(cells: Cells, largest_id: int) -> None:
    n_genes = np.diff(cells.indptr)
    if len(n_genes) and n_genes.max() >= 2**16:
        raise ValueError(f"A cell has {n_genes.max()} genes; at most {2**16 - 1} can be stored.")
    if len(cells.gene_ids) == 0:
        return
    if cells.gene_ids.min() < 0 or cells.gene_ids.max() > largest_id:
        raise ValueError(
            f"Gene ids run from {cells.gene_ids.min()} to {cells.gene_ids.max()}, the vocabulary from 0 to "
            f"{largest_id}. The cells may come from another vocabulary: read them with this one."
        )
    ascending = cells.gene_ids[1:] > cells.gene_ids[:-1]
    starts = cells.indptr[1:-1]
    starts = starts[(starts > 0) & (starts < len(cells.gene_ids))]
    ascending[starts - 1] = True  # from the last gene of a cell to the first of the next
    if not ascending.all():
        cell = np.searchsorted(cells.indptr, np.flatnonzero(~ascending)[0], side="right") - 1
        raise ValueError(f"The gene ids of cell {cell} are not ascending and unique. Use `Cells.sorted_by_gene`.")
    if not (np.isfinite(cells.counts).all() and cells.counts.min() > 0):
        raise ValueError(f"Stored counts must be finite and above 0, but the smallest is {cells.counts.min()}.")


def _obs_columns(obs: Mapping[str, Any] | pa.Table, n_cells: int) -> dict[str, pa.Array]:
    """Return every column of `OBS_COLUMNS` as a string array; missing columns are null."""
    table = obs if isinstance(obs, pa.Table) else pa.table(dict(obs))
    if unknown := sorted(set(table.column_names) - set(corpus.OBS_COLUMNS)):
        raise ValueError(f"obs has the columns {unknown}; a corpus has only {list(corpus.OBS_COLUMNS)}.")
    if table.num_columns and table.num_rows != n_cells:
        raise ValueError(f"obs has {table.num_rows} rows for {n_cells} cells; pass one row per cell.")
    known = {name: table[name].combine_chunks().cast(pa.string()) for name in table.column_names}
    return {name: known.get(name, pa.nulls(n_cells, pa.string())) for name in corpus.OBS_COLUMNS}

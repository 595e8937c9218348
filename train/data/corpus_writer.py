"""Writing a corpus: shards in any order and by any number of processes, and the manifest when all are there.

A shard gets its name when it is whole, and never replaces one that another process has finished. `corpus` describes
the files.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.files import whole_file, write_json
from scmmgpt.train.data.corpus import (
    MAX_VOCABULARY_SIZE,
    OBS_COLUMNS,
    ROW_GROUP_SIZE,
    SPLITS,
    Manifest,
    Shard,
    hash_file,
    hash_vocabulary,
    shard_schema,
)


Obs: TypeAlias = Mapping[str, Any] | pd.DataFrame | pa.Table

MAX_EXACT_FLOAT32_INTEGER = 2**24
SHARD_NAME = re.compile(r"(?P<split>[a-z]+)-(?P<index>\d{5})-of-(?P<n_shards>\d{5})\.parquet")


class CorpusWriter:
    """Writes a corpus, shard by shard, and its manifest at the end.

    Shards may be written in any order and by several processes, each with a writer of its own; `finish` is called
    once, when all are there. A shard that exists is left alone, so that a build can go on after it was killed. For
    the stream to mix well, the caller puts cells of many sources into each shard, in random order.

    Args:
        path: Folder of the corpus; created where missing.
        vocabulary: Gene symbol -> id.
        gene_aliases: Other gene name -> symbol of the vocabulary.
        row_group_size: Cells per Parquet row group.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        vocabulary: Mapping[str, int],
        *,
        gene_aliases: Mapping[str, Any] | None = None,
        row_group_size: int = ROW_GROUP_SIZE,
    ) -> None:
        if not vocabulary or min(vocabulary.values()) < 0 or max(vocabulary.values()) >= MAX_VOCABULARY_SIZE:
            raise ValueError(
                f"The gene vocabulary has {len(vocabulary)} entries with ids up to "
                f"{max(vocabulary.values(), default=None)}; a corpus stores ids 0 to {MAX_VOCABULARY_SIZE - 1}."
            )
        self.path = Path(path)
        self.vocabulary = dict(vocabulary)
        self.vocabulary_hash = hash_vocabulary(vocabulary)
        self.gene_aliases = gene_aliases
        self.row_group_size = row_group_size
        (self.path / "data").mkdir(parents=True, exist_ok=True)

    def shard_path(self, split: str, index: int, n_shards: int) -> Path:
        """Return where this shard lies, or will."""
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; choose one of {SPLITS}.")
        if not 0 <= index < n_shards:
            raise ValueError(f"Shard {index} of {n_shards} does not exist; shards are numbered from 0.")
        return self.path / "data" / f"{split}-{index:05d}-of-{n_shards:05d}.parquet"

    def write_shard(self, split: str, index: int, n_shards: int, cells: Cells, obs: Obs) -> Path:
        """Write one shard. If it exists already, it is kept and nothing is written.

        Args:
            split: `"train"`, `"validation"` or `"test"`.
            index: Number of the shard in its split, from 0.
            n_shards: Number of shards of the split.
            cells: The cells, in the order in which they shall lie in the shard.
            obs: Column name -> one string (or None) per cell, for any of `OBS_COLUMNS`; a table of pandas or
                pyarrow also serves. Columns left out are null.

        Returns:
            Path of the shard.
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
        schema = shard_schema(counts.dtype.name, self.vocabulary_hash)
        offsets = pa.array(cells.indptr.astype(np.int32))
        lists = {
            name: pa.ListArray.from_arrays(offsets, pa.array(values), type=schema.field(name).type)
            for name, values in (("gene_ids", cells.gene_ids.astype(np.uint16, copy=False)), ("counts", counts))
        }
        arrays = {
            "cell_id": pa.array(cells.cell_ids, pa.uint64()),
            "n_genes": pa.array(np.diff(cells.indptr).astype(np.uint16)),
            **lists,
            "total_counts": pa.array(cells.library_sizes()),
            **columns,
        }
        return pa.table(arrays, schema=schema)

    def finish(self, *, splits: Mapping[str, Any] | None = None, **fields: Any) -> Manifest:
        """Check that the shards are complete and write vocabulary, splits and, last, the manifest.

        Args:
            splits: Content of `splits.json`.
            fields: Fields of `Manifest` that describe sources and build.
        """
        for leftover in (self.path / "data").glob(".*.tmp*"):
            leftover.unlink(missing_ok=True)
        shards = [describe_shard(path, self.path) for path in self._complete_shards()]
        write_json(self.path / "vocab.json", dict(sorted(self.vocabulary.items(), key=lambda item: item[1])))
        if self.gene_aliases is not None:
            write_json(self.path / "gene_aliases.json", dict(self.gene_aliases))
        write_json(self.path / "splits.json", dict(splits or {}))
        manifest = Manifest(
            vocabulary_hash=self.vocabulary_hash,
            vocabulary_size=len(self.vocabulary),
            shards=shards,
            splits_hash=hash_file(self.path / "splits.json"),
            **fields,
        )
        manifest.write(self.path / "manifest.json")
        return manifest

    def _complete_shards(self) -> list[Path]:
        folder = self.path / "data"
        paths = sorted(folder.glob("[!.]*.parquet"))
        indices: dict[str, dict[int, set[int]]] = {}  # split -> number of shards -> those that are there
        for path in paths:
            name = SHARD_NAME.fullmatch(path.name)
            if name is None:
                raise ValueError(f"{path} is not named like a shard (train-00000-of-00001.parquet); move it away.")
            found = indices.setdefault(name["split"], {}).setdefault(int(name["n_shards"]), set())
            found.add(int(name["index"]))
        for split, by_number in indices.items():
            if len(by_number) > 1:
                raise ValueError(
                    f"{folder} mixes shards of several builds: split {split!r} is there in {sorted(by_number)} "
                    "shards. Remove the ones that do not belong."
                )
            ((n_shards, found),) = by_number.items()
            if missing := sorted(set(range(n_shards)) - found):
                raise ValueError(
                    f"Split {split!r} has {len(found)} of {n_shards} shards; missing are numbers {missing[:10]}. "
                    "Run the build again: it writes only what is missing."
                )
        if not paths:
            raise ValueError(f"No shard was written to {folder}: there are no cells to make a corpus of.")
        return paths


def write_corpus(
    path: str | os.PathLike,
    vocabulary: Mapping[str, int],
    cells_by_split: Mapping[str, tuple[Cells, Obs]],
    *,
    cells_per_shard: int = 100_000,
    row_group_size: int = ROW_GROUP_SIZE,
    gene_aliases: Mapping[str, Any] | None = None,
    **manifest_fields: Any,
) -> Manifest:
    """Write a corpus that fits in memory, cells in the given order.

    Args:
        path: Folder of the corpus.
        vocabulary: Gene symbol -> id.
        cells_by_split: Split -> (cells, obs), as for `CorpusWriter.write_shard`.
        cells_per_shard: Cells per shard; the last shard of a split may be smaller.
        row_group_size: Cells per Parquet row group.
        gene_aliases: Other gene name -> symbol of the vocabulary.
        manifest_fields: Passed to `CorpusWriter.finish`.

    Returns:
        The manifest, as written.
    """
    writer = CorpusWriter(path, vocabulary, gene_aliases=gene_aliases, row_group_size=row_group_size)
    for split, (cells, obs) in cells_by_split.items():
        table = pa.table(_obs_columns(obs, len(cells)))
        starts = range(0, len(cells), cells_per_shard)
        for index, start in enumerate(starts):
            part = cells[start : start + cells_per_shard]
            writer.write_shard(split, index, len(starts), part, table.slice(start, len(part)))
    return writer.finish(**manifest_fields)


def describe_shard(path: Path, root: Path) -> Shard:
    """Read a shard's footer and checksum into the record that the manifest keeps."""
    metadata = pq.read_metadata(path)
    schema = metadata.schema.to_arrow_schema()
    return Shard(
        path=path.relative_to(root).as_posix(),
        split=path.name.split("-")[0],
        n_cells=metadata.num_rows,
        n_values=int(pc.sum(pq.read_table(path, columns=["n_genes"])["n_genes"]).as_py() or 0),
        n_bytes=path.stat().st_size,
        sha256=hash_file(path),
        counts_dtype=np.dtype(schema.field("counts").type.value_type.to_pandas_dtype()).name,
        row_group_size=metadata.row_group(0).num_rows if metadata.num_row_groups else ROW_GROUP_SIZE,
    )


def _parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Encodings that give the smallest files: deltas of sorted ids, dictionaries of small counts and of labels."""
    small = schema.field("counts").type.value_type == pa.uint16()
    encodings = {"gene_ids.list.element": "DELTA_BINARY_PACKED", "barcode": "DELTA_BYTE_ARRAY"}
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": ["n_genes", *OBS_COLUMNS[1:], *(["counts.list.element"] if small else [])],
        "column_encoding": encodings | ({} if small else {"counts.list.element": "BYTE_STREAM_SPLIT"}),
        "write_page_checksum": True,
        "write_statistics": list(OBS_COLUMNS[1:]),
    }


def _exact_counts(counts: np.ndarray) -> np.ndarray:
    """Return counts as uint16 if all fit without loss, else as float32; refuse what neither holds."""
    small = counts.astype(np.uint16, copy=False)
    if np.array_equal(small, counts):
        return small
    if np.issubdtype(counts.dtype, np.integer) and counts.max() > MAX_EXACT_FLOAT32_INTEGER:
        raise ValueError(
            f"The largest count is {counts.max()}; a corpus stores integers exactly up to "
            f"{MAX_EXACT_FLOAT32_INTEGER} per gene and cell. Are these counts of molecules or reads?"
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
            f"{largest_id}. Were the cells read with another vocabulary?"
        )
    ascending = cells.gene_ids[1:] > cells.gene_ids[:-1]
    starts = cells.indptr[1:-1]
    starts = starts[(starts > 0) & (starts < len(cells.gene_ids))]
    ascending[starts - 1] = True  # from the last gene of a cell to the first of the next
    if not ascending.all():
        cell = np.searchsorted(cells.indptr, np.flatnonzero(~ascending)[0], side="right") - 1
        raise ValueError(f"The gene ids of cell {cell} are not ascending and unique.")
    if not (np.isfinite(cells.counts).all() and cells.counts.min() > 0):
        raise ValueError(f"Stored counts must be finite and above 0, but the smallest is {cells.counts.min()}.")


def _obs_columns(obs: Obs, n_cells: int) -> dict[str, pa.Array]:
    """Return every column of `OBS_COLUMNS` as a string array; missing ones are null."""
    names = list(obs.column_names if isinstance(obs, pa.Table) else obs.keys())
    if unknown := sorted(set(names) - set(OBS_COLUMNS)):
        raise ValueError(f"obs has columns {unknown} that the schema does not know; it has {list(OBS_COLUMNS)}.")
    columns = {}
    for name in OBS_COLUMNS:
        values = obs[name] if name in names else pa.nulls(n_cells)
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        elif not isinstance(values, pa.Array):
            values = pa.array(values, from_pandas=True)
        if len(values) != n_cells:
            raise ValueError(f"obs[{name!r}] has {len(values)} values for {n_cells} cells.")
        columns[name] = values.cast(pa.string())
    return columns

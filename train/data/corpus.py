"""The training corpus on disk: a folder of Parquet shards, a gene vocabulary, splits and a manifest.

```
manifest.json      schema version, vocabulary hash, sources, splits, one record with a checksum per shard
vocab.json         gene symbol -> id (scGPT's format)
gene_aliases.json  other gene name -> symbol of the vocabulary (optional)
splits.json        which datasets, donors or cells make up train, validation and test
data/              train-00000-of-00003.parquet, ...: the published layout
cache/             the training layout, built from `data/` on one machine (`python -m scmmgpt.train cache`)
```

One row of a shard is one cell (schema version 1):

| column | type | meaning |
| --- | --- | --- |
| `cell_id` | uint64 | stable identity of the cell; seeds all randomness of the cell |
| `n_genes` | uint16 | number of genes stored for the cell |
| `gene_ids` | list<uint16> | expressed genes, as ascending ids of `vocab.json` |
| `counts` | list<uint16> or list<float32> | their values; float32 if one in the shard is no integer or above 65,535 |
| `total_counts` | float32 | library size over all genes of the source, not only those of the vocabulary |
| `barcode`, `dataset_id`, `donor_id`, `cell_type`, ... (`OBS_COLUMNS`) | string | annotations, null where unknown |

The shards can be read by anything that reads Parquet:

```python
load_dataset("parquet", data_files="corpus/data/train-*.parquet", features=open_corpus("corpus").features())
```

A shard is written under a temporary name, synced, and linked to its final name in one step: a file in `data/` is
always whole, and is never written twice. `manifest.json` is written last, so that a folder with a manifest is a
finished corpus. Pages carry a CRC that is checked whenever they are read.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.files import sync_folder, write_json


logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
SPLITS = ("train", "validation", "test")
OBS_COLUMNS = (
    "barcode",
    "dataset_id",
    "donor_id",
    "cell_type",
    "cell_type_ontology_term_id",
    "tissue",
    "tissue_ontology_term_id",
    "disease",
    "disease_ontology_term_id",
    "assay",
    "assay_ontology_term_id",
    "development_stage",
    "development_stage_ontology_term_id",
    "sex",
    "sex_ontology_term_id",
    "organism",
    "organism_ontology_term_id",
)
ROW_GROUP_SIZE = 512  # cells: the unit in which cells are read; a few tens of them make one shuffled pool
MAX_VOCABULARY_SIZE = 2**16  # gene ids are stored as uint16; scGPT's vocabulary has 60,697 entries
MAX_EXACT_FLOAT32_INTEGER = 2**24
SMALL_CORPUS_BYTES = 2**30  # up to here checksums take about a second and `open_corpus` verifies them

_SHARD_NAME = re.compile(r"(?P<split>[a-z]+)-(?P<index>\d{5})-of-(?P<n_shards>\d{5})\.parquet")
_METADATA_KEY = b"scmmgpt"


def hash_vocabulary(vocabulary: Mapping[str, int]) -> str:
    """Return the sha256 of a gene vocabulary: its JSON, sorted by id, without spaces."""
    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    return hashlib.sha256(json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def hash_file(path: str | os.PathLike) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class Shard:
    """What the manifest says of one shard.

    `path` is relative to the corpus. Every row group holds `row_group_size` cells, but the last may hold fewer.
    """

    path: str
    split: str
    n_cells: int
    n_values: int
    n_bytes: int
    sha256: str
    counts_dtype: str
    row_group_size: int


@dataclasses.dataclass
class Manifest:
    """The record of a corpus: what it holds, where it came from, how it was divided, and how to verify it.

    Args:
        vocabulary_hash: `hash_vocabulary` of `vocab.json`.
        vocabulary_size: Number of entries of the vocabulary.
        shards: One record per shard, sorted by path.
        split_by: The unit that no two splits share: `"dataset"`, `"donor"` or `"cell"`.
        splits_hash: sha256 of `splits.json`.
        sources: One mapping per source: name, licence, numbers of cells and genes, and the like.
        excluded_datasets: Dataset ids kept out on purpose, such as evaluation sets.
        dropped: Cells and genes that were left out, as counts by reason.
        command: The command that built the corpus.
        notes: Anything else worth keeping, JSON-able.
        schema_version: Version of the columns of a shard.
    """

    vocabulary_hash: str
    vocabulary_size: int
    shards: list[Shard]
    split_by: str | None = None
    splits_hash: str | None = None
    sources: list[dict] = dataclasses.field(default_factory=list)
    excluded_datasets: list[str] = dataclasses.field(default_factory=list)
    dropped: dict = dataclasses.field(default_factory=dict)
    command: str | None = None
    notes: dict = dataclasses.field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def n_cells(self) -> int:
        """Cells of all splits."""
        return sum(shard.n_cells for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.n_bytes for shard in self.shards)

    def write(self, path: str | os.PathLike) -> None:
        """Write the manifest as JSON, in one step."""
        totals = {"n_cells": self.n_cells, "n_bytes": self.n_bytes}
        write_json(path, {"schema_version": self.schema_version, **totals, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Manifest":
        """Read a manifest, refusing one of a newer schema."""
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        version = fields.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema version {version}; this release reads version {SCHEMA_VERSION}. "
                "Install the release that wrote it, or prepare the corpus again."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in fields.items() if name in known}
        fields["shards"] = [Shard(**shard) for shard in fields["shards"]]
        return cls(**fields)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def shard_schema(counts_dtype: str, vocabulary_hash: str) -> pa.Schema:
    """Return the Arrow schema of a shard whose counts are `"uint16"` or `"float32"`."""
    # Declared never null, which makes lists a fifth cheaper to read.
    gene_ids = pa.list_(pa.field("element", pa.uint16(), nullable=False))
    counts = pa.list_(pa.field("element", pa.type_for_alias(counts_dtype), nullable=False))
    columns = [
        pa.field("cell_id", pa.uint64(), nullable=False),
        pa.field("n_genes", pa.uint16(), nullable=False),
        pa.field("gene_ids", gene_ids, nullable=False),
        pa.field("counts", counts, nullable=False),
        pa.field("total_counts", pa.float32(), nullable=False),
        *(pa.field(name, pa.string()) for name in OBS_COLUMNS),
    ]
    described = json.dumps({"schema_version": SCHEMA_VERSION, "vocabulary_hash": vocabulary_hash})
    return pa.schema(columns, metadata={_METADATA_KEY: described.encode()})


class CorpusWriter:
    """Writes the published layout of a corpus, shard by shard, and its manifest at the end.

    Shards may be written in any order and by several processes, each with a writer of its own; `finish` is called
    once, when all are there. A shard that exists is left alone, so a build that was killed only has to ask
    `has_shard` and go on. For the stream to mix well, the caller puts cells of many sources into each shard,
    in random order.

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
        gene_aliases: Mapping[str, str] | None = None,
        row_group_size: int = ROW_GROUP_SIZE,
    ):
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

    def has_shard(self, split: str, index: int, n_shards: int) -> bool:
        """Whether this shard is already there, and so is whole."""
        return self.shard_path(split, index, n_shards).exists()

    def write_shard(self, split: str, index: int, n_shards: int, cells: Cells, obs: Mapping) -> Path:
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
        counts = _exact_counts(cells.counts)
        _check_cells(cells, max(self.vocabulary.values()))
        columns = _obs_columns(obs, len(cells))
        schema = shard_schema(counts.dtype.name, self.vocabulary_hash)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "wb") as file:
                with pq.ParquetWriter(file, schema, **_parquet_options(counts.dtype)) as writer:
                    for start in range(0, len(cells), self.row_group_size):
                        stop = min(start + self.row_group_size, len(cells))
                        table = _row_group(cells, counts, columns, schema, start, stop)
                        writer.write_table(table, row_group_size=self.row_group_size)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)  # unlike a rename, this never replaces another writer's finished shard
            except FileExistsError:
                logger.info("%s was written by another worker in the meantime; keeping theirs.", path)
            except OSError:  # a file system without hard links
                os.rename(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def finish(
        self,
        *,
        splits: Mapping | None = None,
        split_by: str | None = None,
        sources: list[dict] | None = None,
        excluded_datasets: list[str] | None = None,
        dropped: dict | None = None,
        command: str | None = None,
        notes: dict | None = None,
    ) -> Manifest:
        """Check that the shards are complete and write vocabulary, splits and, last, the manifest.

        The arguments are the fields of `Manifest`; `splits` becomes `splits.json`.
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
            split_by=split_by,
            splits_hash=hash_file(self.path / "splits.json"),
            sources=list(sources or []),
            excluded_datasets=list(excluded_datasets or []),
            dropped=dict(dropped or {}),
            command=command,
            notes=dict(notes or {}),
        )
        manifest.write(self.path / "manifest.json")
        return manifest

    def _complete_shards(self) -> list[Path]:
        paths = sorted((self.path / "data").glob("*.parquet"))
        found: dict[str, dict[int, set[int]]] = {}
        for path in paths:
            name = _SHARD_NAME.fullmatch(path.name)
            if name is None:
                raise ValueError(f"{path} is not named like a shard (train-00000-of-00001.parquet); move it away.")
            indices = found.setdefault(name["split"], {}).setdefault(int(name["n_shards"]), set())
            indices.add(int(name["index"]))
        for split, by_number in found.items():
            if len(by_number) > 1:
                raise ValueError(
                    f"{self.path / 'data'} mixes shards of several builds: split {split!r} is there in "
                    f"{sorted(by_number)} shards. Remove the ones that do not belong."
                )
            ((n_shards, indices),) = by_number.items()
            missing = sorted(set(range(n_shards)) - indices)
            if missing:
                raise ValueError(
                    f"Split {split!r} has {len(indices)} of {n_shards} shards; missing are numbers {missing[:10]}. "
                    "Run the build again: it writes only what is missing."
                )
        if not paths:
            raise ValueError(f"No shard was written to {self.path / 'data'}: there are no cells to make a corpus of.")
        return paths


def write_corpus(
    path: str | os.PathLike,
    vocabulary: Mapping[str, int],
    cells_by_split: Mapping[str, tuple[Cells, Mapping]],
    *,
    cells_per_shard: int = 100_000,
    row_group_size: int = ROW_GROUP_SIZE,
    gene_aliases: Mapping[str, str] | None = None,
    **manifest_fields,
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
        columns = _obs_columns(obs, len(cells))
        starts = range(0, len(cells), cells_per_shard)
        for index, start in enumerate(starts):
            stop = min(start + cells_per_shard, len(cells))
            part = {name: column.slice(start, stop - start) for name, column in columns.items()}
            writer.write_shard(split, index, len(starts), cells[start:stop], part)
    return writer.finish(**manifest_fields)


def describe_shard(path: Path, root: Path) -> Shard:
    """Read a shard's footer and checksum into the record that the manifest keeps."""
    metadata = pq.read_metadata(path)
    schema = metadata.schema.to_arrow_schema()
    return Shard(
        path=path.relative_to(root).as_posix(),
        split=_SHARD_NAME.fullmatch(path.name)["split"],
        n_cells=metadata.num_rows,
        n_values=int(pc.sum(pq.read_table(path, columns=["n_genes"])["n_genes"]).as_py() or 0),
        n_bytes=path.stat().st_size,
        sha256=hash_file(path),
        counts_dtype=np.dtype(schema.field("counts").type.value_type.to_pandas_dtype()).name,
        row_group_size=metadata.row_group(0).num_rows if metadata.num_row_groups else ROW_GROUP_SIZE,
    )


def _parquet_options(counts_dtype: np.dtype) -> dict:
    """Encodings that give the smallest files: deltas of sorted ids, dictionaries of small counts and of labels."""
    options = {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": ["n_genes", *OBS_COLUMNS[1:]],
        "column_encoding": {"gene_ids.list.element": "DELTA_BINARY_PACKED", "barcode": "DELTA_BYTE_ARRAY"},
        "write_page_checksum": True,
        "write_statistics": list(OBS_COLUMNS[1:]),
    }
    if counts_dtype == np.uint16:
        options["use_dictionary"].append("counts.list.element")
    else:
        options["column_encoding"]["counts.list.element"] = "BYTE_STREAM_SPLIT"
    return options


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
    if len(cells.cell_ids) != len(cells) or cells.indptr[0] != 0 or cells.indptr[-1] != len(cells.gene_ids):
        raise ValueError(
            f"The cells are inconsistent: {len(cells)} cells, {len(cells.cell_ids)} cell_ids, indptr from "
            f"{cells.indptr[0]} to {cells.indptr[-1]}, {len(cells.gene_ids)} gene ids."
        )
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


def _obs_columns(obs: Mapping, n_cells: int) -> dict[str, pa.Array]:
    """Return every column of `OBS_COLUMNS` as a string array; missing ones are null."""
    if isinstance(obs, pa.Table):
        obs = {name: obs[name].combine_chunks() for name in obs.column_names}
    names = list(obs.keys())
    unknown = sorted(set(names) - set(OBS_COLUMNS))
    if unknown:
        raise ValueError(f"obs has columns {unknown} that the schema does not know; it has {list(OBS_COLUMNS)}.")
    columns = {}
    for name in OBS_COLUMNS:
        if name not in names:
            columns[name] = pa.nulls(n_cells, pa.string())
            continue
        values = obs[name]
        if not isinstance(values, pa.Array):
            values = pa.array(values, from_pandas=True)
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        values = values.cast(pa.string())
        if len(values) != n_cells:
            raise ValueError(f"obs[{name!r}] has {len(values)} values for {n_cells} cells.")
        columns[name] = values
    return columns


def _row_group(
    cells: Cells, counts: np.ndarray, columns: dict[str, pa.Array], schema: pa.Schema, start: int, stop: int
) -> pa.Table:
    first, last = cells.indptr[start], cells.indptr[stop]
    offsets = pa.array((cells.indptr[start : stop + 1] - first).astype(np.int32))
    if cells.total_counts is None:
        totals = np.add.reduceat(np.append(counts[first:last], 0).astype(np.float64), offsets.to_numpy()[:-1])
        totals[np.diff(offsets.to_numpy()) == 0] = 0
    else:
        totals = cells.total_counts[start:stop]
    arrays = {
        "cell_id": pa.array(cells.cell_ids[start:stop], pa.uint64()),
        "n_genes": pa.array(np.diff(cells.indptr[start : stop + 1]).astype(np.uint16)),
        "gene_ids": _lists(offsets, cells.gene_ids[first:last].astype(np.uint16), schema.field("gene_ids").type),
        "counts": _lists(offsets, counts[first:last], schema.field("counts").type),
        "total_counts": pa.array(totals.astype(np.float32)),
        **{name: column.slice(start, stop - start) for name, column in columns.items()},
    }
    return pa.table(arrays, schema=schema)


def _lists(offsets: pa.Array, values: np.ndarray, kind: pa.ListType) -> pa.ListArray:
    return pa.ListArray.from_arrays(offsets, pa.array(values), type=kind)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class Corpus:
    """An opened corpus; made by `open_corpus`.

    Attributes:
        path: Folder of the corpus.
        manifest: Its `Manifest`.
        vocabulary: Gene symbol -> id.
        gene_aliases: Other gene name -> symbol of the vocabulary; empty if the corpus has none.
        splits: Content of `splits.json`.
    """

    def __init__(self, path: Path, manifest: Manifest, vocabulary: dict, gene_aliases: dict, splits: dict):
        self.path = path
        self.manifest = manifest
        self.vocabulary = vocabulary
        self.gene_aliases = gene_aliases
        self.splits = splits

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split}: {self.n_cells(split):,}" for split in self.split_names)
        return f"Corpus({str(self.path)!r}, {sizes} cells, {len(self.vocabulary):,} genes)"

    @property
    def split_names(self) -> list[str]:
        """Splits that have cells."""
        return [split for split in SPLITS if any(shard.split == split for shard in self.manifest.shards)]

    @property
    def gene_symbols(self) -> np.ndarray:
        """Gene symbol of every id, shape `(largest id + 1,)`; None where an id is not in use."""
        symbols = np.full(max(self.vocabulary.values()) + 1, None, dtype=object)
        symbols[list(self.vocabulary.values())] = list(self.vocabulary)
        return symbols

    def shards(self, split: str) -> list[Shard]:
        """Return the shards of a split, in order."""
        shards = [shard for shard in self.manifest.shards if shard.split == split]
        if not shards:
            raise ValueError(f"{self.path} has no split {split!r}; it has {self.split_names}.")
        return shards

    def n_cells(self, split: str) -> int:
        """Cells of a split."""
        return sum(shard.n_cells for shard in self.shards(split))

    def obs(self, split: str, columns: list[str] | None = None) -> pa.Table:
        """Read the annotations of a split: `cell_id`, `n_genes`, `total_counts` and `OBS_COLUMNS`, or `columns`.

        Labels come as dictionary arrays; `.to_pandas()` makes them categories.
        """
        columns = ["cell_id", "n_genes", "total_counts", *OBS_COLUMNS] if columns is None else list(columns)
        labels = [name for name in columns if name in OBS_COLUMNS[1:]]
        tables = [
            pq.read_table(self.path / shard.path, columns=columns, read_dictionary=labels, partitioning=None)
            for shard in self.shards(split)
        ]
        return pa.concat_tables([table.replace_schema_metadata(None) for table in tables]).unify_dictionaries()

    def iter_cells(self, split: str, columns: list[str] | None = None) -> Iterator[tuple[Cells, pa.Table]]:
        """Read a split in stored order, one row group at a time, as (cells, annotations)."""
        columns = list(OBS_COLUMNS) if columns is None else list(columns)
        for shard in self.shards(split):
            with self.open_shard(shard) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=[*CELL_COLUMNS, *columns])
                    yield table_to_cells(table), table.select(columns)

    def read_cells(self, split: str, columns: list[str] | None = None) -> tuple[Cells, pa.Table]:
        """Read a whole split into memory, in stored order."""
        groups = list(self.iter_cells(split, columns))
        return Cells.concatenate([cells for cells, _ in groups]), pa.concat_tables([table for _, table in groups])

    def to_adata(self, split: str):
        """Return a split as an AnnData: counts over the whole vocabulary in CSR, barcodes as `obs_names`."""
        import anndata
        from scipy import sparse

        cells, table = self.read_cells(split)
        obs = table.to_pandas().set_index("barcode")
        obs["total_counts"] = cells.library_sizes()
        genes = np.array([name for name in self.vocabulary if not name.startswith("<")])
        columns = [self.vocabulary[name] for name in genes]
        arrays = (cells.counts.astype(np.float32), cells.gene_ids.astype(np.int64), cells.indptr)
        counts = sparse.csr_matrix(arrays, shape=(len(cells), max(self.vocabulary.values()) + 1))
        adata = anndata.AnnData(X=counts[:, columns], obs=obs.dropna(axis=1, how="all"))
        adata.var_names = genes
        return adata

    def open_shard(self, shard: Shard) -> pq.ParquetFile:
        """Open a shard for reading, with page checksums verified."""
        labels = list(OBS_COLUMNS[1:])
        try:
            return pq.ParquetFile(
                self.path / shard.path, page_checksum_verification=True, read_dictionary=labels, memory_map=False
            )
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"Shard {self.path / shard.path} can't be read: {error}. {_RESTORE}") from error

    def features(self):
        """Return the `datasets.Features` of the shards, with the widest type of counts that occurs."""
        import datasets

        widest = "float32" if any(s.counts_dtype == "float32" for s in self.manifest.shards) else "uint16"
        return datasets.Features.from_arrow_schema(shard_schema(widest, self.manifest.vocabulary_hash))

    def verify(self) -> None:
        """Compare every shard with its checksum in the manifest. Reads the whole corpus."""
        for shard in self.manifest.shards:
            found = hash_file(self.path / shard.path)
            if found != shard.sha256:
                raise ValueError(
                    f"Shard {self.path / shard.path} has sha256 {found[:12]}..., the manifest says "
                    f"{shard.sha256[:12]}...: its content has changed. {_RESTORE}"
                )


CELL_COLUMNS = ("cell_id", "gene_ids", "counts", "total_counts")
_RESTORE = "Delete the shard and run `prepare` again with the same arguments, or copy it anew from its source."


def table_to_cells(table: pa.Table) -> Cells:
    """Turn rows of a shard into `Cells`, without a Python object per cell."""
    ids, counts = table["gene_ids"].combine_chunks(), table["counts"].combine_chunks()
    return Cells(
        indptr=(ids.offsets.to_numpy() - ids.offsets[0].as_py()).astype(np.int64) if len(ids) else np.zeros(1, int),
        gene_ids=ids.flatten().to_numpy(),
        counts=counts.flatten().to_numpy(),
        cell_ids=table["cell_id"].to_numpy(),
        total_counts=table["total_counts"].to_numpy(),
    )


def open_corpus(
    path: str | os.PathLike, *, vocabulary: Mapping[str, int] | None = None, verify: bool | None = None
) -> Corpus:
    """Open a corpus, and refuse one that is unfinished, damaged, or made for another gene vocabulary.

    Args:
        path: Folder of the corpus.
        vocabulary: The model's gene vocabulary, to compare with that of the corpus.
        verify: Whether to compare all checksums. Sizes are always compared. The default verifies corpora of up to
            1 GiB; whatever the choice, a damaged page is refused when it is read.

    Returns:
        The `Corpus`.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no corpus at {path}. `python -m scmmgpt.train prepare` makes one.")
    if not (path / "manifest.json").exists():
        raise FileNotFoundError(
            f"{path} has no manifest.json: it is not a corpus, or its build did not finish. "
            "Run `prepare` again with the same arguments; it goes on where it stopped."
        )
    manifest = Manifest.read(path / "manifest.json")
    _check_files(path, manifest)
    own_vocabulary = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
    if hash_vocabulary(own_vocabulary) != manifest.vocabulary_hash:
        raise ValueError(
            f"{path / 'vocab.json'} has hash {hash_vocabulary(own_vocabulary)[:12]}..., the manifest says "
            f"{manifest.vocabulary_hash[:12]}...: gene ids would mean other genes. Restore the file."
        )
    if vocabulary is not None and hash_vocabulary(vocabulary) != manifest.vocabulary_hash:
        raise ValueError(_describe_difference(path, own_vocabulary, vocabulary))
    aliases_path = path / "gene_aliases.json"
    aliases = json.loads(aliases_path.read_text(encoding="utf-8")) if aliases_path.exists() else {}
    splits = json.loads((path / "splits.json").read_text(encoding="utf-8"))
    corpus = Corpus(path, manifest, own_vocabulary, aliases, splits)
    if verify or (verify is None and manifest.n_bytes <= SMALL_CORPUS_BYTES):
        corpus.verify()
    return corpus


def _check_files(path: Path, manifest: Manifest) -> None:
    missing = [shard.path for shard in manifest.shards if not (path / shard.path).exists()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(manifest.shards)} shards of {path} are missing: {missing[:5]}. "
            "Run `prepare` again with the same arguments: it writes what is missing."
        )
    for shard in manifest.shards:
        n_bytes = (path / shard.path).stat().st_size
        if n_bytes != shard.n_bytes:
            raise ValueError(
                f"Shard {path / shard.path} has {n_bytes} bytes, the manifest says {shard.n_bytes}: "
                f"it is {'truncated' if n_bytes < shard.n_bytes else 'not the one that was written'}. {_RESTORE}"
            )
    for name in ("vocab.json", "splits.json"):
        if not (path / name).exists():
            raise FileNotFoundError(f"{path / name} is missing. Restore it from the source of the corpus.")
    if manifest.splits_hash is not None and hash_file(path / "splits.json") != manifest.splits_hash:
        raise ValueError(f"{path / 'splits.json'} has changed since the corpus was built. Restore the file.")


def _describe_difference(path: Path, own: Mapping[str, int], other: Mapping[str, int]) -> str:
    moved = [symbol for symbol, index in own.items() if other.get(symbol, index) != index]
    only_corpus, only_model = sorted(own.keys() - other.keys()), sorted(other.keys() - own.keys())
    return (
        f"The corpus at {path} was written with another gene vocabulary than the model's: {len(only_corpus)} genes "
        f"only in the corpus {only_corpus[:3]}, {len(only_model)} only in the model {only_model[:3]}, {len(moved)} "
        f"with another id {moved[:3]}. Prepare the corpus again with the model's vocabulary."
    )


__all__ = [
    "CELL_COLUMNS",
    "OBS_COLUMNS",
    "ROW_GROUP_SIZE",
    "SCHEMA_VERSION",
    "SPLITS",
    "Corpus",
    "CorpusWriter",
    "Manifest",
    "Shard",
    "describe_shard",
    "hash_file",
    "hash_vocabulary",
    "open_corpus",
    "shard_schema",
    "table_to_cells",
    "write_corpus",
    "write_json",
]

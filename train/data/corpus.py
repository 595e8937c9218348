"""The training corpus on disk: Parquet shards, a gene vocabulary, splits and a manifest.

```
manifest.json      schema version, vocabulary hash, sources, splits, one record with a checksum per shard
vocab.json         gene symbol -> id (scGPT's format)
gene_aliases.json  other gene name -> symbol of the vocabulary (optional)
splits.json        the datasets, donors or cells of train, validation and test
data/              train-00000-of-00003.parquet, ...: the published layout
cache/             Arrow copies that stream faster (`python -m scmmgpt.train cache`)
```

One row of a shard is one cell (schema version 2):

| column | type | meaning |
| --- | --- | --- |
| `cell_id` | int64 | stable identity of the cell, the 64 bits of a hash; seeds all randomness of the cell |
| `n_genes` | uint16 | number of genes stored for the cell |
| `gene_ids` | list<uint16> | expressed genes, as ascending ids of `vocab.json` |
| `counts` | list<uint16> or list<float32> | counts; float32 if a count of the shard is fractional or above 65,535 |
| `total_counts` | float32 | library size over all genes of the source, not only those of the vocabulary |
| `barcode`, `dataset_id`, `donor_id`, `cell_type`, ... (`OBS_COLUMNS`) | string | annotations, null where unknown |

A corpus is a dataset of the Hub, and any Parquet reader can load the shards:

```python
load_dataset("corpus", split="train", streaming=True)
open_corpus("corpus").push_to_hub("me/corpus")
open_corpus("me/corpus@v1")
```

A file in `data/` is always whole, and is never written twice. `manifest.json` is written last: a folder with a
manifest is a finished corpus. Every page has a CRC that every read verifies.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.commands.checkpoints import check_ids
from scmmgpt.commands.files import read_json, write_json
from scmmgpt.train.data.ontology import ONTOLOGIES
from scmmgpt.train.data.sharing import push_folder


if TYPE_CHECKING:
    import anndata
    import datasets


Group = TypeVar("Group", bound=tuple)

SCHEMA_VERSION = 2
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
SPLITS = ("train", "validation", "test")
SPECIAL_TOKENS = ("<pad>", "<cls>", "<eoc>")  # scGPT's; they come before the genes in a new vocabulary
CELL_COLUMNS = ("cell_id", "gene_ids", "counts", "total_counts")
OBS_COLUMNS = (
    *("barcode", "dataset_id", "donor_id"),
    *(name for label in ONTOLOGIES for name in (label, f"{label}_ontology_term_id")),
)
ROW_GROUP_SIZE = 512  # cells read at once; some tens of row groups make one shuffled pool
MAX_VOCABULARY_SIZE = 2**16  # gene ids are stored as uint16; scGPT's vocabulary has 60,697 entries
SMALL_CORPUS_BYTES = 2**30  # up to this size, checksums take about a second

_RESTORE = "Delete the shard and run `prepare` again with the same arguments, or copy the shard from its source again."


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
    """The manifest's record of one shard: `path` is relative to the corpus; the last row group may be smaller."""

    path: str
    split: str
    n_cells: int
    n_values: int
    n_bytes: int
    sha256: str
    counts_dtype: str
    row_group_size: int

    def checked(self) -> "Shard":
        """Return the record if every field has its type and the path is inside the corpus; raise otherwise."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type or isinstance(value, int) and value < 0:
                raise TypeError(f"{field.name} of a shard is {value!r}")
        if Path(self.path).is_absolute() or ".." in Path(self.path).parts:
            raise ValueError(f"the shard {self.path!r} lies outside the corpus")
        if self.split not in SPLITS or self.counts_dtype not in ("uint16", "float32"):
            raise ValueError(f"the shard {self.path!r} is of split {self.split!r} and type {self.counts_dtype!r}")
        return self


@dataclasses.dataclass
class Manifest:
    """The record of a corpus: contents, sources, splits, and hashes to verify them."""

    vocabulary_hash: str  # `hash_vocabulary` of `vocab.json`
    vocabulary_size: int
    shards: list[Shard]  # sorted by path
    split_by: str | None = (
        None  # unit that no two splits share: "dataset", "donor", "cell", or "column" if obs decided
    )
    splits_hash: str | None = None  # sha256 of `splits.json`
    sources: list[dict] = dataclasses.field(default_factory=list)  # name, licence, numbers of cells and genes, ...
    excluded_datasets: list[str] = dataclasses.field(default_factory=list)  # left out on purpose, for evaluation
    dropped: dict = dataclasses.field(default_factory=dict)  # numbers of dropped cells and genes, by reason
    command: str | None = None
    notes: dict = dataclasses.field(default_factory=dict)  # further JSON-able facts
    schema_version: int = SCHEMA_VERSION

    @property
    def n_cells(self) -> int:
        """Number of cells of all splits."""
        return sum(shard.n_cells for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.n_bytes for shard in self.shards)

    def write(self, path: str | os.PathLike) -> None:
        """Write the manifest as JSON, whole."""
        totals = {"n_cells": self.n_cells, "n_bytes": self.n_bytes}
        write_json(path, {"schema_version": self.schema_version, **totals, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Manifest":
        """Read a manifest; refuse another schema version."""
        fields = read_json(path, dict)
        version = fields.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema version {version}; this release reads {SCHEMA_VERSION}. "
                "Install the release that wrote it, or prepare the corpus again."
            )
        try:
            fields["shards"] = [Shard(**shard).checked() for shard in fields["shards"]]
            return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}). Copy it again from the source of the corpus.") from None


def shard_schema(counts_dtype: str, vocabulary_hash: str) -> pa.Schema:
    """Return the Arrow schema of a shard whose counts are `"uint16"` or `"float32"`."""
    # `nullable=False` makes lists a fifth cheaper to read.
    gene_ids = pa.list_(pa.field("element", pa.uint16(), nullable=False))
    counts = pa.list_(pa.field("element", pa.type_for_alias(counts_dtype), nullable=False))
    columns = [
        pa.field("cell_id", pa.int64(), nullable=False),
        pa.field("n_genes", pa.uint16(), nullable=False),
        pa.field("gene_ids", gene_ids, nullable=False),
        pa.field("counts", counts, nullable=False),
        pa.field("total_counts", pa.float32(), nullable=False),
        *(pa.field(name, pa.string()) for name in OBS_COLUMNS),
    ]
    described = json.dumps({"schema_version": SCHEMA_VERSION, "vocabulary_hash": vocabulary_hash})
    return pa.schema(columns, metadata={b"scmmgpt": described.encode()})


@dataclasses.dataclass(repr=False, eq=False)
class Corpus:
    """A corpus that `open_corpus` opened: its folder, and the contents of its JSON files.

    `vocabulary` maps gene symbols to ids. `gene_aliases` is empty if the corpus has no `gene_aliases.json`. `repo_id`
    is the Hub id of a downloaded corpus, without revision; None for a folder.
    """

    path: Path
    manifest: Manifest
    vocabulary: dict[str, int]
    gene_aliases: dict[str, Any]
    splits: dict[str, Any]
    repo_id: str | None = None

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split}: {self.n_cells(split):,}" for split in self.split_names)
        return f"Corpus({str(self.path)!r}, {sizes} cells, {len(self.vocabulary):,} genes)"

    @property
    def split_names(self) -> list[str]:
        """Splits that have cells."""
        return [split for split in SPLITS if any(shard.split == split for shard in self.manifest.shards)]

    @property
    def gene_symbols(self) -> np.ndarray:
        """Gene symbol of every id, object `(largest id + 1,)`; None at unused ids."""
        symbols = np.full(max(self.vocabulary.values()) + 1, None, dtype=object)
        symbols[list(self.vocabulary.values())] = list(self.vocabulary)
        return symbols

    def check_vocabulary(self, vocabulary: Mapping[str, int], model: str) -> None:
        """Refuse a model with another gene vocabulary; `model` is the folder of the model."""
        own = self.vocabulary
        if hash_vocabulary(vocabulary) != self.manifest.vocabulary_hash:
            moved = [symbol for symbol, index in own.items() if vocabulary.get(symbol, index) != index]
            mine, others = sorted(own.keys() - vocabulary.keys()), sorted(vocabulary.keys() - own.keys())
            raise ValueError(
                f"The corpus at {self.path} was written with another gene vocabulary than {model}: {len(mine)} genes "
                f"only in the corpus {mine[:3]}, {len(others)} only in the model {others[:3]}, {len(moved)} with "
                f"another id {moved[:3]}. Prepare the corpus again with the `--vocabulary` of the model."
            )

    def shards(self, split: str) -> list[Shard]:
        """Return the shards of a split, sorted by path."""
        shards = [shard for shard in self.manifest.shards if shard.split == split]
        if not shards:
            raise ValueError(f"{self.path} has no split {split!r}; it has {self.split_names}.")
        return shards

    def n_cells(self, split: str) -> int:
        """Return the number of cells of a split."""
        return sum(shard.n_cells for shard in self.shards(split))

    def obs(self, split: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read `columns` of a split, without its counts; default: all columns but `gene_ids` and `counts`.

        Labels are dictionary arrays, which `.to_pandas()` turns into categories.
        """
        columns = ["cell_id", "n_genes", "total_counts", *OBS_COLUMNS] if columns is None else list(columns)
        labels = [name for name in columns if name in OBS_COLUMNS[1:]]
        tables = [
            pq.read_table(self.path / shard.path, columns=columns, read_dictionary=labels, partitioning=None)
            for shard in self.shards(split)
        ]
        return pa.concat_tables([table.replace_schema_metadata(None) for table in tables]).unify_dictionaries()

    def row_groups(
        self, split: str, columns: Sequence[str] | None = None, *, rng: np.random.Generator | None = None
    ) -> Iterator[tuple[Cells, pa.Table]]:
        """Yield raw counts and annotations (default: `OBS_COLUMNS`) of one row group at a time.

        The order is that of the files; with `rng`, shards and row groups within a shard are in random order.
        """
        columns = list(OBS_COLUMNS) if columns is None else list(columns)
        shards = self.shards(split)
        for number in range(len(shards)) if rng is None else rng.permutation(len(shards)):
            with self.open_shard(shards[number]) as file:
                n_groups = file.num_row_groups
                for group in range(n_groups) if rng is None else rng.permutation(n_groups).tolist():
                    table = file.read_row_group(group, columns=[*CELL_COLUMNS, *columns])
                    yield table_to_cells(table), table.select(columns)

    def load(self, split: str, columns: Sequence[str] | None = None) -> tuple[Cells, pa.Table]:
        """Read a whole split into memory; see `row_groups`."""
        return _join(list(self.row_groups(split, columns)))

    def sample(
        self, split: str, max_cells: int, columns: Sequence[str] | None = None, *, seed: int = 0
    ) -> tuple[Cells, pa.Table]:
        """Read row groups of a split, drawn at random, until there are `max_cells`; see `row_groups`."""
        groups = self.row_groups(split, columns, rng=np.random.default_rng(seed))
        cells, table = _join(list(first_groups(groups, max_cells)))
        return cells[:max_cells], table[:max_cells]

    def to_adata(self, split: str, start: int = 0, stop: int | None = None) -> "anndata.AnnData":
        """Return a split as an AnnData: counts over the whole vocabulary in CSR, barcodes as `obs_names`.

        With `start` or `stop`, only the row groups of these cells are read.
        """
        import anndata

        cells, table = self.load(split) if not start and stop is None else self._load_rows(split, start, stop)
        obs = table.to_pandas().set_index("barcode")
        obs["total_counts"] = cells.library_sizes()
        genes = np.array([name for name in self.vocabulary if not name.startswith("<")])
        columns = [self.vocabulary[name] for name in genes]
        counts = cells.to_csr(max(self.vocabulary.values()) + 1)
        adata = anndata.AnnData(X=counts[:, columns], obs=obs.dropna(axis=1, how="all"))
        adata.var_names = genes
        return adata

    def _load_rows(self, split: str, start: int, stop: int | None) -> tuple[Cells, pa.Table]:
        """Read some cells of a split, in stored order."""
        pieces: list[tuple[Cells, pa.Table]] = []
        stop, first = self.n_cells(split) if stop is None else stop, 0
        for shard in self.shards(split):
            begin, last = max(start - first, 0), min(stop - first, shard.n_cells)  # rows of the shard
            if begin < last:
                groups = range(begin // shard.row_group_size, -(-last // shard.row_group_size))
                with self.open_shard(shard) as file:
                    table = file.read_row_groups(groups, columns=[*CELL_COLUMNS, *OBS_COLUMNS])
                rows = slice(begin - groups[0] * shard.row_group_size, last - groups[0] * shard.row_group_size)
                pieces.append((table_to_cells(table)[rows], table.select(OBS_COLUMNS)[rows]))
            first += shard.n_cells
        return _join(pieces)

    def open_shard(self, shard: Shard) -> pq.ParquetFile:
        """Open a shard for reading, with page checksums verified."""
        path, labels = self.path / shard.path, list(OBS_COLUMNS[1:])
        try:
            file = pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=labels)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"Shard {path} can't be read: {error}. {_RESTORE}") from error
        if missing := [name for name in (*CELL_COLUMNS, *OBS_COLUMNS) if name not in file.schema_arrow.names]:
            raise ValueError(f"Shard {path} has no columns {', '.join(missing)}. {_RESTORE}")
        if file.metadata.num_rows != shard.n_cells:
            n_cells = file.metadata.num_rows
            raise ValueError(f"Shard {path} has {n_cells} cells, but {shard.n_cells} in the manifest. {_RESTORE}")
        return file

    def features(self) -> "datasets.Features":
        """The `datasets.Features` of the shards; counts are float32 if any shard has float32 counts."""
        return features_of(self.manifest)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the corpus to the Hub as a dataset, without lock files and `cache/`; return the name of the dataset.

        `load_dataset` and [`open_corpus`] read the uploaded corpus. `options`: see [`push_folder`].
        """
        return push_folder(self.path, repo_id, repo_type="dataset", **options)


def first_groups(groups: Iterable[Group], n_cells: int) -> Iterator[Group]:
    """Yield groups of cells, tuples of [`Cells`] and others, until there are `n_cells`."""
    for group in groups:
        yield group
        n_cells -= len(group[0])
        if n_cells <= 0:
            return


def _join(pieces: list[tuple[Cells, pa.Table]]) -> tuple[Cells, pa.Table]:
    return Cells.concatenate([cells for cells, _ in pieces]), pa.concat_tables([table for _, table in pieces])


def features_of(manifest: Manifest) -> "datasets.Features":
    """See [`Corpus.features`]."""
    import datasets

    widest = "float32" if any(shard.counts_dtype == "float32" for shard in manifest.shards) else "uint16"
    return datasets.Features.from_arrow_schema(shard_schema(widest, manifest.vocabulary_hash))


def table_to_cells(table: pa.Table) -> Cells:
    """Convert rows of a shard, or of any dataset with its columns, to `Cells`; `total_counts` may be absent."""
    ids, counts = table["gene_ids"].combine_chunks(), table["counts"].combine_chunks()
    totals = table["total_counts"].to_numpy() if "total_counts" in table.column_names else None
    return Cells(
        indptr=(ids.offsets.to_numpy() - ids.offsets[0].as_py()).astype(np.int64) if len(ids) else np.zeros(1, int),
        gene_ids=ids.flatten().to_numpy(),
        counts=counts.flatten().to_numpy(),
        cell_ids=table["cell_id"].to_numpy().view(np.uint64),
        total_counts=totals,
    )


def open_corpus(path: str | os.PathLike, *, verify: bool | None = None) -> Corpus:
    """Open a corpus; refuse one that is unfinished or damaged.

    Args:
        path: Folder of the corpus; or id of a corpus on the Hub, `owner/name` or `owner/name@revision`, which is
            downloaded.
        verify: Whether to compare all checksums; default: those of a corpus of up to 1 GiB. File sizes are always
            compared, and a damaged page is always refused when it is read.
    """
    repo_id = None
    if not Path(path).exists() and HUB_ID.fullmatch(str(path)):
        repo_id, _, pinned = str(path).partition("@")
        path = _download(repo_id, pinned or None)
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no corpus at {path}. `python -m scmmgpt.train prepare` makes one.")
    if not (path / "manifest.json").exists():
        raise FileNotFoundError(
            f"{path} has no manifest.json: it is not a corpus, or its build did not finish. "
            "Run `prepare` again with the same arguments: the build goes on where it stopped."
        )
    manifest = Manifest.read(path / "manifest.json")
    _check_files(path, manifest, manifest.n_bytes <= SMALL_CORPUS_BYTES if verify is None else verify)
    own_vocabulary = read_json(path / "vocab.json", dict)
    check_ids(path / "vocab.json", own_vocabulary)
    if (found := hash_vocabulary(own_vocabulary)) != manifest.vocabulary_hash:
        raise ValueError(
            f"{path / 'vocab.json'} has hash {found[:12]}..., but {manifest.vocabulary_hash[:12]}... in the manifest: "
            "gene ids would mean other genes. Restore the file."
        )
    aliases = read_json(path / "gene_aliases.json", dict) if (path / "gene_aliases.json").exists() else {}
    return Corpus(path, manifest, own_vocabulary, aliases, read_json(path / "splits.json", dict), repo_id)


def _download(repo_id: str, revision: str | None) -> Path:
    """Download a corpus of the Hub; return its folder in the Hub's cache."""
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{repo_id} is neither a folder nor a corpus of the Hub that can be read from here: {first_line} "
            "`python -m scmmgpt.train prepare` makes a corpus."
        ) from None


def check_shard(path: Path, shard: Shard, *, checksum: bool) -> None:
    """Refuse a shard of the corpus at `path` whose size (or checksum) differs from the manifest."""
    file = path / shard.path
    n_bytes = file.stat().st_size
    if n_bytes != shard.n_bytes:
        raise ValueError(
            f"Shard {file} has {n_bytes} bytes, but {shard.n_bytes} in the manifest: "
            f"it is {'truncated' if n_bytes < shard.n_bytes else 'another file'}. {_RESTORE}"
        )
    if checksum and (found := hash_file(file)) != shard.sha256:
        raise ValueError(
            f"Shard {file} has sha256 {found[:12]}..., but {shard.sha256[:12]}... in the manifest: "
            f"its content has changed. {_RESTORE}"
        )


def _check_files(path: Path, manifest: Manifest, checksum: bool) -> None:
    missing = [shard.path for shard in manifest.shards if not (path / shard.path).exists()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(manifest.shards)} shards of {path} are missing: {missing[:5]}. "
            "Run `prepare` again with the same arguments: it writes the missing shards."
        )
    for shard in manifest.shards:
        check_shard(path, shard, checksum=checksum)
    for name in ("vocab.json", "splits.json"):
        if not (path / name).exists():
            raise FileNotFoundError(f"{path / name} is missing. Restore it from the source of the corpus.")
    if manifest.splits_hash is not None and hash_file(path / "splits.json") != manifest.splits_hash:
        raise ValueError(f"{path / 'splits.json'} has changed since the corpus was built. Restore the file.")

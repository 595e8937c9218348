"""The three steps of the external sort that `build` describes: functions of plain data and of files.

Any process that sees the folders can run a step. A step whose result exists returns that result.
Scratch files of a build, in the folder `.build` of the corpus:

```
request.json                      everything that determines the bytes of the corpus
vocab.json, gene_aliases.json     the genes, and their aliases
common.npy                        ids of the genes that all sources measure
joinids-0.npy                     the cells of a Census slice; one file a source
scan/00000.json                   results of `scan_source`; one file a source
splits.json                       the division of the cells
parts-16384/000000/               results of `map_partition`; one folder a partition, here of 16,384 cells:
    uint16.arrow, float32.arrow   cells of 16-bit counts, and other cells
    genes.npz                     sums over the training cells, by gene
    uint16-copies.npy, ...        results of `find_copies`; whether a cell has the counts of an earlier one
    part.json                     rows of each split, and numbers of dropped cells
shards/train-00000-of-00009.json  results of `merge_shard`; one file a shard
```
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from scmmgpt.cells_scmmgpt import Cells, RandomStream, cell_keys
from scmmgpt.commands.errors import naming
from scmmgpt.commands.files import read_json, whole_file, whole_folder, write_json
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.kernels_scmmgpt import mix64
from scmmgpt.reading_scmmgpt import InputChoice
from scmmgpt.train.data.corpus import OBS_COLUMNS, SPLITS, table_to_cells
from scmmgpt.train.data.corpus_writer import CorpusWriter
from scmmgpt.train.data.gene_tables import reference_gene_index
from scmmgpt.train.data.sources import CensusSource, Source, SourceSpec, cell_ids, open_source, resolve_labels
from scmmgpt.train.data.splits import assign_splits


COUNT_KINDS = ("uint16", "float32")
SHARE_UNITS = 2**36  # fine enough for one count in a million, and 10^8 cells still sum to less than 2^63
MIN_COPIED_GENES = 20  # fewest genes for the detection of copies; cells with fewer genes can be equal by chance
CELLS_TAKEN = 2_048  # cells whose counts are read or gathered at once
CELLS_PER_SCAN = 500_000  # cells whose annotations are read at once


def scan_source(
    scratch: Path, index: int, spec: SourceSpec, *, has_vocabulary: bool, split_column: str | None = None
) -> dict[str, Any]:
    """Read the annotations and genes of source number `index`, but not its counts.

    The genes are matched with the build's vocabulary, or with all human genes.

    Returns:
        `n_cells`; `units`, a list of `[dataset_id, donor_id or None, n_cells]`; `symbols`, the measured genes;
        `record`, the source's entry of the manifest.
    """
    path = scratch / "scan" / f"{index:05d}.json"
    if path.exists():
        return read_json(path)
    source = open_source(spec)
    if split_column is not None:
        source.column(split_column, 0, 1)  # refuses a column that is not there
    gene_index = _gene_index(scratch) if has_vocabulary else reference_gene_index()
    with _naming(spec):
        choice = source.choose(gene_index)
    symbols = {i: symbol for symbol, i in gene_index.vocabulary.items()}
    units: Counter[tuple[str, str]] = Counter()
    datasets: Counter[str] = Counter()
    labels: dict[str, Any] = {}
    for start in range(0, source.n_cells, CELLS_PER_SCAN):
        obs = resolve_labels(source.obs(start, start + CELLS_PER_SCAN), labels)
        units.update(obs.groupby(["dataset_id", obs["donor_id"].fillna("")], sort=False).size().to_dict())
    for (dataset, _), n_cells in units.items():
        datasets[dataset] += n_cells
    genes = choice.match.report
    measured, matched = genes["genes"], genes["matched"]
    details = {name: genes.get(name) for name in ("share_expression_matched", "largest_unmatched")}
    record = {
        **source.provenance(),
        "n_cells": source.n_cells,
        "datasets": datasets,
        "n_donors": sum(donor != "" for _, donor in units),
        "values": {key: choice.report["matrix"][key] for key in ("chosen", "kind", "conversion")},
        "genes": {"measured": measured, "matched": matched, "unmatched": measured - matched, **details},
        "labels": labels,
        "warnings": choice.report["warnings"],
    }
    if isinstance(source, CensusSource):
        record["citations"] = source.citations(datasets)
    scan = {
        "n_cells": source.n_cells,
        "units": [[dataset, donor or None, n_cells] for (dataset, donor), n_cells in units.items()],
        "symbols": sorted({symbols[i] for i in choice.match.ids[choice.match.ids >= 0].tolist()}),
        "record": record,
    }
    write_json(path, scan)
    return read_json(path)


def map_partition(
    scratch: Path,
    folder: Path,
    spec: SourceSpec,
    start: int,
    stop: int,
    *,
    excluded_datasets: list[str],
    min_genes: int,
    split_column: str | None,
    seed: int,
) -> dict[str, Any]:
    """Write the cells `start` to `stop` of a source to scratch files sorted by split and random key.

    Returns:
        `rows`, kind of counts -> split -> `[start, stop]` in the scratch file; `dropped`, reason -> number of cells;
        `n_kept`.
    """
    if folder.exists():
        return read_json(folder / "part.json")
    source, choice = _chosen_source(spec, scratch)
    obs = resolve_labels(source.obs(start, stop))
    with _naming(spec):
        read = (source.cells(i, min(i + CELLS_TAKEN, stop), choice) for i in range(start, stop, CELLS_TAKEN))
        cells = Cells.concatenate([cells.sorted_by_gene() for cells in read])
    cells.cell_ids = cell_ids(obs)

    # 1. Drop cells of excluded datasets and cells of too few genes.
    excluded = obs["dataset_id"].isin(excluded_datasets).to_numpy()
    poor = ~excluded & (np.diff(cells.indptr) < max(min_genes, 1))
    kept = np.flatnonzero(~excluded & ~poor)
    if len(kept) < len(cells):
        cells, obs = _take(cells, kept), obs.iloc[kept]

    # 2. Sort by kind of counts, split and key.
    column = source.column(split_column, start, stop)[kept] if split_column else None
    split = assign_splits(obs, cells.cell_ids, read_json(scratch / "splits.json"), column)
    keys = cell_keys(cells.cell_ids, seed=seed, epoch=0, stream=RandomStream.ORDER)
    kind = _needs_float(cells).astype(int)  # position in `COUNT_KINDS`
    order = np.lexsort((keys, split, kind))
    cells, obs, keys, split = _take(cells, order), obs.iloc[order], keys[order], split[order]

    # 3. Write the cells, and the sums from which the gene means follow.
    rows = {}
    bounds = np.searchsorted(kind[order], np.arange(len(COUNT_KINDS) + 1)).tolist()
    with whole_folder(folder) as temporary:
        for name, own in zip(COUNT_KINDS, map(slice, bounds[:-1], bounds[1:]), strict=True):
            edges = np.searchsorted(split[own], np.arange(len(SPLITS) + 1)).tolist()
            rows[name] = {split_name: edges[i : i + 2] for i, split_name in enumerate(SPLITS)}
            if own.stop > own.start:
                table = _scratch_table(cells[own], obs.iloc[own], keys[own], name)
                content = content_hashes(cells[own], np.load(scratch / "common.npy"))
                table = table.append_column("content", pa.array(content))
                with pa.ipc.new_file(str(temporary / f"{name}.arrow"), table.schema) as writer:
                    writer.write_table(table)
        n_genes = max(_gene_index(scratch).vocabulary.values()) + 1
        np.savez(temporary / "genes.npz", **_gene_sums(cells, split == SPLITS.index("train"), n_genes))
        dropped = {"excluded_dataset": int(excluded.sum()), "too_few_genes": int(poor.sum())}
        write_json(temporary / "part.json", {"rows": rows, "dropped": dropped, "n_kept": len(cells)})
    return read_json(folder / "part.json")


def content_hashes(cells: Cells, common: np.ndarray) -> np.ndarray:
    """Hash the counts of each cell, uint64 `(n_cells,)`; 0 for a cell of fewer than `MIN_COPIED_GENES` genes.

    Only the genes `common` to all sources count, because copies of a cell in two sources can differ in other genes.
    """
    kept = np.isin(cells.gene_ids, common)
    bits = cells.counts.astype(np.float32).view(np.uint32).astype(np.uint64)
    hashed = mix64(mix64(cells.gene_ids.astype(np.uint64)) ^ bits) * kept
    # Sums of unsigned integers wrap around, and so do their differences.
    sums, n_genes = (np.cumsum(np.append(np.uint64(0), values), dtype=np.uint64) for values in (hashed, kept))
    first, last = cells.indptr[:-1], cells.indptr[1:]
    return np.where(n_genes[last] - n_genes[first] >= MIN_COPIED_GENES, sums[last] - sums[first], np.uint64(0))


def find_copies(parts: list[Path]) -> None:
    """Mark copies: cells with the same counts as another cell, even if their names differ.

    Among cells with equal counts, the cell with the smallest key stays unmarked. Copies would otherwise leak a cell
    from one split into another.
    """
    files = [folder / f"{kind}.arrow" for folder in parts for kind in COUNT_KINDS]
    files = [path for path in files if path.exists()]
    columns = []
    for path in files:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        columns.append([table[name].to_numpy() for name in ("content", "key")])
    content, keys = (np.concatenate(values) for values in zip(*columns, strict=True))
    order = np.lexsort((keys, content))
    ordered = content[order]
    copies = np.zeros(len(content), dtype=bool)
    copies[order[1:]] = (ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)
    start = 0
    for path, (own, _) in zip(files, columns, strict=True):
        with whole_file(copies_path(path)) as temporary:
            np.save(temporary, copies[start : start + len(own)])
        start += len(own)


def copies_path(path: Path) -> Path:
    """Path of the array that marks the copies in a scratch file of cells, bool `(n_cells,)`."""
    return path.with_name(f"{path.stem}-copies.npy")


def _needs_float(cells: Cells) -> np.ndarray:
    """Whether a cell has a count that is not a 16-bit integer, bool `(n_cells,)`. Every cell must have a gene."""
    counts = cells.counts
    fits = (counts == np.rint(counts)) & (counts <= np.iinfo(np.uint16).max)
    return ~np.logical_and.reduceat(fits, cells.indptr[:-1]) if len(cells) else np.zeros(0, dtype=bool)


def _scratch_table(cells: Cells, obs: pd.DataFrame, keys: np.ndarray, kind: str) -> pa.Table:
    offsets = pa.array(cells.indptr.astype(np.int32))
    columns = {
        "key": pa.array(keys),
        "cell_id": pa.array(cells.cell_ids),
        "gene_ids": pa.ListArray.from_arrays(offsets, pa.array(cells.gene_ids.astype(np.uint16))),
        "counts": pa.ListArray.from_arrays(offsets, pa.array(cells.counts.astype(kind))),
        "total_counts": pa.array(cells.library_sizes()),
    }
    for name in OBS_COLUMNS:
        values = pa.array(obs[name].to_numpy(dtype=object), pa.string(), from_pandas=True)
        columns[name] = values if name == "barcode" else values.dictionary_encode()
    return pa.table(columns)


def _gene_sums(cells: Cells, train: np.ndarray, n_genes: int) -> dict[str, Any]:
    """Sum each gene's share of the counts over the training cells, and count the cells that express the gene.

    Shares are summed as whole multiples of 1 / `SHARE_UNITS`: sums of floats would depend on the partitions.
    """
    share, n_cells = np.zeros(n_genes, dtype=np.int64), np.zeros(n_genes, dtype=np.int64)
    per_count = train / cells.library_sizes().astype(np.float64)
    for start in range(0, len(cells), CELLS_TAKEN):
        part = cells[start : start + CELLS_TAKEN]
        weights = np.repeat(per_count[start : start + CELLS_TAKEN], np.diff(part.indptr))
        units = np.rint(part.counts * weights * SHARE_UNITS)
        share += np.bincount(part.gene_ids, weights=units, minlength=n_genes).astype(np.int64)
        n_cells += np.bincount(part.gene_ids[weights > 0], minlength=n_genes)
    return {"share": share, "n_cells": n_cells, "n_train": int(train.sum())}


def merge_shard(
    scratch: Path,
    output: Path,
    parts: list[Path],
    split: str,
    index: int,
    n_shards: int,
    *,
    kind: str,
    slice_index: int,
    n_slices: int,
) -> dict[str, int]:
    """Merge one range of keys of all scratch files into a shard; return the numbers of `duplicates` and `renamed`.

    Shard `index` of a split is slice number `slice_index` of the `n_slices` of its kind of counts.
    """
    writer = open_writer(scratch, output)
    shard = writer.shard_path(split, index, n_shards)
    path = scratch / "shards" / f"{shard.stem}.json"
    if shard.exists() and path.exists():
        return read_json(path)
    tables, n_copies = [], 0
    for folder in parts:
        start, stop = read_json(folder / "part.json")["rows"][kind][split]
        if stop > start:
            file = folder / f"{kind}.arrow"
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            keys = table["key"].to_numpy()[start:stop]
            ends = (slice_index, slice_index + 1)
            bounds = [np.uint64(min(end * 2**64 // n_slices, 2**64 - 1)) for end in ends]
            first, last = np.searchsorted(keys, bounds).tolist()
            last = stop - start if slice_index + 1 == n_slices else last
            copies = np.load(copies_path(file))[start + first : start + last]
            n_copies += int(copies.sum())
            table = table.drop_columns("content").slice(start + first, last - first)
            tables.append(table.filter(pa.array(~copies)) if copies.any() else table)
    table = pa.concat_tables(tables).unify_dictionaries()
    order = np.argsort(table["key"].to_numpy(), kind="stable")  # equal identities stay in the order of the partitions
    cells = _take(table_to_cells(table), order)
    kept, renamed = _tell_apart(cells)
    obs = table.select(OBS_COLUMNS).combine_chunks().take(order[kept])
    del table, tables
    stats = {"duplicates": len(cells) - len(kept) + n_copies, "renamed": renamed}
    if len(kept) < len(cells):
        cells = _take(cells, kept)
    write_json(path, stats)
    writer.write_shard(split, index, n_shards, cells, obs)
    return stats


def _tell_apart(cells: Cells) -> tuple[np.ndarray, int]:
    """Find exact copies among successive cells with the same id; give the other such cells new ids, in place.

    Return the positions of the cells that are not copies, and the number of cells with new ids.
    """
    ids, kept, renamed = cells.cell_ids.copy(), np.ones(len(cells), dtype=bool), 0
    known: set[tuple] = set()
    n_known: Counter[int] = Counter()
    for i in np.flatnonzero(np.isin(ids, ids[1:][ids[1:] == ids[:-1]])).tolist():
        values, own_id = slice(cells.indptr[i], cells.indptr[i + 1]), int(ids[i])
        content = own_id, cells.gene_ids[values].tobytes(), cells.counts[values].tobytes()
        if content in known:
            kept[i] = False
            continue
        if n := n_known[own_id]:
            renamed += 1
            cells.cell_ids[i] = cell_keys(ids[i : i + 1], seed=n, epoch=0, stream=RandomStream.DUPLICATE)[0]
        known.add(content)
        n_known[own_id] += 1
    return np.flatnonzero(kept), renamed


def _take(cells: Cells, rows: np.ndarray) -> Cells:
    """`cells[rows]` by blocks: the positions of all values at once would take several times the memory of `cells`."""
    indptr = np.concatenate([[0], np.cumsum(np.diff(cells.indptr)[rows])])
    gene_ids = np.empty(indptr[-1], cells.gene_ids.dtype)
    counts = np.empty(indptr[-1], cells.counts.dtype)
    for start in range(0, len(rows), CELLS_TAKEN):
        part = cells[rows[start : start + CELLS_TAKEN]]
        span = slice(indptr[start], indptr[start + len(part)])
        gene_ids[span], counts[span] = part.gene_ids, part.counts
    return Cells(indptr, gene_ids, counts, cells.cell_ids[rows], cells.library_sizes()[rows])


@functools.lru_cache(maxsize=2)
def _gene_index(scratch: Path) -> GeneIndex:
    return GeneIndex(read_json(scratch / "vocab.json"), read_json(scratch / "gene_aliases.json"))


@functools.lru_cache(maxsize=4)
def _chosen_source(spec: SourceSpec, scratch: Path) -> tuple[Source, InputChoice]:
    source = open_source(spec)
    with _naming(spec):
        return source, source.choose(_gene_index(scratch))


def open_writer(scratch: Path, output: Path) -> CorpusWriter:
    """Return a writer of the corpus for the genes of its build."""
    aliases = read_json(scratch / "gene_aliases.json")
    return CorpusWriter(output, read_json(scratch / "vocab.json"), gene_aliases=aliases)


@contextlib.contextmanager
def _naming(spec: SourceSpec) -> Iterator[None]:
    """Put the source's path before the text of an error or a warning."""
    try:
        with naming(spec.path):
            yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{spec.path}: {error}") from error
